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
LONGEST_TEXT = 128  # sub-words, likewise


@dataclass(frozen=True)
class Labels:
    """The label sets of a model, in the order of its outputs.

    Attributes:
        intents: empty for a model without intents.
        tags: IOB2 tags; empty for a model without slots.

    Raises:
        DataError: there are neither intents nor tags.
    """

    intents: tuple[str, ...]
    tags: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.intents and not self.tags:
            raise DataError("Expected intents or tags to learn, got neither; use labelled data.")

    def encode(self, example: Example) -> Encoded:
        """Labels as numbers. A tag that the model does not know is ignored in losses.

        Raises:
            DataError: the model does not know the intent, or the example has nothing that it
                learns.
        """
        encoded = {"intents": self._intent(example)} if self.intents else {}
        if not self.tags:
            return encoded
        if not self.intents and example.tags is None:
            raise DataError(
                f"Example {example.id}: expected slots, which are all that the model knows, got no "
                "tags; use data with tags."
            )
        tags = example.tags or ("O",) * len(example.tokens)
        numbers = [self._tag_ids.get(tag, IGNORED_TAG) for tag in tags]
        return encoded | {"tags": torch.tensor(numbers)}

    def _intent(self, example: Example) -> Tensor:
        if example.intent not in self._intent_ids:
            found = "none" if example.intent is None else f"'{example.intent}'"
            raise DataError(
                f"Example {example.id}: expected one of the {len(self.intents)} intents of the "
                f"model, got {found}; use data with the labels it was trained for."
            )
        return torch.tensor(self._intent_ids[example.intent])

    @cached_property
    def _intent_ids(self) -> dict[str | None, int]:
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

    def read(self, tokens: Sequence[str]) -> Encoded:
        """The tensors of a text without labels, all of which is read.

        Raises:
            DataError: the text is longer than the model reads.
        """

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """Pad and stack examples into a batch; its fields are listed in `dpnlu.nlu.models`."""


@dataclass(frozen=True)
class WordEncoding:
    """For `BiLSTMClassifier`: word ids and, if asked for, the bytes of each word.

    Attributes:
        redact_digits: read every digit as 0.
    """

    labels: Labels
    vocabulary: Vocabulary
    characters: bool = False
    redact_digits: bool = False

    def encode(self, example: Example) -> Encoded:
        return self.read(example.tokens) | self.labels.encode(example)

    def read(self, tokens: Sequence[str]) -> Encoded:
        if self.redact_digits:
            tokens = without_digits(tokens)
        encoded = {
            "words": torch.tensor(self.vocabulary.encode(tokens)),
            "lengths": torch.tensor(len(tokens)),
        }
        if self.characters:
            encoded["characters"] = _bytes(tokens)
        return encoded

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        return _padded(encoded, {})


@dataclass(frozen=True)
class SubwordEncoding:
    """For `EncoderClassifier`: the sub-words of a Hugging Face tokenizer.

    Of a word without a sub-word of its own, or past the cut, `last` is -1, and `first` is until it
    is collated.

    Attributes:
        longest: sub-words of a text, special ones included, at which it is cut off in training.
        redact_digits: read every digit as 0.
    """

    labels: Labels
    tokenizer: Any
    longest: int = LONGEST_TEXT
    redact_digits: bool = False

    def encode(self, example: Example) -> Encoded:
        encoded = self._subwords(example.tokens, truncation=True, max_length=self.longest)
        labels = self.labels.encode(example)
        if "tags" in labels:  # there is none to predict where there is no sub-word
            labels["tags"] = torch.where(encoded["first"] >= 0, labels["tags"], IGNORED_TAG)
        return encoded | labels

    def read(self, tokens: Sequence[str]) -> Encoded:
        encoded = self._subwords(tokens, truncation=False, max_length=None)
        if (length := len(encoded["subwords"])) > self.longest:
            raise DataError(
                f"Expected a text of at most {self.longest} sub-words, which is what the model "
                f"reads, got {length}; cut the text into shorter ones."
            )
        return encoded

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        batch = _padded(encoded, {"subwords": self.tokenizer.pad_token_id, "last": -1})
        if "first" in batch:  # a frozen encoder's examples have been read already
            batch["first"] = batch["first"].clamp(min=0)
        return batch

    def _subwords(
        self, tokens: Sequence[str], *, truncation: bool, max_length: int | None
    ) -> Encoded:
        if self.redact_digits:
            tokens = without_digits(tokens)
        found = self.tokenizer(
            list(tokens),
            is_split_into_words=True,
            truncation=truncation,
            max_length=max_length,
            verbose=False,
        )
        words = found.word_ids()
        last = {word: place for place, word in enumerate(words)}
        first = {word: place for place, word in reversed(list(enumerate(words)))}
        return {
            "subwords": torch.tensor(found["input_ids"]),
            "attention": torch.tensor(found["attention_mask"]),
            "first": torch.tensor([first.get(word, -1) for word in range(len(tokens))]),
            "last": torch.tensor([last.get(word, -1) for word in range(len(tokens))]),
            "lengths": torch.tensor(len(tokens)),
        }


def without_digits(tokens: Sequence[str]) -> list[str]:
    """The tokens with 0 for every digit of any script: where numbers stand is kept, and how long
    they are, but not which.

    >>> without_digits(["call", "555-0199"])
    ['call', '000-0000']
    """
    return ["".join("0" if char.isdigit() else char for char in token) for token in tokens]


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
