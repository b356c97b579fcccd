"""Repeated texts against a naive count, and against the published table."""

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnlu.nlu.data import (
    Corpus,
    DataError,
    Example,
    drop_repeated,
    duplicate_groups,
    load_corpus,
    normalized,
)

TEXTS = [
    "red",
    "Red",
    " red ",
    "blue",
    "blue .",
    "BLUE.",
    "green",
    "grey",
    "white",
    "black",
    "pink",
]
# They make every list of rows a corpus, before and after rows are dropped.
ANCHORS = [("one", "warm", "train"), ("two", "cold", "train"), ("three", "warm", "test")]
ROWS = st.lists(
    st.tuples(
        st.sampled_from(TEXTS),
        st.sampled_from(["warm", "cold"]),
        st.sampled_from(["train", "train", "valid", "test"]),
    ),
    max_size=12,
).map(lambda rows: ANCHORS + rows)


def corpus_of(rows: list[tuple[str, str, str]]) -> Corpus:
    """Return the corpus of (text, intent, split) rows; full stops are no tokens."""
    examples = tuple(
        Example(
            id=f"{split}-{position:05d}",
            text=text,
            tokens=tuple(text.replace(".", " ").split()),
            tags=None,
            intent=intent,
            split=split,
        )
        for position, (text, intent, split) in enumerate(rows)
    )
    return Corpus(name="colours", examples=examples)


def same(one: Example, other: Example) -> bool:
    """Whether two examples have one text or one token sequence."""
    tokens = [tuple(token.lower() for token in row.tokens) for row in (one, other)]
    return normalized(one.text) == normalized(other.text) or tokens[0] == tokens[1]


@given(ROWS)
def test_no_text_of_train_is_left_twice_or_held_out(rows: list[tuple[str, str, str]]) -> None:
    corpus = corpus_of(rows)
    reduced, report = drop_repeated(corpus)
    train = reduced.split("train")
    held_out = reduced.split("valid") + reduced.split("test")
    assert not any(same(one, other) for one, other in combinations(train, 2))
    assert not any(same(one, other) for one in train for other in held_out)
    assert held_out == corpus.split("valid") + corpus.split("test")
    assert report.dropped_train_rows == len(corpus.examples) - len(reduced.examples)
    # Nothing goes without need: each dropped row meets a held-out row or an earlier one.
    for row in set(corpus.split("train")) - set(train):
        earlier = [other for other in corpus.split("train") if other.id < row.id]
        assert any(same(row, other) for other in [*earlier, *held_out])


@given(ROWS)
def test_counts_agree_with_naive_ones(rows: list[tuple[str, str, str]]) -> None:
    _, report = drop_repeated(corpus_of(rows))
    keys = [(" ".join(text.lower().split()), intent, split) for text, intent, split in rows]
    texts = sorted({key[0] for key in keys})
    train = [key[0] for key in keys if key[2] == "train"]
    valid = [key[0] for key in keys if key[2] == "valid"]
    intents = [{key[1] for key in keys if key[0] == text} for text in texts]
    assert report.rows == len(rows)
    assert report.distinct_texts == len(texts)
    assert report.repeated_rows == len(rows) - len(texts)
    assert report.texts_in_train_and_valid == sum(text in train and text in valid for text in texts)
    assert report.test_rows_in_train == sum(key[0] in train for key in keys if key[2] == "test")
    assert report.texts_with_several_intents == sum(len(group) > 1 for group in intents)


def test_groups_hold_all_examples_of_a_text_in_order() -> None:
    rows = [("red", "warm"), ("blue", "cold"), ("RED", "warm"), ("grey", "cold"), (" red", "cold")]
    examples = corpus_of([(*row, "train") for row in rows] + [("blue", "cold", "test")]).examples
    ids = [[row.id for row in group] for group in duplicate_groups(examples)]
    assert ids == [["train-00000", "train-00002", "train-00004"], ["train-00001", "test-00005"]]


def test_a_corpus_made_of_repeats_is_refused() -> None:
    rows = [("red", "warm", "train"), ("blue", "cold", "train"), ("red", "warm", "test")]
    with pytest.raises(DataError, match="two intents in train"):
        drop_repeated(corpus_of(rows))


# From the table of repeated texts that accompanies the data.
PUBLISHED = {
    "snips": (14_262, 222, 9, 23, 0),
    "hwu64": (11_033, 3, 0, 0, 0),
    "clinc150": (23_695, 5, 3, 2, 4),
    "evi_en": (8_784, 3_460, 132, 184, 14),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_the_published_table(name: str, real_data: Path) -> None:
    _, report = drop_repeated(load_corpus(str(real_data / name / f"{name}.jsonl.gz")))
    counts = (
        report.distinct_texts,
        report.repeated_rows,
        report.texts_in_train_and_valid,
        report.test_rows_in_train,
        report.texts_with_several_intents,
    )
    assert counts == PUBLISHED[name]
