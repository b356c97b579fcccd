"""Intent and slot classifiers, and their per-example losses.

A batch is a dictionary of tensors, made by `dpnlu.nlu.encoding`. Shapes: B examples, T words, S
sub-words, C characters, K intents, L tags.

    words (B, T)         word ids, 0 past the end        [BiLSTM]
    characters (B, T, C) bytes + 1, 0 past the end       [BiLSTM with characters]
    subwords (B, S), attention (B, S)                    [encoder]
    first (B, T), last (B, T)                            [encoder: first and last sub-word of each
                                                          word; last is -1 where it has none]
    pooled (B, m d), states (B, T, n d)                  [or what a frozen encoder said of these]
    vectors (B, T, d) or (B, S, d)                       [in place of words and characters, or of
                                                          subwords: what their embeddings said]
    lengths (B,)         words of each example
    intents (B,)         labels; absent where there are none to tell apart
    tags (B, T)          labels, -100 where there is none; absent without slots

Guarantee: neither the outputs for an example nor its loss depend on the other examples, nor on the
padding that they cause. Otherwise one example's gradient would change with the presence of
another, and clipping it would bound nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.nlu.encoder_states import (
    first_sub_words,
    intent_scale,
    means_of_words,
    pooled,
    with_neighbours,
    words,
    zero_linear,
)
from dpnlu.nlu.tag_chain import TagChain

Batch = dict[str, Tensor]

IGNORED_TAG = -100
# By which slot heads scale what they read of a text. All of its words read the same, so that their
# gradients add up and would take most of the room within a clipping bound.
TEXT_SCALE = 0.5
_EMBEDDING_STD = 0.1
_CHARACTERS = 257  # padding and the 256 bytes


@dataclass(frozen=True)
class Outputs:
    """What a classifier says of a batch.

    Attributes:
        intents: (B, K) logits. None without intents.
        tags: (B, T, L) logits; meaningless past an example's length. None without slots.
        chain: how tags follow one another; None: each word's tag is told by itself.
    """

    intents: Tensor | None
    tags: Tensor | None
    chain: TagChain | None = None

    def tags_given(self, batch: Batch) -> Tensor | None:
        """(B, T, L) logits whose softmax is that of a word's tag, given the true ones before it.

        Args:
            batch: its tags are read, and where there is a chain its lengths.
        """
        if self.tags is None or self.chain is None or "tags" not in batch:
            return self.tags
        return self.chain.conditional(self.tags, batch["tags"], batch["lengths"])

    def likeliest_tags(self, lengths: Tensor) -> Tensor:
        """(B, T) the likeliest tags, all of a text together where there is a chain.

        Args:
            lengths: (B,) words of each example, behind which tags mean nothing.
        """
        assert self.tags is not None
        if self.chain is None:
            return self.tags.argmax(2)
        return self.chain.likeliest(self.tags, lengths)


class BiLSTMClassifier(nn.Module):
    """Word embeddings, optional character convolution, BiLSTM, intent head and slot head.

    With a window, the embeddings are read directly, too: for a slot those of its word and of the
    words around it, for the intent their mean. Then the heads start at zero: what words alone say
    is learnt while the BiLSTM's states are still noise.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        num_intents: int,
        num_tags: int,
        embedding_size: int = 100,
        hidden_size: int = 100,
        num_layers: int = 1,
        character_filters: int = 0,
        dropout: float = 0.0,
        chain: TagChain | None = None,
        word_window: int | None = None,
    ) -> None:
        """Random weights.

        Args:
            vocabulary_size: number of word ids, padding included.
            num_intents: 0 for a model without intents.
            num_tags: 0 for a model without slots.
            hidden_size: per direction.
            character_filters: width of the character channel; 0 for none.
            dropout: on the BiLSTM's input and output, in [0, 1).
            chain: over the tags; None: the loss and the prediction of a word's tag are its own.
            word_window: of how many words before and behind a word the embeddings are read for its
                slot; None: embeddings are read by the BiLSTM alone.
        """
        super().__init__()
        self.chain, self.word_window = chain, word_window
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=0)
        # Small, so that a word that training never met says next to nothing.
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        self.characters = _CharacterCNN(character_filters) if character_filters else None
        sizes = [embedding_size + character_filters] + [2 * hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(_BiLSTMLayer(size, hidden_size) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        linear = nn.Linear if word_window is None else zero_linear
        self.intent_head = linear(2 * hidden_size, num_intents) if num_intents else None
        self.slot_head = linear(2 * hidden_size, num_tags) if num_tags else None
        self.word_head = self.bag_head = None
        if num_intents and word_window is not None:
            self.bag_head = zero_linear(sizes[0], num_intents, bias=False)
        if num_tags and word_window is not None:
            self.word_head = zero_linear(sizes[0], (2 * word_window + 1) * num_tags, bias=False)

    def forward(self, batch: Batch) -> Outputs:
        states = vectors = batch["vectors"] if "vectors" in batch else self.embed(batch)
        present = _present(batch["lengths"], states.shape[1])
        for layer in self.layers:
            states = layer(self.dropout(states), batch["lengths"])
        states = self.dropout(states)
        intents = tags = None
        if self.intent_head is not None:
            pooled = states.masked_fill(~present[:, :, None], -torch.inf).amax(1)
            intents = self.intent_head(pooled)
        if self.slot_head is not None:
            tags = self.slot_head(states)
        if intents is not None and self.bag_head is not None:
            intents = intents + self.bag_head(_mean(self.dropout(vectors), present))
        if tags is not None and self.word_head is not None and self.word_window is not None:
            of_words = self.word_head(self.dropout(vectors))
            tags = tags + with_neighbours(of_words, present, neighbours=self.word_window)
        return Outputs(intents, tags, self.chain)

    def embed(self, batch: Batch) -> Tensor:
        """(B, T, d): what the BiLSTM reads of each word."""
        states: Tensor = self.embedding(batch["words"])
        if self.characters is None:
            return states
        return torch.cat((states, self.characters(batch["characters"])), dim=2)

    def per_example_loss(self, batch: Batch) -> Tensor:
        """(B,) losses; see `intent_slot_loss`."""
        return intent_slot_loss(self(batch), batch)


class EncoderClassifier(nn.Module):
    """Any Hugging Face encoder, as it comes, with an intent head and a slot head.

    The intent is read from the means over the sub-words and over the words, in several layers, as
    earlier ones say more of the words; a slot from such layers, at its word, the words around it
    and the whole text. All are standardised and the heads start at zero, so that noise has little
    to spoil before there is something learnt.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        num_intents: int,
        num_tags: int,
        dropout: float = 0.0,
        freeze_encoder: bool = False,
        chain: TagChain | None = None,
        text_layers: Sequence[float] | None = None,
        word_layers: Sequence[float] | None = None,
        neighbours: int = 0,
        reads_text: bool = False,
        reads_word_means: bool = False,
    ) -> None:
        """Take over `encoder` with its weights.

        Its pooler, if it has one, is not used, and frozen so as not to be trained by noise alone.

        Args:
            encoder: called with `input_ids` or `inputs_embeds`, with `attention_mask` and with
                `output_hidden_states`; returns `hidden_states`.
            num_intents: 0 for a model without intents.
            num_tags: 0 for a model without slots.
            dropout: everywhere in the encoder and on its output, in [0, 1).
            freeze_encoder: train the heads only.
            chain: as in `BiLSTMClassifier`.
            text_layers, word_layers, neighbours, reads_text, reads_word_means: what heads read; see
                `Architecture`.
        """
        super().__init__()
        self.chain, self.neighbours = chain, neighbours
        self.text_layers, self.word_layers = text_layers, word_layers
        # In how many layers the intent head reads means over words; nothing else reads them.
        self.mean_layers = len(word_layers or ()) if reads_word_means and num_intents else 0
        self.encoder = encoder
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if name == "pooler":
                module.requires_grad_(False)
        if freeze_encoder:
            encoder.requires_grad_(False)
        config: Any = encoder.config
        self.dropout = nn.Dropout(dropout)
        width = config.hidden_size
        of_text = 2 if text_layers is None else len(text_layers)
        self.intent_scale = intent_scale(text_layers=of_text, mean_layers=self.mean_layers)
        self.intent_head = None
        if num_intents:
            self.intent_head = zero_linear(width * (of_text + self.mean_layers), num_intents)
        self.slot_head = self.text_head = None
        if num_tags:
            read = width * len(word_layers or (1.0,))
            self.slot_head = zero_linear(read, (2 * neighbours + 1) * num_tags)
        if num_tags and reads_text:
            self.text_head = zero_linear(width * of_text, num_tags, bias=False)

    def forward(self, batch: Batch) -> Outputs:
        read = self.read(batch) if "attention" in batch else batch
        intents = tags = None
        if self.intent_head is not None:
            intents = self.intent_head(self.intent_scale * self.dropout(read["pooled"]))
        if self.slot_head is not None:
            tags = self.slot_head(self.dropout(read["states"]))
            if self.neighbours:
                present = _present(batch["lengths"], tags.shape[1])
                tags = with_neighbours(tags, present, neighbours=self.neighbours)
        if tags is not None and self.text_head is not None:
            text = read["pooled"][:, : self.text_head.in_features]
            tags = tags + self.text_head(TEXT_SCALE * self.dropout(text))[:, None]
        return Outputs(intents, tags, self.chain)

    def embed(self, batch: Batch) -> Tensor:
        """(B, S, d): the rows of the input embedding table; positions are added further in."""
        encoder: Any = self.encoder
        vectors: Tensor = encoder.get_input_embeddings()(batch["subwords"])
        return vectors

    def read(self, batch: Batch) -> Batch:
        """What the heads read of the encoder: pooled (B, m d), the m means over each text, those
        over sub-words first, and states (B, T, n d) of the words in n layers."""
        attention = batch["attention"]
        layers = self.encoder(
            input_ids=None if "vectors" in batch else batch["subwords"],
            inputs_embeds=batch.get("vectors"),
            attention_mask=attention,
            output_hidden_states=True,
        ).hidden_states
        read = {}
        if self.slot_head is not None:
            read["states"] = self._states(layers, batch)
        if self.intent_head is not None or self.text_head is not None:
            read["pooled"] = pooled(layers, attention, shares=self.text_layers)
        if self.mean_layers:
            states = read["states"] if "states" in read else self._states(layers, batch)
            means = means_of_words(states, batch["lengths"], layers=self.mean_layers)
            read["pooled"] = torch.cat((read["pooled"], means), dim=1)
        return read

    def _states(self, layers: Sequence[Tensor], batch: Batch) -> Tensor:
        """(B, T, n d), of the words."""
        if self.word_layers is None:
            return first_sub_words(layers, batch["first"])
        return words(layers, batch["first"], batch["last"], shares=self.word_layers)

    def per_example_loss(self, batch: Batch) -> Tensor:
        """(B,) losses; see `intent_slot_loss`."""
        return intent_slot_loss(self(batch), batch)


def intent_slot_loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Cross-entropy of the intent plus the mean, over the example's own words, of the tags'.

    Where there is a chain, that of a tag is given the true ones before it, so that the sum over the
    words is minus the log-likelihood of all of them; see `TagChain`. Either part is absent in a
    model without intents, or without slots.

    Not the mean over the words of the batch: then every example's scale would depend on the
    lengths of the others, and clipping would bound the effect of none.

    Returns:
        (B,) losses.
    """
    parts = []
    if outputs.intents is not None:
        parts.append(F.cross_entropy(outputs.intents, batch["intents"], reduction="none"))
    if (logits := outputs.tags_given(batch)) is not None:
        parts.append(_slot_loss(logits, batch["tags"]))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _slot_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """(B, T, L) logits, (B, T) tags -> (B,), the mean over each example's own words."""
    by_word = F.cross_entropy(logits.mT, tags, reduction="none", ignore_index=IGNORED_TAG)
    return by_word.sum(1) / (tags != IGNORED_TAG).sum(1).clamp(min=1)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model, all of which is on one; the CPU where it has no parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {field: values.to(device) for field, values in batch.items()}


class _BiLSTMLayer(nn.Module):
    """Two LSTMs; the second reads each example back from its own end, not from the padding's."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.ahead = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.back = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, 2H)."""
        ahead, _ = self.ahead(states)
        back, _ = self.back(_reversed(states, lengths))
        return torch.cat((ahead, _reversed(back, lengths)), dim=2)


class _CharacterCNN(nn.Module):
    """Characters of a word -> vector: embedding, convolution of width 3, maximum."""

    def __init__(self, filters: int, embedding_size: int = 25) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_CHARACTERS, embedding_size, padding_idx=0)
        self.convolution = nn.Conv1d(embedding_size, filters, 3, padding=1)

    def forward(self, characters: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, filters)."""
        batch, words, length = characters.shape
        embedded = self.embedding(characters.view(batch * words, length))
        found = torch.relu(self.convolution(embedded.mT))
        found = found.masked_fill((characters.view(batch * words, 1, length) == 0), 0.0)
        return found.amax(2).view(batch, words, -1)


def _present(lengths: Tensor, steps: int) -> Tensor:
    """(B, T): whether the example has that word."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def _mean(vectors: Tensor, present: Tensor) -> Tensor:
    """(B, T, d) -> (B, d), over the words that are there."""
    count = present.sum(1, keepdim=True).clamp(min=1)
    return vectors.masked_fill(~present[:, :, None], 0.0).sum(1) / count


def _reversed(states: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, d) with each example's words in reverse order; the padding stays where it is."""
    steps = torch.arange(states.shape[1], device=states.device)
    last = lengths[:, None] - 1
    source = torch.where(steps <= last, last - steps, steps)
    return states.gather(1, source[:, :, None].expand_as(states))
