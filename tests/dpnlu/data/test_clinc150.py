"""CLINC150's JSON file."""

import json
from pathlib import Path

import pytest

from dpnlu.nlu.data import DataError, load_clinc150, load_corpus
from dpnlu.nlu.data.records import SPLITS

CONTENT = {
    "oos_train": [["who won", "oos"]],
    "train": [["Say 'hi'", "translate"], ["pay  it", "pay"]],
    "val": [["say yes", "translate"]],
    "test": [["pay me", "pay"]],
    "oos_test": [["a show", "oos"]],
}


def write(folder: Path, content: object) -> Path:
    """Write the file."""
    path = folder / "data_full.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_rows_out_of_scope_follow_those_in_scope(tmp_path: Path) -> None:
    corpus = load_corpus(f"clinc150:{write(tmp_path, CONTENT)}")
    rows = [(row.id, row.text, row.intent) for row in corpus.examples]
    assert rows == [
        ("train-00000", "Say 'hi'", "translate"),
        ("train-00001", "pay it", "pay"),
        ("train-00002", "who won", "oos"),
        ("valid-00000", "say yes", "translate"),
        ("test-00000", "pay me", "pay"),
        ("test-00001", "a show", "oos"),
    ]
    assert corpus.examples[0].tokens == ("Say", "'", "hi", "'")
    assert not corpus.has_slots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": None}, "expected a list .* under 'val'"),
        ({"oos_test": {}}, "expected a list .* under 'oos_test'"),
        ({"test": [["a", "b"], ["x"]]}, r"'test' row 2: expected \[text, intent\], got list"),
        ({"train": ["x"]}, r"'train' row 1: expected \[text, intent\], got str"),
        ({"train": [["x", 1]]}, r"'train' row 1: expected \[text, intent\], got list"),
        ({"oos_test": [["", "oos"]]}, "'oos_test' row 1: Example test-00001: .*non-empty text"),
        ({"test": [], "oos_test": []}, "one row in test"),
    ],
)
def test_faults_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = write(tmp_path, CONTENT | changes)
    with pytest.raises(DataError, match=rf"data_full\.json[:,] .*{message}"):
        load_clinc150(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the lists train, val, test, got list"):
        load_clinc150(write(tmp_path, []))
    with pytest.raises(DataError, match=r"data_full\.json: expected a list .* under 'train'"):
        load_clinc150(write(tmp_path, {"domains": []}))


def test_published_file_equals_the_uniform_one(real_data: Path) -> None:
    folder = real_data / "clinc150"
    corpus = load_corpus(f"clinc150:{folder / 'data_full.json'}")
    uniform = load_corpus(str(folder / "clinc150.jsonl.gz"))
    for split in SPLITS:
        assert corpus.split(split) == uniform.split(split)
    assert len(corpus.intents) == 151
