"""The ledger: on disk before the update, and never overwritten."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from io import FileIO

import pytest

from dpnlu.accounting import epsilon
from dpnlu.ledger import Ledger, LedgerError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def _write(path, plan, releases):
    """A closed ledger of `releases` releases."""
    with Ledger(plan, path=path) as ledger:
        for step in range(releases):
            ledger.append(plan.event_at(step))


def test_epsilon_of_the_ledger_is_epsilon_of_the_plan(make_plan):
    """… after as many releases, whatever the noise schedule."""
    plan = make_plan(noise_schedule="exponential:0.5", steps=5)
    ledger = Ledger(plan)
    assert ledger.epsilon() == 0
    for step in range(5):
        ledger.append(plan.event_at(step))
        assert len(ledger) == step + 1
        assert ledger.epsilon() == pytest.approx(plan.epsilon(steps=step + 1))
    assert ledger.epsilon(accountant="rdp") == pytest.approx(plan.epsilon(accountant="rdp"))
    assert ledger.epsilon(delta=1e-7) == pytest.approx(replace(plan, target_delta=1e-7).epsilon())


def test_an_unplanned_release_is_accounted_as_it_was(make_plan):
    plan = make_plan(sample_rate=0.1)
    ledger = Ledger(plan)
    ledger.append(replace(plan.event_at(0), sample_rate=1.0))
    assert ledger.epsilon() > plan.epsilon(steps=1)
    assert ledger.epsilon() == pytest.approx(replace(plan, sample_rate=1.0).epsilon(steps=1))


def test_an_entry_is_on_disk_when_append_returns(make_plan, path, monkeypatch):
    synced = []
    really = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(path.read_text()), really(file)))
    plan = make_plan()
    ledger = Ledger(plan, path=path)
    assert len(synced) == 1
    for step in range(3):
        ledger.append(plan.event_at(step))
        assert len(path.read_text().splitlines()) == step + 2
        assert synced[-1] == path.read_text(), "forced to disk after it was written, not before"
    assert len(Ledger.read(path)) == 3
    ledger.close()


def test_a_killed_process_leaves_all_entries(make_plan, path):
    plan = make_plan()
    code = (
        "import json, os, sys; from pathlib import Path; from dpnlu.ledger import Ledger;"
        "from dpnlu.plan import PrivacyPlan; plan = PrivacyPlan.from_dict(json.loads(sys.argv[2]));"
        "ledger = Ledger(plan, path=Path(sys.argv[1]));"
        "[ledger.append(plan.event_at(step)) for step in range(2)]; os._exit(9)"
    )
    arguments = [sys.executable, "-c", code, str(path), json.dumps(plan.to_dict())]
    assert subprocess.run(arguments, check=False).returncode == 9
    assert len(Ledger.read(path)) == 2


def test_resuming_continues_the_file(make_plan, path):
    plan = make_plan(noise_schedule="inverse:1")
    _write(path, plan, 3)
    with Ledger.resume(path) as ledger:
        assert ledger.plan == plan and len(ledger) == 3
        ledger.append(plan.event_at(3))
        assert ledger.epsilon() == pytest.approx(plan.epsilon(steps=4))
    again = Ledger.read(path)
    assert len(again) == 4 and again.epsilon() == pytest.approx(plan.epsilon(steps=4))


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_counts_as_a_release(make_plan, path, kept):
    """Its update may have been applied: over-report, never under-report."""
    plan = make_plan()
    _write(path, plan, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    before = path.read_bytes()
    assert len(Ledger.read(path)) == 3
    assert path.read_bytes() == before, "reading changes nothing"
    with Ledger.resume(path) as ledger:
        assert len(ledger) == 3
        ledger.append(plan.event_at(3))
    assert len(Ledger.read(path)) == 4
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_torn_line_is_accounted_as_no_less_than_any_release_it_may_have_been(make_plan, path):
    """It may have been a release without sampling, which costs more than the planned one."""
    plan = make_plan(sample_rate=0.1)
    with Ledger(plan, path=path) as ledger:
        ledger.append(replace(plan.event_at(0), sample_rate=1.0))
        spent = ledger.epsilon()
    path.write_bytes(path.read_bytes()[:-20])
    assert Ledger.read(path).epsilon() >= spent
    with Ledger.resume(path) as ledger:
        assert ledger.epsilon() >= spent


def test_a_torn_line_of_truncated_batches_is_accounted_as_the_costlier_release(make_plan, path):
    """With nearly all examples in every batch, truncation costs more than no sampling at all."""
    truncated = {"sampling": "truncated_poisson", "max_batch_size": 7}
    for sample_rate in (0.1, 1.0):
        path.unlink(missing_ok=True)
        plan = make_plan(sample_rate=sample_rate, **truncated)
        _write(path, plan, 1)
        path.write_bytes(path.read_bytes()[:-20])
        for sampled in (True, False):
            event = plan.event_at(0, sampled=sampled)
            assert Ledger.read(path).epsilon() >= epsilon([event], delta=1e-5)


def test_a_torn_line_is_not_forgotten_by_a_resuming_that_fails(make_plan, path, monkeypatch):
    _write(path, make_plan(), 3)
    path.write_bytes(path.read_bytes()[:-5])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _full)
        with pytest.raises(OSError, match="No space"):
            Ledger.resume(path)
    assert len(Ledger.read(path)) >= 3


def test_an_existing_file_is_never_overwritten(make_plan, path):
    _write(path, make_plan(), 2)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="found a ledger: resume it"):
        Ledger(make_plan(), path=path)
    assert path.read_bytes() == before


def test_a_missing_file_is_refused(path):
    for opening in (Ledger.resume, Ledger.read):
        with pytest.raises(LedgerError, match="No such file"):
            opening(path)
    assert not path.exists()


@dataclass(frozen=True)
class Garbage:
    """A line put in place of line `number`, counted from 1."""

    number: int
    line: str


GARBAGE = [
    Garbage(1, "hello"),
    Garbage(1, "[]"),
    Garbage(1, '{"ledger": 99, "plan": {}}'),
    Garbage(1, '{"ledger": 1}'),
    Garbage(1, '{"ledger": 1, "plan": {"steps": 3}}'),
    Garbage(1, '{"ledger": 1, "plan": [1]}'),
    Garbage(3, "hello"),
    Garbage(3, ""),
    Garbage(3, "7"),
    Garbage(3, '{"release": 1}'),
    Garbage(3, '{"release": 1, "noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1, "x": 1}'),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_what_is_no_ledger_is_refused_and_left_alone(make_plan, path, garbage):
    _write(path, make_plan(), 3)
    lines = path.read_text().splitlines()
    lines[garbage.number - 1] = garbage.line
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for opening in (Ledger.resume, Ledger.read):
        with pytest.raises(LedgerError, match=str(path)):
            opening(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["hello", '{"release": 1}', '{"release": 1, "x": 1}'])
def test_the_refusal_names_the_line(make_plan, path, line):
    _write(path, make_plan(), 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
    with pytest.raises(LedgerError, match="line 3"):
        Ledger.read(path)


@pytest.mark.parametrize(
    "values",
    [
        {"noise_multiplier": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": "1"},
        {"sample_rate": 0.0},
        {"sample_rate": 2.0},
        {"steps": -1},
        {"steps": 0},
    ],
    ids=str,
)
def test_a_release_that_none_could_be_is_refused(make_plan, path, values):
    """Such a line would make ε too small, or fail only when ε is asked for."""
    _write(path, make_plan(), 2)
    *kept, last = path.read_text().splitlines()
    path.write_text("\n".join([*kept, json.dumps(json.loads(last) | values)]) + "\n")
    with pytest.raises(LedgerError):
        Ledger.read(path)


def test_a_line_that_went_missing_is_noticed(make_plan, path):
    _write(path, make_plan(), 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    with pytest.raises(LedgerError):
        Ledger.read(path)


def test_two_that_continue_one_ledger_are_noticed(make_plan, path):
    """Each would take the steps that the plan has left."""
    plan = make_plan()
    _write(path, plan, 1)
    with Ledger.resume(path) as one, Ledger.resume(path) as other:
        one.append(plan.event_at(1))
        other.append(plan.event_at(1))
    with pytest.raises(LedgerError, match="line 4 "):
        Ledger.read(path)


def _full(file):
    raise OSError(28, "No space left on device")


def test_what_could_not_be_written_raises_and_is_not_counted(make_plan, path, monkeypatch):
    """… nor left in the file, where the next entry would be appended to half a line."""
    plan = make_plan()
    ledger = Ledger(plan, path=path)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _full)
        with pytest.raises(OSError, match="No space"):
            ledger.append(plan.event_at(0))
    assert len(ledger) == 0 and path.read_bytes() == before
    ledger.append(plan.event_at(0))
    ledger.close()
    assert len(Ledger.read(path)) == 1


def test_half_a_line_is_taken_back(make_plan, path):
    """A disk that is full may take the beginning of a line, and say so only at the next."""

    class NearlyFull(FileIO):
        def write(self, line):
            return super().write(line[:10])

    plan = make_plan()
    ledger = Ledger(plan, path=path)
    before, whole = path.read_bytes(), ledger._file
    with NearlyFull(path, "ab") as ledger._file, pytest.raises(OSError, match="No space"):
        ledger.append(plan.event_at(0))
    ledger._file = whole
    assert len(ledger) == 0 and path.read_bytes() == before
    ledger.close()


@pytest.mark.parametrize("opening", ["closed", "read"])
def test_a_ledger_that_is_not_open_takes_no_release(make_plan, path, opening):
    """It would be counted in memory, and missing on disk."""
    plan = make_plan()
    ledger = Ledger(plan, path=path)
    ledger.close()
    if opening == "read":
        ledger = Ledger.read(path)
    with pytest.raises(LedgerError, match=r"continue it by Ledger\.resume"):
        ledger.append(plan.event_at(0))
    assert len(ledger) == 0


def test_an_entry_is_one_release(make_plan):
    ledger = Ledger(make_plan())
    with pytest.raises(ValueError, match="one step, got 3"):
        ledger.append(replace(make_plan().event_at(0), steps=3))
    assert len(ledger) == 0


def test_a_closed_ledger_keeps_answering(make_plan, path):
    plan = make_plan()
    with Ledger(plan, path=path) as ledger:
        ledger.append(plan.event_at(0))
    ledger.close()
    assert ledger.epsilon() == pytest.approx(plan.epsilon(steps=1))
