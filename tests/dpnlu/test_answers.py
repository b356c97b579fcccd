"""Answers on disk: given back whole, and only to the question they were given to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpnlu import answers

QUESTION = {"batch_size": 512, "epsilon": None, "noise_multiplier": 0.7}
ANSWER = {"found": {"epsilon": 8.25, "steps": 3}, "warnings": []}


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def _only_file(caches: Path) -> Path:
    (path,) = (caches / "dpnlu").iterdir()
    return path


def test_an_answer_is_recalled_as_it_was_kept() -> None:
    assert answers.recall(QUESTION) is None
    answers.keep(QUESTION, ANSWER)
    assert answers.recall(QUESTION) == ANSWER
    assert answers.recall(dict(reversed(QUESTION.items()))) == ANSWER


def test_infinity_is_an_answer() -> None:
    answers.keep(QUESTION, {"epsilon": float("inf")})
    assert answers.recall(QUESTION) == {"epsilon": float("inf")}


@pytest.mark.parametrize("name", QUESTION)
def test_each_part_of_the_question_counts(name: str) -> None:
    answers.keep(QUESTION, ANSWER)
    assert answers.recall(QUESTION | {name: 1e-7}) is None


@pytest.mark.parametrize("what", ["_sources", "_version"])
def test_another_installation_recalls_nothing(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    answers.keep(QUESTION, ANSWER)
    monkeypatch.setattr(answers, what, lambda *_: "another")
    assert answers.recall(QUESTION) is None


def test_an_edited_source_is_another_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = tmp_path / "accounting.py"
    module.write_text("GRID = 1")
    monkeypatch.setattr(answers, "__file__", str(module))
    before = answers._sources()
    module.write_text("GRID = 2")
    assert answers._sources() != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("8.25", "2.25"),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({"answer": ANSWER}),
        lambda text: "",
    ],
    ids=["changed", "cut", "another kind", "without digest", "empty"],
)
def test_a_damaged_answer_is_none(caches: Path, damage: Callable[[str], str]) -> None:
    answers.keep(QUESTION, ANSWER)
    path = _only_file(caches)
    path.write_text(damage(path.read_text()))
    assert answers.recall(QUESTION) is None
    answers.keep(QUESTION, ANSWER)
    assert answers.recall(QUESTION) == ANSWER


def test_an_answer_of_another_question_is_not_taken_for_ones_own(caches: Path) -> None:
    answers.keep(QUESTION, ANSWER)
    content = _only_file(caches).read_text()
    other = QUESTION | {"batch_size": 511}
    answers._path(answers._stated(other)).write_text(content)
    assert answers.recall(other) is None


def test_without_a_place_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    answers.keep(QUESTION, ANSWER)
    assert answers.recall(QUESTION) is None


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(nobody))
    answers.keep(QUESTION, ANSWER)
    assert answers.recall(QUESTION) is None
