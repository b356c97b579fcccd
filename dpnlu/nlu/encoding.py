"""Examples to batches of tensors, as the models of `dpnlu.nlu.models` expect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpnlu.nlu.data import DataError, Example, Vocabulary
from dpnlu.nlu.models import IGNORED_TAG, Batch

# One example's tensors, without the batch dimension.
Encoded = dict[str, Tensor]

_LONGEST_WORD = 20  # bytes; the rest is cut off
_LONGEST_TEXT = 128  # sub-words, likewise


@dataclass(frozen=True)
class Labels:
    """The label sets of a model, in the order of its outputs.

    Attributes:
        intents: at least two.
        tags: IOB2 tags; empty for a model without slots.
    """

    intents: tuple[str, ...]
    tags: tuple[str, ...]

    def encode(self, example: Example) -> Encoded:
        """Labels as numbers. A tag that the model does not know is ignored in losses.

        Raises:
            DataError: the model does not know the intent.
        """
        if example.intent not in self._intent_ids:
            raise DataError(
                f"Example {example.id}: expected one of the {len(self.intents)} intents of the "
                f"model, got '{example.intent}'; use data with the labels it was trained for."
            )
        intent = {"intents": torch.tensor(self._intent_ids[example.intent])}
        if not self.tags:
            return intent
        tags = example.tags or ("O",) * len(example.tokens)
        numbers = [self._tag_ids.get(tag, IGNORED_TAG) for tag in tags]
        return intent | {"tags": torch.tensor(numbers)}

    @cached_property
    def _intent_ids(self) -> dict[str, int]:
        return {intent: number for number, intent in enumerate(self.intents)}

    @cached_property
    def _tag_ids(self) -> dict[str, int]:
        return {tag: number for number, tag in enumerate(self.tags)}


class Encoding(Protocol):
    """How one model reads examples."""

    @property
    def labels(self) -> Labels: ...

    def encode(self, example: Example) -> Encoded:
        """One example's tensors."""

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad and stack examples into a batch; its fields are listed in `dpnlu.nlu.models`."""


@dataclass(frozen=True)
class WordEncoding:
    """For `BiLSTMClassifier`: word ids and, if asked for, the bytes of each word."""

    labels: Labels
    vocabulary: Vocabulary
    characters: bool = False

    def encode(self, example: Example) -> Encoded:
        encoded = {
            "words": torch.tensor(self.vocabulary.encode(example.tokens)),
            "lengths": torch.tensor(len(example.tokens)),
        }
        if self.characters:
            encoded["characters"] = _bytes(example.tokens)
        return encoded | self.labels.encode(example)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return _padded(encoded, {})


@dataclass(frozen=True)
class SubwordEncoding:
    """For `EncoderClassifier`: the sub-words of a Hugging Face tokenizer."""

    labels: Labels
    tokenizer: Any

    def encode(self, example: Example) -> Encoded:
        found = self.tokenizer(
            list(example.tokens),
            is_split_into_words=True,
            truncation=True,
            max_length=_LONGEST_TEXT,
        )
        words = found.word_ids()
        first = {word: place for place, word in reversed(list(enumerate(words)))}
        # A word without a sub-word of its own, or past the cut, has no tag to predict.
        places = [first.get(word, -1) for word in range(len(example.tokens))]
        encoded = self.labels.encode(example)
        if "tags" in encoded:
            known = torch.tensor(places) >= 0
            encoded["tags"] = torch.where(known, encoded["tags"], IGNORED_TAG)
        return encoded | {
            "subwords": torch.tensor(found["input_ids"]),
            "attention": torch.tensor(found["attention_mask"]),
            "first": torch.tensor(places).clamp(min=0),
            "lengths": torch.tensor(len(example.tokens)),
        }

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return _padded(encoded, {"subwords": self.tokenizer.pad_token_id})


def encode_all(encoding: Encoding, examples: Sequence[Example]) -> list[Encoded]:
    """The tensors of every example, in order."""
    return [encoding.encode(example) for example in examples]


def batches(encoding: Encoding, encoded: Sequence[Encoded], *, size: int) -> list[Batch]:
    """Everything in order, in batches of at most `size` examples."""
    starts = range(0, len(encoded), size)
    return [encoding.collate(encoded[start : start + size]) for start in starts]


def _padded(encoded: Sequence[Encoded], padding: dict[str, int]) -> Batch:
    padding = {"tags": IGNORED_TAG} | padding
    return {
        field: _stacked([example[field] for example in encoded], padding.get(field, 0))
        for field in encoded[0]
    }


def _stacked(values: list[Tensor], padding: int) -> Tensor:
    if values[0].dim() == 0:
        return torch.stack(values)
    return pad_sequence(values, batch_first=True, padding_value=padding)


def _bytes(tokens: Sequence[str]) -> Tensor:
    """(T, longest word) bytes + 1, 0 past a word's end; every word has the same room."""
    rows = torch.zeros(len(tokens), _LONGEST_WORD, dtype=torch.long)
    for row, token in zip(rows, tokens, strict=True):
        content = token.encode("utf-8", "surrogatepass")[:_LONGEST_WORD]
        row[: len(content)] = torch.tensor(list(content)) + 1
    return rows
