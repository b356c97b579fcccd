"""HWU64 in its three forms."""

import gzip
import json
from pathlib import Path

import pytest

from dpnlu.nlu.data import Corpus, DataError, load_corpus, load_hwu64
from dpnlu.nlu.data.assembly import drawn_split
from dpnlu.nlu.data.records import SPLITS

FOLD_HEADER = "answerid;scenario;intent;answer_annotation;answer_from_anno;answer_from_user\n"
FULL_HEADER = (
    "userid;answerid;scenario;intent;status;answer_annotation;notes;suggested_entities;"
    "answer_normalised;answer;question\n"
)
TRAIN = "KFold_1_trainset.csv"
TEST = "KFold_1_testset.csv"
FULL = "NLU-Data-Home-Domain-Annotated-All.csv"


def write_folds(folder: Path, *, train: str = "") -> Path:
    """Write both tables of fold 1; `train` goes behind 60 good rows."""
    rows = "".join(
        f'{n};alarm;{"set" if n % 2 else "query"};"wake me [time : at {n}] ""now""";x;x\n'
        for n in range(60)
    )
    (folder / TRAIN).write_text(FOLD_HEADER + rows + train, encoding="utf-8")
    test = 'null;iot;hue_lightoff;"lights off";x;x\n'
    (folder / TEST).write_text(FOLD_HEADER + test, encoding="utf-8")
    return folder


def test_folds(tmp_path: Path) -> None:
    corpus = load_corpus(f"hwu64:{write_folds(tmp_path)}")
    first = min(corpus.split("train"), key=lambda row: row.id)
    assert first.text == 'wake me at 0 "now"'
    assert first.tokens == ("wake", "me", "at", "0", '"', "now", '"')
    assert first.tags == ("O", "O", "B-time", "I-time", "O", "O", "O")
    assert corpus.intents == ("alarm_query", "alarm_set", "iot_hue_lightoff")
    assert [row.text for row in corpus.split("test")] == ["lights off"]
    for split in ("train", "valid"):
        rows = corpus.split(split)
        assert rows
        assert all((drawn_split(row.text) == "valid") == (split == "valid") for row in rows)


def test_full_table(tmp_path: Path) -> None:
    rows = "".join(
        f'{n % 7};{n};alarm;{"set" if n % 2 else "query"};;"wake me [time : at {n}]";;;x;x;q\n'
        for n in range(100)
    )
    left_out = '1;1;alarm;set;IRR_XR;"nonsense";;;x;x;q\n1;1;alarm;set;;;;;;;q\n'
    (tmp_path / FULL).write_text(FULL_HEADER + left_out + rows, encoding="utf-8")
    corpus = load_hwu64(tmp_path)
    assert len(corpus.examples) == 100
    assert all(row.split == drawn_split(row.text) for row in corpus.examples)
    assert [row.user for row in corpus.examples] == [str(n % 7) for n in range(100)]
    assert corpus.slots == ("time",)


def test_folds_go_before_the_uniform_file_and_that_before_the_full_table(tmp_path: Path) -> None:
    (tmp_path / FULL).write_text("", encoding="utf-8")
    splits = ("train", "train", "test")
    lines = [
        json.dumps({"text": f"say {n}", "intent": f"i{n % 2}", "split": split, "fold": 1})
        for n, split in enumerate(splits)
    ]
    (tmp_path / "hwu64.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert len(load_hwu64(tmp_path).examples) == 3
    assert load_hwu64(tmp_path).name == "hwu64"
    assert len(load_hwu64(write_folds(tmp_path)).examples) == 61


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1;alarm;set;x\n", "expected 6 fields as in the header, got 4"),
        ('1;alarm;set;"";x;x\n', "non-empty text"),
        ('1;alarm;set;"[time : ]";x;x\n', "non-empty text"),
        ('1;alarm;set;"open;x;x\n', "expected a row of fields"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_hwu64(write_folds(tmp_path, train=row))
    assert str(caught.value).startswith(f"{tmp_path / TRAIN}, line 62: ")
    assert message in str(caught.value)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (write_folds(tmp_path) / TEST).write_text("scenario;intent\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"{TEST}, line 1: .*add answer_annotation"):
        load_hwu64(tmp_path)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    (write_folds(tmp_path) / TEST).unlink()
    with pytest.raises(DataError, match=rf"{TEST}: expected a readable file"):
        load_hwu64(tmp_path)


def test_a_folder_without_any_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected one of KFold.*got none"):
        load_hwu64(tmp_path)


def content(corpus: Corpus, split: str) -> list[tuple[object, ...]]:
    """Return what the rows of a split hold."""
    return [(row.id, row.text, row.tokens, row.tags, row.intent) for row in corpus.split(split)]


def test_published_tables_equal_the_uniform_file(real_data: Path) -> None:
    corpus = load_corpus(f"hwu64:{real_data / 'hwu64'}")
    uniform = load_corpus(str(real_data / "hwu64" / "hwu64.jsonl.gz"))
    for split in SPLITS:
        assert content(corpus, split) == content(uniform, split)
    assert (len(corpus.intents), len(corpus.slots)) == (64, 54)


def test_every_published_tag_can_be_encoded(real_data: Path) -> None:
    corpus = load_corpus(f"hwu64:{real_data / 'hwu64'}")
    used = {
        split: {tag for row in corpus.split(split) for tag in row.tags or ()} for split in SPLITS
    }
    held_out = used["valid"] | used["test"]
    assert held_out - used["train"] == {"I-transport_type"}
    assert held_out | used["train"] <= set(corpus.tags)
