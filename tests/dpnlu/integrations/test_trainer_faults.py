"""A private Trainer that is killed at whatever moment forgets nothing that it spent.

`trainer_faults.py` beside this file kills it; here is what must hold afterwards.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dpnlu.integrations import subjects

ROOT = Path(__file__).parents[3]
KILLED = -9


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is such: to wait for a disk would take most of the time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


def _faults(folder: Path, *, steps: int = 5, **request: Any) -> list[list[dict[str, Any]]]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.dpnlu.integrations.trainer_faults"],
        input=json.dumps({"folder": str(folder), "steps": steps} | request),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    found: list[list[dict[str, Any]]] = json.loads(run.stdout)
    assert found
    return found


def _assert_ended_well(found: list[dict[str, Any]], *, steps: int = 5) -> None:
    """The ledger holds all updates that were applied, and at most one more for each kill."""
    applied = kills = 0
    plan = subjects.plan(noise_multiplier=1.0, steps=steps)
    for left in found:
        applied += left["applied"]
        kills += left["status"] == KILLED
        assert left["status"] in (0, KILLED), found
        assert applied <= left["releases"] <= applied + kills, found
        spent = plan.epsilon(steps=left["releases"]) if left["releases"] else 0.0
        assert left["epsilon"] == pytest.approx(spent), found
        assert not left["unreadable"], found
        assert all(step == releases for step, releases in left["checkpoints"]), found
    assert found[-1]["status"] == 0 and found[-1]["releases"] == steps, found


# Where an update is recorded, and where a checkpoint is written and moved to its place.
DELICATE = [
    ("write", 3),
    ("fsync", 6),
    ("save_pretrained", 0),
    ("torch.save", 1),
    ("rename", 0),
    ("rename", 1),
]


def test_a_training_that_is_killed_where_it_writes_is_resumed(folder: Path) -> None:
    for found in _faults(folder, faults=DELICATE):
        assert found[0]["status"] == KILLED
        _assert_ended_well(found)


@pytest.mark.slow
def test_a_training_may_be_killed_at_any_moment(folder: Path) -> None:
    chance = random.Random(0)
    moments = [chance.uniform(0, 1.1) for _ in range(200)]
    found = _faults(folder, steps=9, moments=moments)
    for one in found:
        _assert_ended_well(one, steps=9)
    assert len({one[0]["applied"] for one in found}) > 3, "the moments tell apart"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["write", "fsync", "torch.save", "rename"])
def test_a_training_may_be_killed_at_any_operation(folder: Path, name: str) -> None:
    for found in _faults(folder, faults=[(name, number) for number in range(12)]):
        _assert_ended_well(found)
