"""The mapping from tokens to ids. It is released with the model, so where it comes from matters.

Id 0 is padding and ids 1 to 10 are the digits 0 to 9 in every vocabulary, so that numbers spelled
digit by digit never share an id. Tokens are compared lower-cased, in Unicode's composed form.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

from dpnlu.nlu.data.errors import DataError, located
from dpnlu.nlu.data.reading import read_lines
from dpnlu.nlu.data.records import Example

PADDING_ID = 0
DIGIT_IDS = {digit: 1 + value for value, digit in enumerate("0123456789")}
RESERVED = 1 + len(DIGIT_IDS)
UNKNOWN_ID = RESERVED
DEFAULT_BUCKETS = 32_768


class Vocabulary(Protocol):
    """What a model needs to know of its vocabulary."""

    @property
    def size(self) -> int:
        """Number of ids, padding included: the rows of the embedding."""
        ...

    @property
    def is_public(self) -> bool:
        """Whether no private text was read to make it. If not, ε does not cover it."""
        ...

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Return one id in [1, size) per token."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return a form that JSON can hold; `vocabulary_from_dict` reads it."""
        ...


@dataclass(frozen=True, slots=True)
class HashedVocabulary:
    """Every token falls into one of `buckets` ids by a fixed hash; nothing is read from data.

    The id of a token is the same on every machine and in every Python. Digits have ids of their
    own; other tokens may share one, the more the fewer buckets there are.

    Attributes:
        buckets: Number of ids for tokens that are not digits; at least 1.

    Raises:
        DataError: `buckets` is not positive.
    """

    buckets: int = DEFAULT_BUCKETS

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise DataError(
                f"Expected at least 1 bucket, got {self.buckets}; use a positive number."
            )

    @property
    def size(self) -> int:
        """Number of ids, padding and digits included."""
        return RESERVED + self.buckets

    @property
    def is_public(self) -> bool:
        """Always True: it is made without data."""
        return True

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Return one id in [1, size) per token."""
        return [self._id(normalized_token(token)) for token in tokens]

    def to_dict(self) -> dict[str, object]:
        """Return a form that JSON can hold."""
        return {"kind": "hashed", "buckets": self.buckets}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Return the vocabulary that `to_dict` described.

        Raises:
            DataError: `data` is not such a description.
        """
        match data:
            case {"kind": "hashed", "buckets": int(buckets)}:
                return cls(buckets)
            case _:
                raise DataError(_not_a_description("hashed", data))

    def _id(self, token: str) -> int:
        """Return the id of a normalised token."""
        if token in DIGIT_IDS:
            return DIGIT_IDS[token]
        # surrogatepass: JSON can smuggle in half a surrogate pair, which UTF-8 would refuse.
        digest = hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return RESERVED + int.from_bytes(digest, "big") % self.buckets


@dataclass(frozen=True, kw_only=True)
class WordList:
    """An id for each listed word, and one id for all others.

    Attributes:
        words: Different words in the form of `normalized_token`, digits left out.
        is_public: Whether the words come from a public source. If they come from private texts,
            every rare word in the list is released as it is, without noise, and ε says nothing
            about that.

    Raises:
        DataError: there are no words, or one is repeated, not normalised or a digit.
    """

    words: tuple[str, ...]
    is_public: bool

    def __post_init__(self) -> None:
        if not self.words:
            raise DataError("Expected at least one word, got none; list the words to know.")
        for word, count in Counter(self.words).items():
            if count > 1 or word in DIGIT_IDS or not word or word != normalized_token(word):
                raise DataError(
                    f"Expected different lower-case words without single digits, got '{word}' "
                    f"{count} times; clean the list."
                )

    @property
    def size(self) -> int:
        """Number of ids: padding, digits, unknown and the words."""
        return RESERVED + 1 + len(self.words)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Return one id in [1, size) per token; words not listed share `UNKNOWN_ID`."""
        return [self._ids.get(normalized_token(token), UNKNOWN_ID) for token in tokens]

    def to_dict(self) -> dict[str, object]:
        """Return a form that JSON can hold."""
        return {"kind": "words", "words": list(self.words), "is_public": self.is_public}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Return the vocabulary that `to_dict` described.

        Raises:
            DataError: `data` is not such a description.
        """
        match data:
            case {"kind": "words", "words": [*words], "is_public": bool(is_public)} if all(
                isinstance(word, str) for word in words
            ):
                return cls(words=tuple(map(str, words)), is_public=is_public)
            case _:
                raise DataError(_not_a_description("words", data))

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each word and digit."""
        return DIGIT_IDS | {word: UNKNOWN_ID + 1 + place for place, word in enumerate(self.words)}


def read_word_list(path: Path) -> WordList:
    """Return the vocabulary of a public word file: UTF-8, one word per line.

    Words are normalised; repeated words, digits and empty lines are passed over.

    Raises:
        DataError: the file cannot be read or holds no word.
    """
    words = dict.fromkeys(normalized_token(line.strip()) for line in read_lines(path))
    with located(str(path)):
        return WordList(words=_listable(words), is_public=True)


def fitted_vocabulary(examples: Iterable[Example], *, min_count: int = 1) -> WordList:
    """Return the words that occur at least `min_count` times in `examples`. Not public.

    Warning: these words are read from the texts and released without noise. A name that one
    customer wrote once ends up in the model's folder in plain sight, whatever ε is. Use it to
    compare, or where the texts are public anyway.

    Args:
        examples: The training examples.
        min_count: Least number of occurrences; at least 1. A high one hides rare words better,
            but gives no guarantee.

    Returns:
        The words in alphabetical order (their frequencies are not released), `is_public` False.

    Raises:
        DataError: `min_count` is below 1, or no word is frequent enough.
    """
    if min_count < 1:
        raise DataError(
            f"Expected min_count of at least 1, got {min_count}; it counts occurrences."
        )
    counts = Counter(normalized_token(token) for example in examples for token in example.tokens)
    frequent = sorted(word for word, count in counts.items() if count >= min_count)
    return WordList(words=_listable(frequent), is_public=False)


def vocabulary_from_dict(data: Mapping[str, object]) -> HashedVocabulary | WordList:
    """Return the vocabulary that the `to_dict` of any kind described.

    Raises:
        DataError: `data` is of no known kind, or damaged.
    """
    if data.get("kind") == "hashed":
        return HashedVocabulary.from_dict(data)
    return WordList.from_dict(data)


def normalized_token(token: str) -> str:
    """Return the form in which tokens are compared: lower case, composed characters."""
    return unicodedata.normalize("NFC", token.lower())


def _listable(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words that a list may hold: not blank, not a digit."""
    return tuple(word for word in words if word and word not in DIGIT_IDS)


def _not_a_description(kind: str, data: Mapping[str, object]) -> str:
    """Return the message for a dictionary that describes no vocabulary of this kind."""
    return (
        f"Expected the description of a vocabulary of kind '{kind}', got the keys "
        f"{', '.join(map(str, data))}; use what to_dict returned."
    )
