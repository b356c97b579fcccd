"""The ledger: on disk before the update, and never overwritten."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dpnlu.accounting.accountants import epsilon
from dpnlu.mechanism.ledger import Ledger, LedgerError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def _write(path, plan, releases):
    """A closed ledger of `releases` releases."""
    with Ledger(plan, path=path) as ledger:
        for step in range(releases):
            ledger.append(plan.event_at(step))


@pytest.mark.parametrize("spec", ["exponential:0.5", "step:0.5:2", "inverse:1", "list:1,3,0.7"])
def test_epsilon_of_the_ledger_is_epsilon_of_the_plan(make_plan, spec):
    """… after as many releases, whatever the noise schedule."""
    plan = make_plan(noise_schedule=spec, steps=5)
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
    for step in range(3):
        ledger.append(plan.event_at(step))
        assert len(path.read_text().splitlines()) == step + 2
        assert synced[-1] == path.read_text(), "forced to disk after it was written, not before"
    assert len(Ledger.read(path)) == 3
    ledger.close()


def test_the_name_of_a_new_file_is_on_disk_before_anything_is_released(
    make_plan, path, monkeypatch
):
    synced = []
    monkeypatch.setattr(
        "dpnlu.mechanism.ledger.sync", lambda place: synced.append((place, path.exists()))
    )
    Ledger(make_plan(), path=path).close()
    assert synced == [(path.parent, True)]


def test_a_killed_process_leaves_all_entries(make_plan, path):
    plan = make_plan()
    code = (
        "import json, os, sys; from pathlib import Path; from dpnlu.mechanism.ledger import Ledger;"
        "from dpnlu.mechanism.plan import PrivacyPlan;"
        "plan = PrivacyPlan.from_dict(json.loads(sys.argv[2]));"
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


@pytest.mark.parametrize("spec", ["exponential:0.5", "step:0.5:1", "inverse:1", "list:1,3,0.7"])
def test_a_release_has_the_noise_of_its_step(make_plan, path, spec):
    """A ledger takes no entry of another step, neither when it is made nor when it is read."""
    plan = make_plan(noise_schedule=spec, steps=6, sample_rate=0.5)
    _write(path, plan, 3)
    with Ledger.resume(path) as ledger, pytest.raises(ValueError, match="as the plan has it"):
        ledger.append(plan.event_at(0))
    lines = path.read_bytes().splitlines(keepends=True)
    early, late = (json.loads(lines[place]) for place in (1, 3))
    late["noise_multiplier"] = early["noise_multiplier"]
    path.write_bytes(b"".join(lines[:-1]) + (json.dumps(late) + "\n").encode())
    with pytest.raises(LedgerError, match="line 4"):
        Ledger.read(path)


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_line_of_sampled_releases_costs_what_was_planned(make_plan, path, kept):
    """Whoever writes them says so in the first line, and writes nothing else."""
    plan = make_plan(sample_rate=0.1, noise_schedule="exponential:0.5")
    with Ledger(plan, path=path, sampled_only=True) as ledger:
        for step in range(3):
            ledger.append(plan.event_at(step))
        with pytest.raises(ValueError, match="as the plan has it"):
            ledger.append(plan.event_at(3, sampled=False))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    assert Ledger.read(path).epsilon() == pytest.approx(plan.epsilon(steps=3))
    with Ledger.resume(path) as ledger:
        assert ledger.sampled_only
        assert ledger.remaining_steps(plan) == plan.steps - 3
        ledger.append(plan.event_at(3))
    assert Ledger.read(path).epsilon() == pytest.approx(plan.epsilon(steps=4))


def _as_format_1(path):
    """What was written before ledgers said who writes them."""
    first, *rest = path.read_text().splitlines(keepends=True)
    old = {"ledger": 1, "plan": json.loads(first)["plan"]}
    path.write_text("".join([json.dumps(old) + "\n", *rest]))


def test_a_ledger_that_does_not_say_who_writes_it_is_still_read(make_plan, path):
    """… and its torn line counts as the costliest."""
    plan = make_plan(sample_rate=0.1)
    with Ledger(plan, path=path, sampled_only=True) as ledger:
        for step in range(2):
            ledger.append(plan.event_at(step))
    _as_format_1(path)
    assert Ledger.read(path).epsilon() == pytest.approx(plan.epsilon(steps=2))
    path.write_bytes(path.read_bytes()[:-20])
    costly = epsilon([plan.event_at(0), plan.event_at(1, sampled=False)], delta=1e-5)
    assert Ledger.read(path).epsilon() == pytest.approx(costly)
    with Ledger.resume(path) as ledger:
        ledger.append(plan.event_at(2, sampled=False))
    assert len(Ledger.read(path)) == 3


def test_steps_remain_only_as_far_as_epsilon_stays_within_the_plan(make_plan):
    plan = make_plan(sample_rate=0.05, steps=200)
    for costly in range(4):
        ledger = Ledger(plan)
        for step in range(20):
            ledger.append(plan.event_at(step, sampled=step >= costly))
        left = ledger.remaining_steps(plan)
        assert left == 180 if not costly else left < 180
        if left:
            for step in range(20, 20 + left):
                ledger.append(plan.event_at(step))
            assert ledger.epsilon() <= plan.epsilon()
        if len(ledger) < 200:  # no step was given away
            ledger.append(plan.event_at(len(ledger)))
            assert ledger.epsilon() > plan.epsilon()
    assert left == 0, "what was released at the end cost more than all that was planned"


def test_no_steps_remain_once_all_are_taken(make_plan):
    plan = make_plan(steps=2)
    ledger = Ledger(plan)
    for step in range(2):
        ledger.append(plan.event_at(step, sampled=step > 0))
    assert ledger.remaining_steps(plan) == 0
    assert ledger.remaining_steps(replace(plan, steps=1)) == 0


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
    Garbage(1, '{"ledger": 2, "plan": {}}'),
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


@pytest.mark.parametrize(
    "values",
    [
        {"noise_multiplier": 50.0},
        {"noise_multiplier": 1.000001},
        {"sample_rate": 0.1},
        {"sample_rate": 1.0, "max_batch_size": 3, "num_examples": 8},
        {"steps": 2},
    ],
    ids=str,
)
def test_a_release_that_the_plan_does_not_know_is_refused(make_plan, path, values):
    """More noise than there was, or fewer examples: ε would come out too small."""
    _write(path, make_plan(), 3)
    first, *lines, last = path.read_text().splitlines()
    edited = json.dumps(json.loads(lines[0]) | values)
    path.write_text("\n".join([first, edited, *lines[1:], last]) + "\n")
    for opening in (Ledger.resume, Ledger.read):
        with pytest.raises(LedgerError, match=r"line 2 .* as the plan has it"):
            opening(path)


def test_the_noise_of_a_release_is_that_of_its_own_step(make_plan, path):
    """A later step's noise multiplier is wrong for an earlier one, and the other way round."""
    plan = make_plan(noise_schedule="exponential:0.5", steps=6)
    _write(path, plan, 6)
    lines = path.read_text().splitlines()
    first, last = json.loads(lines[1]), json.loads(lines[6])
    assert first["noise_multiplier"] > last["noise_multiplier"]
    lines[6] = json.dumps(last | {"noise_multiplier": first["noise_multiplier"]})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match="line 7 "):
        Ledger.read(path)


