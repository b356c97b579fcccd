"""One training at a time has a directory; what is in it tells how far it came."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpnlu.mechanism.ledger import Ledger, LedgerError
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.fingerprint import Fingerprint
from dpnlu.runs.directory import (
    Run,
    check_unchanged,
    claimed,
    interrupted_run,
    new_ledger,
    recognised,
    record_run,
    resumed_ledger,
    tidy,
)

RUN = Run(settings={"data": "d"}, fingerprint=Fingerprint("00", "11"))
MakePlan = Callable[..., PrivacyPlan]


def test_a_directory_is_made_and_free_again_afterwards(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    for _ in range(2):
        with claimed(out), pytest.raises(ValueError, match="another training"), claimed(out):
            pass
    assert not list(out.iterdir())


def test_what_was_started_is_read_again_once_something_was_released(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    assert interrupted_run(tmp_path, resume=False) is None
    record_run(tmp_path, RUN)
    assert interrupted_run(tmp_path, resume=True) is None, "nothing has happened yet"
    with new_ledger(tmp_path, make_plan()) as ledger:
        assert ledger.sampled_only
        ledger.append(ledger.plan.event_at(0))
    assert interrupted_run(tmp_path, resume=True) == RUN
    with pytest.raises(ValueError, match="add --resume"):
        interrupted_run(tmp_path, resume=False)


NOTHING_YET: dict[str, Callable[[Path], object]] = {
    "empty": lambda out: None,
    "a record that was being written": lambda out: (out / "run.json.partial").mkdir(),
}
NOT_OURS: dict[str, Callable[[Path], object]] = {
    "another file": lambda out: (out / "thesis.tex").touch(),
    "a folder": lambda out: (out / "photos").mkdir(),
    "a record of another kind": lambda out: (out / "study.json").write_text("{}"),
    "an empty record": lambda out: (out / "run.json").touch(),
    "a record that says nothing": lambda out: (out / "run.json").write_text("null"),
    "a record that is a folder": lambda out: (out / "run.json").mkdir(),
    "a record that is a dead link": lambda out: (out / "run.json").symlink_to("nowhere"),
    "no text": lambda out: (out / "run.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", NOTHING_YET)
def test_where_nothing_is_yet_a_directory_may_be_ours(tmp_path: Path, kind: str) -> None:
    NOTHING_YET[kind](tmp_path)
    assert recognised(tmp_path, "run.json") is None


@pytest.mark.parametrize("kind", NOT_OURS)
def test_where_something_else_is_a_directory_is_not_ours(tmp_path: Path, kind: str) -> None:
    NOT_OURS[kind](tmp_path)
    with pytest.raises(ValueError, match="found something else"):
        recognised(tmp_path, "run.json")
    with pytest.raises(ValueError, match="found something else"):
        interrupted_run(tmp_path, resume=True)


@pytest.mark.parametrize("content", [{"a": 1}, [], 0, False, ""])
def test_a_record_is_what_a_directory_is_recognised_by(tmp_path: Path, content: object) -> None:
    (tmp_path / "run.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "beside it").touch()
    assert recognised(tmp_path, "run.json") == content


def test_a_start_over_removes_the_ledger_that_records_nothing(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    record_run(tmp_path, RUN)
    new_ledger(tmp_path, make_plan()).close()
    assert interrupted_run(tmp_path, resume=False) is None
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_what_is_removed_last_is_what_it_is_recognised_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_run(tmp_path, RUN)
    (tmp_path / "checkpoint.safetensors").touch()
    (tmp_path / "config.json").touch()
    (tmp_path / "config.json.partial").mkdir()
    removed: list[str] = []
    really = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        really(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    tidy(tmp_path)
    assert removed == ["checkpoint.safetensors", "run.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("changed", [{"steps": 11}, {"num_examples": 9}, {"noise_multiplier": 2.0}])
def test_a_ledger_of_another_plan_is_not_resumed(
    tmp_path: Path, make_plan: MakePlan, changed: dict[str, float]
) -> None:
    new_ledger(tmp_path, make_plan()).close()
    with pytest.raises(LedgerError, match="begin with the plan of this training"):
        resumed_ledger(tmp_path, make_plan(**changed))
    resumed_ledger(tmp_path, make_plan()).close()  # it was closed, and left as it was


def test_releases_that_went_missing_since_are_noticed(tmp_path: Path, make_plan: MakePlan) -> None:
    with new_ledger(tmp_path, make_plan()) as ledger:
        for step in range(3):
            ledger.append(ledger.plan.event_at(step))
    check_unchanged(tmp_path, ledger)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert len(Ledger.read(path)) == 2
    with pytest.raises(LedgerError, match=r"Expected the 3 releases .* got 2"):
        check_unchanged(tmp_path, ledger)
