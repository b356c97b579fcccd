"""Token ids: stable, in range, and honest about where words come from."""

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnlu.nlu.data import (
    DataError,
    HashedVocabulary,
    Vocabulary,
    WordList,
    fitted_vocabulary,
    read_word_list,
    synthetic_corpus,
    vocabulary_from_dict,
)
from dpnlu.nlu.data.vocabulary import UNKNOWN_ID, normalized_token

WORDS = WordList(words=("dvořák", "play", "42"), is_public=True)
VOCABULARIES: list[Vocabulary] = [
    HashedVocabulary(1),
    HashedVocabulary(7),
    HashedVocabulary(),
    WORDS,
    fitted_vocabulary(synthetic_corpus(20).examples),
]
TOKENS = st.lists(st.text(min_size=1) | st.sampled_from(["7", "play", "Dvořák", "\ud83c"]))


every_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES)


@every_vocabulary
@given(tokens=TOKENS)
def test_ids_are_in_range_and_never_padding(vocabulary: Vocabulary, tokens: list[str]) -> None:
    ids = vocabulary.encode(tokens)
    assert len(ids) == len(tokens)
    assert all(0 < token_id < vocabulary.size for token_id in ids)


@every_vocabulary
@given(tokens=TOKENS)
def test_case_and_composition_do_not_matter(vocabulary: Vocabulary, tokens: list[str]) -> None:
    composed = [normalized_token(token) for token in tokens]
    assert vocabulary.encode(composed) == vocabulary.encode(tokens)
    assert vocabulary.encode(["DVOŘÁK"]) == vocabulary.encode(
        [unicodedata.normalize("NFD", "dvořák")]
    )


@every_vocabulary
def test_digits_share_their_ids_with_nothing(vocabulary: Vocabulary) -> None:
    digits = vocabulary.encode("0123456789")
    others = vocabulary.encode(["play", "42", "dvořák", "zero", "07", *map(str, range(10, 500))])
    assert digits == list(range(1, 11))
    assert not set(digits) & set(others)


@every_vocabulary
def test_vocabularies_survive_json(vocabulary: Vocabulary) -> None:
    read = vocabulary_from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert read == vocabulary
    assert read.is_public == vocabulary.is_public


def test_hashed_ids_follow_the_stated_hash() -> None:
    digest = hashlib.blake2b("dvořák".encode(), digest_size=8).digest()
    assert HashedVocabulary(1000).encode(["Dvořák"]) == [11 + int.from_bytes(digest, "big") % 1000]


def test_hashed_words_spread_evenly_over_the_buckets() -> None:
    vocabulary = HashedVocabulary(16)
    ids = vocabulary.encode(f"w{n}" for n in range(16_000))
    # 1000 are expected in each; six standard deviations of a binomial count are about 184.
    assert all(abs(ids.count(11 + bucket) - 1000) < 184 for bucket in range(16))


def test_listed_words_have_ids_of_their_own_and_others_share_one() -> None:
    assert WORDS.encode(["Dvořák", "play", "42", "stop", "43"]) == [
        *(UNKNOWN_ID + 1, UNKNOWN_ID + 2, UNKNOWN_ID + 3),
        *(UNKNOWN_ID, UNKNOWN_ID),
    ]
    assert WORDS.size == UNKNOWN_ID + 4


def test_only_words_from_private_texts_are_not_public() -> None:
    assert HashedVocabulary().is_public
    assert WORDS.is_public
    assert not fitted_vocabulary(synthetic_corpus(20).examples).is_public


@pytest.mark.parametrize("min_count", [1, 2, 5])
def test_fitted_words_are_the_frequent_ones(min_count: int) -> None:
    examples = synthetic_corpus(60).examples
    tokens = [token.lower() for row in examples for token in row.tokens]
    frequent = {token for token in tokens if tokens.count(token) >= min_count}
    vocabulary = fitted_vocabulary(examples, min_count=min_count)
    assert vocabulary.words == tuple(sorted(frequent - set("0123456789")))


def test_word_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Play\n\nplay\n 7\nDvořák\n", encoding="utf-8")
    vocabulary = read_word_list(path)
    assert vocabulary == WordList(words=("play", "dvořák"), is_public=True)


def test_a_word_file_without_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n7\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"words\.txt: Expected at least one word"):
        read_word_list(path)
    with pytest.raises(DataError, match="expected a readable file"):
        read_word_list(tmp_path / "none")


@pytest.mark.parametrize("words", [(), ("a", "a"), ("A",), ("7",), ("",)])
def test_words_that_no_list_may_hold(words: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="Expected"):
        WordList(words=words, is_public=True)


def test_bounds_of_numbers() -> None:
    with pytest.raises(DataError, match="at least 1 bucket, got 0"):
        HashedVocabulary(0)
    with pytest.raises(DataError, match="min_count of at least 1, got 0"):
        fitted_vocabulary(synthetic_corpus(20).examples, min_count=0)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "hashed"},
        {"kind": "hashed", "buckets": "9"},
        {"kind": "words", "words": ["a"]},
        {"kind": "words", "words": "a", "is_public": True},
        {"kind": "words", "words": [1], "is_public": True},
        {"kind": "other", "words": ["a"], "is_public": True},
    ],
)
def test_damaged_descriptions(data: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="description of a vocabulary"):
        vocabulary_from_dict(data)