def test_powers_that_another_machine_rounds_otherwise_are_no_other_release(make_plan, path):
    plan = make_plan(noise_schedule="exponential:0.9", steps=9)
    _write(path, plan, 9)
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    last["noise_multiplier"] = math.nextafter(last["noise_multiplier"], 0)
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert Ledger.read(path).epsilon() == pytest.approx(plan.epsilon(steps=9))


def test_a_line_that_went_missing_is_noticed(make_plan, path):
    _write(path, make_plan(), 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    with pytest.raises(LedgerError):
        Ledger.read(path)


def test_a_ledger_is_written_by_one_training_at_a_time(make_plan, path):
    """Each of two would take the steps that the plan has left."""
    plan = make_plan()
    with Ledger(plan, path=path) as ledger:
        ledger.append(plan.event_at(0))
        with pytest.raises(LedgerError, match="another training is writing to it"):
            Ledger.resume(path)
        assert len(Ledger.read(path)) == 1, "who only reads need not wait"
    with Ledger.resume(path), pytest.raises(LedgerError, match="another training"):
        Ledger.resume(path)
    Ledger.resume(path).close()


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


def test_half_a_line_is_taken_back(make_plan, path, monkeypatch):
    """A disk that is full may take the beginning of a line, and say so only at the next."""

    really, room = os.write, [10, 5]

    def nearly_full(file, line):
        return really(file, line[: room.pop(0)]) if room else _full(file)

    plan = make_plan()
    ledger = Ledger(plan, path=path)
    before = path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", nearly_full)
        with pytest.raises(OSError, match="No space"):
            ledger.append(plan.event_at(0))
    assert len(ledger) == 0 and path.read_bytes() == before
    ledger.append(plan.event_at(0))
    ledger.close()
    assert len(Ledger.read(path)) == 1


def _replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


TOUCHED = {
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"{}\n"),
    "cut off": lambda path: os.truncate(path, 0),
    "one byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "removed": lambda path: path.unlink(),
    "moved": lambda path: path.rename(path.with_name("elsewhere")),
    "replaced by its copy": _replace,
    "its folder moved": lambda path: path.parent.rename(path.parent.with_name("away")),
}


