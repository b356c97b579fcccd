"""Trainings that are killed, terminated or run out of disk, at whatever moment, end well.

`faults.py` beside this file runs them; here is what must hold afterwards.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KILLED = -9
TARGET = 3.0

ROWS = [
    {"text": f"{word} {number}", "intent": intent, "split": split}
    for split, numbers in (("train", range(12)), ("test", range(12, 16)))
    for number in numbers
    for word, intent in (("play", "music"), ("wake me at", "alarm"))
]
FILES = {"README.md", "config.json", "metrics.json", "model.safetensors", "vocabulary.json"}
PRIVATE = {"ledger.jsonl", "plan.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is such: to wait for a disk would take most of the time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


def _faults(
    folder: Path, *arguments: str, rows: Sequence[Mapping[str, str]] = ROWS, **request: Any
) -> list[dict[str, Any]]:
    """What `faults.py` answers, of a small private training unless `arguments` say otherwise."""
    data, words = folder / "data.jsonl", folder / "words.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words.write_text("play\nwake\nme\nat\n", encoding="utf-8")
    train = ["train", "--data", str(data), "--model", "lstm", "--vocabulary", str(words), "--quiet"]
    train += ["--epsilon", str(TARGET), "--delta", "1e-3", "--batch-size", "8", "--epochs", "1"]
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("faults.py")],
        input=json.dumps({"arguments": [*train, *arguments], "folder": str(folder)} | request),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    assert found
    return found


def _assert_resumed(found: dict[str, Any], *, private: bool = True) -> None:
    """One heir trained to the end, and nothing that was spent is missing."""
    heirs, left, end = found["heirs"], found["left"], found["end"]
    was_finished = left["model"] == "loads" and "run.json" not in left["files"]
    statuses = sorted(heir["status"] for heir in heirs)
    assert statuses == ([2] * len(heirs) if was_finished else [0] + [2] * (len(heirs) - 1)), found
    for heir in heirs:
        _assert_ended_well(heir)
    assert end["model"] == "loads", found
    assert set(end["files"]) == (FILES | PRIVATE if private else FILES), found
    if private:
        applied = [found["first"]["applied"], *(heir["applied"] for heir in heirs)]
        assert end["releases"] >= sum(applied), found
        assert left.get("releases", 0) >= applied[0], found
        assert end["epsilon"] <= TARGET, found


def _assert_ended_well(training: dict[str, Any]) -> None:
    """It was killed, or succeeded, or says in one line why it did not."""
    assert training["status"] in (KILLED, 0, 1, 2), training
    if training["status"] in (1, 2):
        (line,) = training["said"]
        assert line.startswith("dpnlu: error: "), training


# Where an update is recorded, applied and kept, and where a model becomes one.
DELICATE = [
    ("kill halfway", "write ledger.jsonl:2"),
    ("kill", "fsync ledger.jsonl:3"),
    ("kill halfway", "write config.json"),
    ("kill", "unlink run.json"),
    ("full disk", "save_file checkpoint.safetensors:0"),
    ("terminate", "write ledger.jsonl:1"),
]
WRITES = ["write", "save_file"]


def test_a_training_that_is_interrupted_is_resumed(folder: Path) -> None:
    """… by one of two that try at once; if it can still speak, it says so in one line."""
    for found in _faults(folder, faults=DELICATE, heirs=2):
        _assert_ended_well(found["first"])
        _assert_resumed(found)


LONGER = ("--epochs", "2")  # a checkpoint on the way


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "full disk", "input/output error", "terminate"])
def test_a_training_may_be_interrupted_at_any_operation(folder: Path, fault: str) -> None:
    for found in _faults(folder, *LONGER, faults=[(fault, "")]):
        _assert_ended_well(found["first"])
        _assert_resumed(found)


@pytest.mark.slow
def test_a_training_may_be_killed_while_it_writes(folder: Path) -> None:
    for found in _faults(folder, *LONGER, faults=[("kill halfway", name) for name in WRITES]):
        assert found["first"]["status"] == KILLED
        _assert_resumed(found)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "full disk"])
def test_an_ordinary_training_may_be_interrupted_at_any_operation(folder: Path, fault: str) -> None:
    for found in _faults(folder, "--epsilon", "inf", faults=[(fault, "")], heirs=2):
        _assert_ended_well(found["first"])
        _assert_resumed(found, private=False)


@pytest.mark.slow
def test_a_training_may_be_killed_at_any_moment(folder: Path) -> None:
    chance = random.Random(0)
    found = _faults(folder, *LONGER, moments=[chance.uniform(0, 0.6) for _ in range(200)])
    for one in found:
        assert one["first"]["status"] in (0, KILLED)
        _assert_resumed(one)
    assert len({one["first"]["applied"] for one in found}) > 3, "the moments tell apart"


@pytest.mark.slow
def test_what_a_single_step_learnt_may_be_lost_but_is_not_made_up(folder: Path) -> None:
    """Its release is spent; without a checkpoint only initial weights could be saved."""
    lost = []
    for found in _faults(folder, "--epochs", "0.3", faults=[("kill", "")]):
        left, (heir,) = found["left"], found["heirs"]
        if left.get("releases") and not {"config.json", "checkpoint.safetensors"} & {
            *left["files"]
        }:
            lost.append(found["at"])
            assert heir["status"] == 2 and "train anew" in heir["said"][0], found
            assert found["end"]["model"] != "loads", found
        else:
            _assert_resumed(found)
    assert lost


# ---- the best of several trainings -------------------------------------------------------------

WITH_VALIDATION = [row | {"split": "valid"} if i % 8 == 7 else row for i, row in enumerate(ROWS)]
TRIALS = ("--trials", "2", "--search", "learning_rate=0.01,0.02")


def _assert_best_is_kept(found: dict[str, Any]) -> None:
    """What was drawn stays drawn, and no training spends more than the whole was planned with."""
    first, left, (heir,), end = found["first"], found["left"], found["heirs"], found["end"]
    _assert_ended_well(first)
    _assert_ended_well(heir)
    begun = left.get("trials.json")
    was_finished = left["model"] == "loads" and begun is None
    assert heir["status"] == (2 if was_finished else 0), found
    assert end["model"] == "loads", found
    assert set(end["files"]) == FILES | PRIVATE | {"selection.json"}, found
    assert 0 < end["metrics.json"]["epsilon"] <= TARGET, found
    if begun is None:
        assert was_finished or first["applied"] == 0, "nothing is trained before it is recorded"
        return
    chosen = {key: end["selection.json"][key] for key in begun["selection"]}
    assert chosen == begun["selection"], found
    for ledger in left["trials"].values():
        assert ledger["epsilon"] <= begun["epsilon"] * (1 + 1e-9), found
    if left["model"] != "loads":
        assert sum(ledger["releases"] for ledger in left["trials"].values()) >= first["applied"]
    finished = len(begun["scores"])
    per_training = end["releases"]
    most = (len(begun["drawn"]) - finished) * per_training
    assert heir["applied"] <= most, "what has ended is not trained again"


def test_the_best_of_several_trainings_is_found_after_a_kill(folder: Path) -> None:
    """… at the delicate points: where a score is recorded, and where the best becomes the model."""
    faults = [
        ("kill", "replace trials.json:1"),
        ("kill", "write selection.json"),
        ("kill", "unlink trials.json"),
    ]
    for found in _faults(folder, *TRIALS, rows=WITH_VALIDATION, faults=faults):
        _assert_best_is_kept(found)


@pytest.mark.slow
def test_several_trainings_may_be_killed_at_any_moment(folder: Path) -> None:
    chance = random.Random(0)
    shares = [chance.uniform(0, 1.1) for _ in range(100)]
    found = _faults(folder, *TRIALS, rows=WITH_VALIDATION, shares=shares)
    for one in found:
        _assert_best_is_kept(one)
    assert len({one["first"]["applied"] for one in found}) > 3, "the moments tell apart"
