"""Splits, ids and tokens given to a source's rows."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnlu.nlu.data import DataError
from dpnlu.nlu.data.assembly import SPLIT_NAMES, Row, assembled, drawn_split, with_drawn_valid


def rows(count: int, split: str | None = None) -> list[Row]:
    """Return different rows of two intents."""
    return [
        Row(place=f"row {number}", text=f"Say  {number}", intent=f"i{number % 2}", split=split)
        for number in range(count)
    ]


@given(st.text(min_size=1))
def test_a_split_is_drawn_by_the_published_rule(text: str) -> None:
    digest = hashlib.sha256(" ".join(text.lower().split()).encode("utf-8")).hexdigest()
    rest = int(digest[:8], 16) % 10
    assert drawn_split(text) == ("valid" if rest == 0 else "test" if rest == 1 else "train")


def test_drawn_splits_are_80_10_10_and_keep_equal_texts_together() -> None:
    corpus = assembled(rows(2000), name="n", source="s")
    sizes = Counter(example.split for example in corpus.examples)
    # Six standard deviations of a binomial count around the expectation.
    assert abs(sizes["valid"] - 200) < 80
    assert abs(sizes["test"] - 200) < 80
    assert drawn_split("SAY 7 ") == drawn_split("say  7")


def test_ids_are_positions_in_the_split_and_white_space_is_collapsed() -> None:
    given_rows = [*rows(2, "train"), *rows(1, "test"), *rows(1, "dev")]
    corpus = assembled(given_rows, name="n", source="s")
    assert [row.id for row in corpus.examples] == [
        "train-00000",
        "train-00001",
        "test-00000",
        "valid-00000",
    ]
    assert corpus.examples[1].text == "Say 1"
    assert corpus.examples[1].tokens == ("Say", "1")


def test_valid_is_drawn_from_train_only() -> None:
    moved = with_drawn_valid([*rows(300, "train"), *rows(300, "test")])
    before = [*rows(300, "train"), *rows(300, "test")]
    for row, old in zip(moved, before, strict=True):
        drawn = old.split == "train" and drawn_split(old.text) == "valid"
        assert row.split == ("valid" if drawn else old.split)
    assert 0 < sum(row.split == "valid" for row in moved) < 60


@pytest.mark.parametrize("name", SPLIT_NAMES)
def test_names_of_splits(name: str) -> None:
    corpus = assembled([*rows(2, "train"), *rows(1, "test"), *rows(3, name)], name="n", source="s")
    expected = Counter({"train": 2, "test": 1}) + Counter({SPLIT_NAMES[name]: 3})
    assert Counter(example.split for example in corpus.examples) == expected


def test_an_unknown_split_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"^row 0: expected a split of train.*got 'exam'"):
        assembled(rows(1, "exam"), name="n", source="s")


def test_splits_on_some_rows_only_are_refused() -> None:
    with pytest.raises(DataError, match=r"^row 0: expected a split on every row or on none"):
        assembled([*rows(2, "train"), *rows(1)], name="n", source="s")


def test_a_fault_of_the_whole_names_the_source() -> None:
    with pytest.raises(DataError, match=r"^folder/file: Corpus n: .*one row in test"):
        assembled(rows(2, "train"), name="n", source="folder/file")