@pytest.mark.parametrize("change", TOUCHED)
def test_a_ledger_that_was_touched_takes_no_more_releases(make_plan, tmp_path, change):
    path = tmp_path / "run" / "ledger.jsonl"
    path.parent.mkdir()
    plan = make_plan()
    with Ledger(plan, path=path) as ledger:
        ledger.append(plan.event_at(0))
        TOUCHED[change](path)
        left = path.read_bytes() if path.exists() else None
        for _ in range(2):
            with pytest.raises(LedgerError, match="as this training left it"):
                ledger.append(plan.event_at(1))
        assert len(ledger) == 1
        assert left == (path.read_bytes() if path.exists() else None), "and is left as it is"


def test_a_ledger_that_is_touched_while_it_is_written_is_noticed(make_plan, path, monkeypatch):
    plan, really = make_plan(), os.fsync
    with Ledger(plan, path=path) as ledger, monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: (path.unlink(), really(file)))
        with pytest.raises(LedgerError, match="removed"):
            ledger.append(plan.event_at(0))
        assert len(ledger) == 0


def test_a_ledger_is_found_again_from_another_folder(make_plan, path, monkeypatch):
    plan = make_plan()
    monkeypatch.chdir(path.parent)
    with Ledger(plan, path=Path(path.name)) as ledger:
        monkeypatch.chdir("/")
        ledger.append(plan.event_at(0))
    assert len(Ledger.read(path)) == 1


def test_a_file_that_was_started_and_records_nothing_is_named_as_such(make_plan, path):
    path.write_bytes(b'{"ledger": 2, "pl')
    with pytest.raises(LedgerError, match="records nothing: remove it"):
        Ledger(make_plan(), path=path)
    assert path.read_bytes() == b'{"ledger": 2, "pl'


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
    with pytest.raises(ValueError, match=r"one step .* got 3 with"):
        ledger.append(replace(make_plan().event_at(0), steps=3))
    assert len(ledger) == 0


def test_a_closed_ledger_keeps_answering(make_plan, path):
    plan = make_plan()
    with Ledger(plan, path=path) as ledger:
        ledger.append(plan.event_at(0))
    ledger.close()
    assert ledger.epsilon() == pytest.approx(plan.epsilon(steps=1))
