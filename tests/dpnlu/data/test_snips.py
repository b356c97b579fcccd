"""SNIPS in both of its layouts."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpnlu.nlu.data import Corpus, DataError, load_corpus, load_snips
from dpnlu.nlu.data.assembly import drawn_split
from dpnlu.nlu.data.records import SPLITS
from dpnlu.nlu.data.snips import tokenize_snips

GOO = {
    "train": ("play  abba \nadd it\n", "O  B-artist \nO O\n", "PlayMusic\nAddToPlaylist\n"),
    "valid": ("play it\n", "O O\n", "PlayMusic\n"),
    "test": ("add abba now\n", "O B-artist I-artist\n", "AddToPlaylist \n"),
}


def write_goo(folder: Path, **replaced: tuple[str, str, str]) -> Path:
    """Write the split of Goo et al., some of its folders replaced or added."""
    for split, contents in (GOO | replaced).items():
        (folder / split).mkdir(parents=True)
        for name, content in zip(("seq.in", "seq.out", "label"), contents, strict=True):
            (folder / split / name).write_text(content, encoding="utf-8")
    return folder


def write_json(folder: Path, **replaced: Any) -> Path:
    """Write the original layout with two intents, some files' contents replaced."""
    for intent in ("RateBook", "PlayMusic"):
        (folder / intent).mkdir(parents=True)
        contents = {
            f"train_{intent}_full": {
                intent: [utterance(f"Give {n} to", "A.B's C!") for n in range(40)]
            },
            f"validate_{intent}": {intent: [utterance("Give it to", "Ann")]},
        }
        for name, content in contents.items():
            text = json.dumps(replaced.get(name, content))
            (folder / intent / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def utterance(text: str, name: str) -> dict[str, Any]:
    """Return an utterance of the original layout with one entity."""
    return {"data": [{"text": f"{text} "}, {"text": name, "entity": "name"}, {"text": " now."}]}


@pytest.mark.parametrize("inside", ["", "goo"])
def test_goo_layout(tmp_path: Path, inside: str) -> None:
    write_goo(tmp_path / inside)
    corpus = load_corpus(f"snips:{tmp_path}")
    first, second = corpus.split("train")
    assert (first.id, first.text, first.intent) == ("train-00000", "play abba", "PlayMusic")
    assert (first.tokens, first.tags) == (("play", "abba"), ("O", "B-artist"))
    assert second.intent == "AddToPlaylist"
    assert [row.text for row in corpus.split("valid")] == ["play it"]
    assert [row.intent for row in corpus.split("test")] == ["AddToPlaylist"]


def test_goo_layout_with_dev_for_valid(tmp_path: Path) -> None:
    write_goo(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "dev")
    assert [row.id for row in load_snips(tmp_path).split("valid")] == ["valid-00000"]


@pytest.mark.parametrize("inside", ["", "2017-06-custom-intent-engines"])
def test_json_layout(tmp_path: Path, inside: str) -> None:
    write_json(tmp_path / inside)
    corpus = load_snips(tmp_path)
    first = corpus.examples[0]
    assert first.text == "Give 0 to A.B's C! now."
    assert first.tokens == ("give", "0", "to", "a", "b", "s", "c", "now")
    assert first.tags == ("O", "O", "O", "B-name", "I-name", "I-name", "I-name", "O")
    assert [row.intent for row in corpus.split("test")] == ["PlayMusic", "RateBook"]
    for split in ("train", "valid"):
        rows = corpus.split(split)
        assert rows
        assert all((drawn_split(row.text) == "valid") == (split == "valid") for row in rows)
    assert len(corpus.split("train")) + len(corpus.split("valid")) == 80


def test_goo_goes_before_json(tmp_path: Path) -> None:
    write_goo(tmp_path / "goo")
    write_json(tmp_path / "2017-06-custom-intent-engines")
    assert len(load_snips(tmp_path).examples) == 4


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    write_goo(tmp_path)
    (tmp_path / "train" / "seq.in").write_bytes(b"play \xed\xa0\xbc\nadd it\n")
    assert load_snips(tmp_path).examples[0].tokens == ("play", "\ufffd\ufffd\ufffd")


def test_token_rule() -> None:
    assert tokenize_snips("Add it, to the\r\nnew-age list? OK!") == [
        *("add", "it", "to", "the", "new-age", "list", "ok")
    ]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (("a b\n", "O\n", "X\n"), "seq.in, line 1: Example train-00000: .*1 tags for 2 tokens"),
        (("a\nb\n", "O\nI-x\n", "X\nY\n"), "seq.in, line 2: .*'I-x' at position 0"),
        (("a\n\n", "O\n\n", "X\nY\n"), "seq.in, line 2: .*non-empty text"),
        (("a\nb\n", "O\nO\n", "X\n\n"), "seq.in, line 2: .*non-empty intent"),
        (("a\nb\n", "O\nO\n", "X\n"), "train: expected as many lines .* got 2, 2, 1"),
        (("a\n", "O\n", "X\n"), "Corpus snips: .*two intents in train"),
    ],
)
def test_faults_of_the_goo_layout(
    tmp_path: Path, train: tuple[str, str, str], message: str
) -> None:
    write_goo(tmp_path, train=train)
    with pytest.raises(DataError, match=message):
        load_snips(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write_goo(tmp_path) / "test" / "label").unlink()
    with pytest.raises(DataError, match=r"test/label: expected a readable file"):
        load_snips(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "an object with a list under 'PlayMusic'"),
        ({"Other": []}, "an object with a list under 'PlayMusic'"),
        ({"PlayMusic": [{"text": "x"}]}, "row 1: expected an object with a list 'data', got dict"),
        ({"PlayMusic": [{"data": "x"}]}, "row 1: expected an object with a list 'data', got dict"),
        ({"PlayMusic": [{"data": ["x"]}]}, "row 1: expected a segment .*got str"),
        ({"PlayMusic": [{"data": [{"text": 1}]}]}, "row 1: expected a segment .*got dict"),
        (
            {"PlayMusic": [{"data": [{"text": "x", "entity": 1}]}]},
            "row 1: expected a segment .*a string 'entity', got dict",
        ),
        ({"PlayMusic": [{"data": []}]}, "row 1: Example test-00000: .*non-empty text"),
        ({"PlayMusic": [{"data": [{"text": "?!"}]}]}, "row 1: .*at least one token"),
    ],
)
def test_faults_of_the_json_layout(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path, validate_PlayMusic=content)
    with pytest.raises(DataError, match=rf"validate_PlayMusic\.json[:,] .*{message}"):
        load_snips(tmp_path)


