"""The uniform format: what is read, and which line is to blame."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dpnlu.nlu.data import DataError, load_corpus, load_jsonl

ROWS: list[dict[str, Any]] = [
    {
        "text": "Wake me at five",
        "tokens": ["wake", "me", "at", "five"],
        "tags": ["O", "O", "O", "B-time"],
        "intent": "alarm",
        "split": "train",
        "user": "u1",
        "group": "Zürich, <b>",
        "fold": 3,
    },
    {"text": "play it", "tags": ["O", "O"], "intent": "music", "split": "train", "user": 7},
    {"text": "stop \u2028now", "tags": ["O", "O"], "intent": "music", "split": "test"}
    | {"group": None},
]


def write(path: Path, *lines: str) -> Path:
    """Write lines to a file, compressed if its name says so."""
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def good_lines() -> list[str]:
    """Return the lines of a valid file; a line separator inside a string stays raw."""
    return [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize("name", ["home.jsonl", "home.jsonl.gz"])
def test_all_keys_are_read(tmp_path: Path, name: str) -> None:
    corpus = load_corpus(str(write(tmp_path / name, *good_lines(), "")))
    assert corpus.name == "home"
    first, second, third = corpus.examples
    assert (first.id, second.id, third.id) == ("train-00000", "train-00001", "test-00000")
    assert (first.text, first.tokens) == ("Wake me at five", ("wake", "me", "at", "five"))
    assert first.tags == ("O", "O", "O", "B-time")
    assert [row.user for row in corpus.examples] == ["u1", "7", None]
    assert [row.group for row in corpus.examples] == ["Zürich, <b>", None, None]
    assert second.tokens == ("play", "it")
    assert third.text == "stop now"


def test_a_split_is_drawn_where_there_is_none(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"say {n}", "intent": f"i{n % 2}"}) for n in range(200)]
    corpus = load_jsonl(write(tmp_path / "a.jsonl", *lines))
    assert {row.split for row in corpus.examples} == {"train", "valid", "test"}
    assert not corpus.has_slots


BAD_LINES = {
    "{": "expected JSON, got",
    "[1, 2]": "expected a JSON object, got list",
    "null": "expected a JSON object, got NoneType",
    '{"intent": "x"}': "expected a row with 'text'",
    '{"text": "x"}': "expected a row with 'intent'",
    '{"text": 3, "intent": "x"}': "string under 'text', got int",
    '{"text": "x", "intent": 3}': "string under 'intent', got int",
    '{"text": "x", "intent": "y", "split": "exam"}': "got 'exam'",
    '{"text": "x", "intent": "y", "split": 1}': "string under 'split', got int",
    '{"text": "x", "intent": "y"}': "split on every row or on none",
    '{"text": " ", "intent": "y", "split": "test"}': "non-empty text",
    '{"text": "x", "intent": " ", "split": "test"}': "non-empty intent",
    '{"text": "x", "intent": "y", "split": "test", "tokens": "x"}': "list of strings",
    '{"text": "x", "intent": "y", "split": "test", "tokens": []}': "at least one token",
    '{"text": "x", "intent": "y", "split": "test", "tokens": [""]}': "blank one at position 0",
    '{"text": "x", "intent": "y", "split": "test", "tags": [1]}': "list of strings under 'tags'",
    '{"text": "x y", "intent": "y", "split": "test", "tags": ["O"]}': "1 tags for 2 tokens",
    '{"text": "x y", "intent": "y", "split": "test", "tags": ["O", "I-a"]}': "'I-a' at position 1",
    '{"text": "x", "intent": "y", "split": "test", "user": [1]}': "string under 'user', got list",
    '{"text": "x", "intent": "y", "split": "test", "group": 3}': "string under 'group', got int",
    '{"text": "x", "intent": "y", "split": "test", "group": ["a"]}': "under 'group', got list",
    '{"text": "x", "intent": "y", "split": "test", "group": true}': "under 'group', got bool",
    '{"text": "x", "intent": "y", "split": "test", "group": {}}': "under 'group', got dict",
    '{"text": "x", "intent": "y", "split": "test", "group": ""}': "group, got a blank one",
    '{"text": "x", "intent": "y", "split": "test", "group": " \\t"}': "fill it in or leave it out",
    '{"text": "x", "intent": "y", "split": "test", "group": "\\udfff"}': "valid Unicode",
    '{"text": "x", "intent": null}': "expected a row with 'intent'",
    '{"text": null, "intent": "x"}': "expected a row with 'text'",
    '{"text": "x", "intent": ["y"], "split": "test"}': "string under 'intent', got list",
    '{"text": "x", "intent": {}, "split": "test"}': "string under 'intent', got dict",
    '{"text": "x", "intent": true, "split": "test"}': "string under 'intent', got bool",
    '{"text": "x", "intent": "y", "split": "test", "user": true}': "string under 'user', got bool",
    '{"text": "x", "intent": "y", "split": "test", "tags": [null]}': "list of strings",
    '{"text": "x", "intent": "y", "split": "test", "tags": {"O": 1}}': "list of strings",
    '{"text": "x", "intent": "y", "split": "a\\nb"}': "got 'a b'",
    '{"text": "\\ud800", "intent": "y", "split": "test"}': "valid Unicode, got '\\ud800'",
    '{"text": "x", "intent": "\\udfff", "split": "test"}': "valid Unicode, got '\\udfff'",
    '{"text": "x", "intent": "y", "split": "test", "tags": ["B-\\ud83c"]}': "valid Unicode",
    '{"text": "x", "intent": "y", "split": "test", "tokens": ["\\ud83c"]}': "valid Unicode",
    f'{{"text": "{"a " * 60_000}", "intent": "y", "split": "test"}}': "at most 100000 characters",
    f'{{"text": "x", "intent": "y", "split": "{"a" * 9_000}"}}': "expected a split of train",
    "\0": "expected JSON, got",
    "[" * 100_000: "expected JSON that can be read",
    '{"text": "x", "intent": "y", "fold": ' + "1" * 5_000 + "}": "expected JSON that can be read",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "home.jsonl", *good_lines(), "", line)
    with pytest.raises(DataError) as caught:
        load_jsonl(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 5: ")
    assert BAD_LINES[line] in message
    assert "\n" not in message and len(message) < 700


def test_tags_on_some_rows_only_are_refused(tmp_path: Path) -> None:
    line = json.dumps({"text": "x", "intent": "music", "split": "test"})
    path = write(tmp_path / "home.jsonl", *good_lines(), line)
    with pytest.raises(DataError, match=r"home\.jsonl: .*train-00000 and test-00001 unlike"):
        load_jsonl(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"home\.jsonl: .*at least one row in train"):
        load_jsonl(write(tmp_path / "home.jsonl"))
