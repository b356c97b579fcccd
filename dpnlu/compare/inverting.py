"""Classifiers as inversion wants them: their input vectors, and what they predict from these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attacks.inversion import Cloze, Layout, Rows, TorchModel
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import WordList
from dpnlu.nlu.data.vocabulary import UNKNOWN_ID
from dpnlu.nlu.encoding import SubwordEncoding, WordEncoding
from dpnlu.nlu.models import Batch, device_of, moved


def invertible(classifier: Classifier, clozes: Sequence[Cloze]) -> TorchModel:
    """A classifier together with the clozes that are put to it.

    Of a BiLSTM the vector of a word is that of its entry in the vocabulary followed by that of its
    characters, so that the same weights mix both. An encoder reads mixtures of its input
    embeddings; all candidates for a hole must be cut into as many sub-words. Digits are read as
    they are, whatever the classifier's own reading makes of them.

    Raises:
        ValueError: a label that the classifier does not know, candidates that its vocabulary does
            not hold or that it cannot tell apart, or a text longer than it reads.
    """
    classifier = unredacted(classifier)
    labels = classifier.encoding.labels
    _check_known(classifier, clozes)
    return TorchModel(
        classifier.model,
        clozes,
        read=lambda tokens: _layout(classifier, tokens),
        forward=lambda rows: _logits(classifier, rows),
        intents=labels.intents,
        tags=labels.tags,
    )


def unredacted(classifier: Classifier) -> Classifier:
    """The same classifier, reading digits as they are: so can whoever has the weights."""
    encoding: Any = replace(classifier.encoding, redact_digits=False)  # type: ignore[type-var]
    return replace(classifier, encoding=encoding)


def _check_known(classifier: Classifier, clozes: Sequence[Cloze]) -> None:
    """Raise where a candidate is read as the one entry that all unknown words share."""
    candidates = [token for cloze in clozes for tokens in cloze.candidates for token in tokens]
    unknown = [token for token in dict.fromkeys(candidates) if is_unknown(classifier, token)]
    if unknown:
        raise ValueError(
            f"Expected candidates that the model's vocabulary holds, got {unknown[0]!r}: leave it "
            "out, or train with a vocabulary that holds every candidate."
        )


def is_unknown(classifier: Classifier, token: str) -> bool:
    """Whether a word is read as the one entry that all unknown words share."""
    encoding = classifier.encoding
    if isinstance(encoding, SubwordEncoding):
        unknown = encoding.tokenizer.unk_token_id
        pieces = encoding.tokenizer([token], is_split_into_words=True)["input_ids"]
        return unknown is not None and unknown in pieces
    words = encoding.vocabulary if isinstance(encoding, WordEncoding) else None
    return isinstance(words, WordList) and words.encode([token]) == [UNKNOWN_ID]


def _layout(classifier: Classifier, tokens: Sequence[str]) -> Layout:
    encoding, model = classifier.encoding, classifier.model
    batch = moved(encoding.collate([encoding.read(tokens)]), device_of(model))
    (vectors,) = model.embed(batch)
    if isinstance(encoding, SubwordEncoding):
        return Layout(vectors, _spans(encoding, tokens))
    return Layout(vectors, tuple((place, place + 1) for place in range(len(tokens))))


def _spans(encoding: SubwordEncoding, tokens: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """For each token its first sub-word, and the one behind its last; 0, 0 without any."""
    words: list[int | None] = encoding.tokenizer(list(tokens), is_split_into_words=True).word_ids()
    places = [[s for s, word in enumerate(words) if word == token] for token in range(len(tokens))]
    return tuple((found[0], found[-1] + 1) if found else (0, 0) for found in places)


def _logits(classifier: Classifier, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
    batch: Batch = {"vectors": rows.vectors, "lengths": rows.lengths}
    if isinstance(classifier.encoding, SubwordEncoding):
        places = torch.arange(rows.vectors.shape[1], device=rows.sizes.device)
        attention = (places < rows.sizes[:, None]).long()
        batch |= {"attention": attention, "first": rows.first, "last": rows.last}
    model: Any = classifier.model
    outputs = model(batch)
    if rows.tags is not None:
        batch["tags"] = rows.tags
    return outputs.intents, outputs.tags_given(batch)
