"""Data sets read by `datasets`, from local folders: nothing is fetched."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpnlu.nlu.data import DataError, load_corpus, load_hub
from dpnlu.nlu.data.assembly import drawn_split

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's folders."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def texts(count: int, *, prefix: str) -> list[dict[str, Any]]:
    """Return rows of two intents."""
    return [{"text": f"{prefix} {n}", "label": f"i{n % 2}"} for n in range(count)]


def write_parquet(folder: Path, features: dict[str, Any], **splits: list[dict[str, Any]]) -> Path:
    """Write splits whose features declare their labels."""
    folder.mkdir()
    for split, rows in splits.items():
        data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        data.to_parquet(folder / f"{split}.parquet")
    return folder


def test_declared_labels_are_decoded_and_kept(tmp_path: Path) -> None:
    features = {
        "tokens": datasets.Sequence(datasets.Value("string")),
        "ner_tags": datasets.Sequence(
            datasets.ClassLabel(names=["O", "I-city", "B-city", "B-day"])
        ),
        "intent": datasets.ClassLabel(names=["weather", "alarm", "never"]),
        "speaker_id": datasets.Value("int64"),
        "group": datasets.ClassLabel(names=["north", "south"]),
    }
    rows = [
        {"tokens": ["In", "New", "York"], "ner_tags": [0, 1, 1], "intent": 0, "speaker_id": 4}
        | {"group": 1},
        {"tokens": ["wake", "me"], "ner_tags": [0, 0], "intent": 1, "speaker_id": None}
        | {"group": None},
    ]
    folder = write_parquet(tmp_path / "d", features, train=rows, validation=rows, test=rows)
    corpus = load_corpus(f"hf:{folder}")
    assert len(corpus.examples) == 6
    first, second = corpus.split("train")
    assert (first.text, first.tokens) == ("In New York", ("In", "New", "York"))
    assert first.tags == ("O", "B-city", "I-city")
    assert (first.intent, second.intent) == ("weather", "alarm")
    assert (first.user, second.user) == ("4", None)
    assert (first.group, second.group) == ("south", None)
    assert corpus.declared_intents == ("weather", "alarm", "never")
    assert corpus.declared_slots == ("city", "day")
    assert corpus.labels_are_public


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["north", None], ["north", None]),
        ([3, 4], ["3", "4"]),
        ([[1], [2]], "train row 1: expected a string as group, got list"),
        ([0.5, 1.5], "train row 1: expected a string as group, got float"),
        (["north", " "], "train row 2: Example train-00001: expected a non-empty group"),
    ],
)
def test_a_group_is_a_name(tmp_path: Path, values: list[Any], expected: Any) -> None:
    splits = {
        split: [
            {"text": f"{split} {n}", "intent": f"i{n}", "group": value}
            for n, value in enumerate(values)
        ]
        for split in ("train", "validation", "test")
    }
    folder = tmp_path / "d"
    folder.mkdir()
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            load_hub(str(folder))
        return
    assert [row.group for row in load_hub(str(folder)).split("test")] == expected


def test_labels_written_as_text_are_not_declared(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "train.csv", texts(60, prefix="say"))
    write_csv(tmp_path / "d" / "test.csv", texts(4, prefix="tell"))
    corpus = load_hub(str(tmp_path / "d"))
    assert corpus.declared_intents is corpus.declared_slots is None
    assert [row.intent for row in corpus.split("test")] == ["i0", "i1", "i0", "i1"]
    # Without a validation split a tenth of train is drawn.
    assert corpus.split("valid")
    assert all(drawn_split(row.text) == "valid" for row in corpus.split("valid"))
    assert len(corpus.split("valid")) + len(corpus.split("train")) == 60


def test_validation_becomes_test_where_there_is_none(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "train.csv", texts(60, prefix="say"))
    write_csv(tmp_path / "d" / "validation.csv", texts(4, prefix="tell"))
    corpus = load_hub(str(tmp_path / "d"))
    assert [row.text for row in corpus.split("test")] == [f"tell {n}" for n in range(4)]
    assert corpus.split("valid")


def test_test_rows_without_labels_are_left_out(tmp_path: Path) -> None:
    features = {
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    }
    rows = [{"sentence": f"say {n}", "label": n % 2} for n in range(60)]
    withheld = [{"sentence": "tell", "label": -1}]
    folder = write_parquet(tmp_path / "d", features, train=rows, validation=rows[:3], test=withheld)
    corpus = load_hub(str(folder))
    assert [row.text for row in corpus.split("test")] == ["say 0", "say 1", "say 2"]


def test_one_split_is_drawn_80_10_10(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "data.csv", texts(100, prefix="say"))
    corpus = load_hub(str(tmp_path / "d"))
    assert all(row.split == drawn_split(row.text) for row in corpus.examples)
    assert len(corpus.examples) == 100


def test_inline_slots_and_a_column_with_splits(tmp_path: Path) -> None:
    lines = [
        {
            "utt": "x",
            "annot_utt": f"wake me at [time : {n} am]",
            "intent": f"i{n % 2}",
            "partition": p,
        }
        for n, p in enumerate(["train", "train", "dev", "test"])
    ]
    (tmp_path / "d").mkdir()
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "d" / "en-US.jsonl").write_text(text, encoding="utf-8")
    corpus = load_hub(str(tmp_path / "d"))
    assert corpus.examples[0].text == "wake me at 0 am"
    assert corpus.examples[0].tags == ("O", "O", "O", "B-time", "I-time")
    assert Counter(row.split for row in corpus.examples) == {"train": 2, "valid": 1, "test": 1}


def test_tags_in_one_string_belong_to_tokens_cut_at_blanks(tmp_path: Path) -> None:
    rows = [
        {"text": "wake me, now", "slots": "O O B-time", "intent": f"i{n}", "split": split}
        for n, split in enumerate(["train", "train", "test", "valid"])
    ]
    write_csv(tmp_path / "d" / "data.csv", rows)
    corpus = load_hub(str(tmp_path / "d"))
    assert corpus.examples[0].tokens == ("wake", "me,", "now")
    assert corpus.examples[0].tags == ("O", "O", "B-time")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "intent": "x"}, "row 3: expected a text and one intent"),
        ({"text": "x", "intent": None}, "row 3: expected a text and one intent"),
        ({"text": "x", "intent": "y", "tags": ["city"]}, "row 3: Example .*'city' at position 0"),
        ({"text": "x", "intent": "y", "tags": ["O", "O"]}, "row 3: Example .*2 tags for 1 tokens"),
        ({"text": "x", "intent": "y", "split": "exam"}, "row 3: .*got 'exam'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"text": "x", "intent": "z", "split": "train", "tags": ["O"]}
    rows = [good, good | {"split": "test"}, good | row]
    (tmp_path / "d").mkdir()
    text = "\n".join(json.dumps(line) for line in rows)
    (tmp_path / "d" / "data.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"^hf:.*, train {message}"):
        load_hub(str(tmp_path / "d"))


def test_texts_that_are_lists_are_refused(tmp_path: Path) -> None:
    features = {
        "text": datasets.Sequence(datasets.Value("string")),
        "intent": datasets.Value("string"),
    }
    folder = write_parquet(tmp_path / "d", features, train=[{"text": ["a", "b"], "intent": "x"}])
    with pytest.raises(DataError, match="train row 1: expected a string as text, got list"):
        load_hub(str(folder))


def test_a_split_that_is_a_list_is_refused(tmp_path: Path) -> None:
    features = {
        "text": datasets.Value("string"),
        "intent": datasets.Value("string"),
        "split": datasets.Sequence(datasets.Value("string")),
    }
    rows = [{"text": "x", "intent": "y", "split": [split]} for split in ("train", "test")]
    with pytest.raises(DataError, match=r"train row 1: expected a split of .*, got '\['train'\]'"):
        load_hub(str(write_parquet(tmp_path / "d", features, train=rows)))


@pytest.mark.parametrize("name", ["", ":", " :x", "::"])
def test_a_name_is_needed(name: str) -> None:
    with pytest.raises(DataError, match=r"expected hf:NAME\[:CONFIG\], got no name"):
        load_hub(name)


@pytest.mark.parametrize("error", [IndexError("list index"), KeyError("x"), TypeError("a\nb")])
def test_whatever_the_package_raises_is_told_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="expected a data set that can be loaded, got") as caught:
        load_hub("some/set")
    assert "\n" not in str(caught.value)


def test_several_intents_per_text_are_refused(tmp_path: Path) -> None:
    features = {
        "text": datasets.Value("string"),
        "intent": datasets.Sequence(datasets.Value("string")),
    }
    folder = write_parquet(tmp_path / "d", features, train=[{"text": "x", "intent": ["a", "b"]}])
    with pytest.raises(DataError, match="train row 1: expected a text and one intent"):
        load_hub(str(folder))


def test_a_label_outside_the_declared_ones_is_refused(tmp_path: Path) -> None:
    features = {
        "tokens": datasets.Sequence(datasets.Value("string")),
        "tags": datasets.Sequence(datasets.ClassLabel(names=["O"])),
        "intent": datasets.Value("string"),
    }
    rows = [{"tokens": ["x"], "tags": [tag], "intent": "y"} for tag in (0, -1)]
    folder = write_parquet(tmp_path / "d", features, train=rows)
    with pytest.raises(DataError, match="train row 2: expected tokens and tags as lists"):
        load_hub(str(folder))


def test_columns_that_are_not_found_are_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "train.csv", [{"body": "x", "label": "y"}])
    with pytest.raises(DataError, match=r"column named text or .* got body, label; rename"):
        load_hub(str(tmp_path / "d"))


def test_a_folder_without_data_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="expected a data set that can be loaded") as caught:
        load_hub(str(tmp_path / "d"))
    assert "\n" not in str(caught.value)


def test_an_unknown_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    write_csv(tmp_path / "d" / "train.csv", texts(3, prefix="say"))
    with pytest.raises(DataError, match="expected a data set that can be loaded") as caught:
        load_hub(f"{tmp_path / 'd'}:other")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'dpnlu\[hub\]'"):
        load_hub("some/set")