def test_json_that_is_none(tmp_path: Path) -> None:
    path = write_json(tmp_path) / "PlayMusic" / "validate_PlayMusic.json"
    path.write_text("{\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"validate_PlayMusic\.json: expected JSON, .* at line 2"):
        load_snips(tmp_path)


def test_a_folder_with_neither_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train/seq\.in or .* got neither"):
        load_snips(tmp_path)


def content(corpus: Corpus, split: str) -> list[tuple[Any, ...]]:
    """Return what a row of a split holds but for its text, which one layout does not keep."""
    return [(row.id, row.tokens, row.tags, row.intent) for row in corpus.split(split)]


def test_published_split_equals_the_uniform_file(real_data: Path) -> None:
    corpus = load_corpus(f"snips:{real_data / 'snips'}")
    uniform = load_corpus(str(real_data / "snips" / "snips.jsonl.gz"))
    for split in SPLITS:
        assert content(corpus, split) == content(uniform, split)
    assert (len(corpus.intents), len(corpus.slots)) == (7, 39)


def test_original_files_hold_the_rows_of_the_uniform_file(real_data: Path) -> None:
    original = load_snips(real_data / "snips" / "2017-06-custom-intent-engines")
    uniform = load_corpus(str(real_data / "snips" / "snips.jsonl.gz"))
    for wholes in ((("train", "valid"), ("train", "test")), (("test",), ("valid",))):
        rows = [
            Counter(
                (row.text, row.tokens, row.tags, row.intent)
                for split in splits
                for row in corpus.split(split)
            )
            for corpus, splits in zip((original, uniform), wholes, strict=True)
        ]
        assert rows[0] == rows[1]
