"""Files that declare label sets."""

import json
from pathlib import Path

import pytest

from dpnlu.nlu.data import DataError, read_labels


def write(path: Path, content: object) -> Path:
    """Write a file of labels."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_intents_and_slots_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "l.json", {"intents": ["b", "a", 3], "slots": ["x"], "note": None})
    assert read_labels(path) == (("b", "a", "3"), ("x",))
    assert read_labels(write(path, {"intents": ["a"], "slots": []})) == (("a",), ())


@pytest.mark.parametrize("content", [{"intents": ["a"]}, {"intents": ["a"], "slots": None}])
def test_slots_may_be_left_out(content: object, tmp_path: Path) -> None:
    assert read_labels(write(tmp_path / "l.json", content)) == (("a",), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got no intents"),
        ([], "got no intents"),
        ({}, "got no intents"),
        ({"intents": None}, "got no intents"),
        ({"intents": "abc"}, "a list under 'intents', got str"),
        ({"intents": {"a": 1}}, "a list under 'intents', got dict"),
        ({"intents": ["a"], "slots": 3}, "a list under 'slots', got int"),
        ({"intents": [None]}, "not blank under 'intents', got None"),
        ({"intents": [True]}, "not blank under 'intents', got True"),
        ({"intents": [1.5]}, "not blank under 'intents', got 1.5"),
        ({"intents": [""]}, "not blank under 'intents', got ''"),
        ({"intents": ["a"], "slots": [["x"]]}, "not blank under 'slots'"),
        ({"intents": ["half \ud800"]}, "not blank under 'intents', got 'half"),
    ],
)
def test_another_form_is_refused_in_one_line(content: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "l.json", content)
    with pytest.raises(DataError) as caught:
        read_labels(path)
    assert str(caught.value).startswith(f"{path}: expected")
    assert message in str(caught.value)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"l\.json: expected JSON that can be read"):
        read_labels(tmp_path / "l.json")
