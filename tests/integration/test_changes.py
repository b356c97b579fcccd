"""What privacy changed, in a study at toy size: counted right, kept, and resumed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpnlu
from attacks.farm import load_arrays, save_arrays
from attacks.report import validate
from dpnlu.cli.main import main
from dpnlu.compare import budget
from dpnlu.compare.preparation import prepare_study
from dpnlu.compare.settings import StudySettings, study_as_begun
from dpnlu.nlu.data import Example, drop_repeated, synthetic_corpus

pytestmark = [pytest.mark.xdist_group("changes"), pytest.mark.usefixtures("quick_studies")]

PLAIN = [
    *("compare", "--data", "synthetic:400", "--epsilons", "inf", "8", "--epochs", "6"),
    *("--batch-size", "60", "--references", "0", "--audit-examples", "60", "--attacks", "loss"),
    "--quiet",
]
COMPARE = [*PLAIN, "--retrainings", "1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes") / "out"
    assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder


def _runs(folder: Path) -> list[dict[str, Any]]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    validate(report)
    return report["runs"]


def _test_split() -> tuple[Example, ...]:
    return drop_repeated(synthetic_corpus(400))[0].split("test")


def _right(folder: Path, name: str) -> np.ndarray:
    """By the saved model, asked as its users ask."""
    model = dpnlu.load(folder / "runs" / name / "target")
    said = model.predict([example.text for example in _test_split()])
    pairs = zip(said, _test_split(), strict=True)
    return np.array([prediction.intent == example.intent for prediction, example in pairs])


def test_flips_are_those_of_the_saved_models(out: Path) -> None:
    before, after = _right(out, "eps-inf"), _right(out, "eps-8")
    ordinary, private = _runs(out)
    assert "flips" not in ordinary
    flips = private["flips"]
    assert flips["against"] == "eps-inf" and flips["texts"] == len(before)
    assert flips["negative"] == pytest.approx((before & ~after).mean())
    assert flips["positive"] == pytest.approx((~before & after).mean())
    assert flips["negative"] > 0, "a study in which nothing changes tests nothing"


def test_classes_and_bins_add_up_to_the_accuracy(out: Path) -> None:
    for run in _runs(out):
        for kind in ("intents", "rarest_word"):
            rows = run["breakdown"][kind]
            asked = sum(row["test"] for row in rows)
            assert asked == len(_test_split())
            right = sum(row["test"] * row["right"] for row in rows)
            assert right / asked == pytest.approx(run["intent_accuracy"])
        assert run["calibration"]["accuracy"] == pytest.approx(run["intent_accuracy"])
        assert sum(b["texts"] for b in run["calibration"]["bins"]) == len(_test_split())


def test_the_section_is_in_the_report_with_its_three_figures(out: Path) -> None:
    assert "What did privacy change" in (out / "report.html").read_text(encoding="utf-8")
    names = {path.stem for path in (out / "figures").glob("*.svg")}
    assert {"losses", "reliability", "flips"} <= names


def test_a_retraining_is_of_the_same_examples_and_another_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = StudySettings(
        data="synthetic:400", epsilons=(8.0,), batch_size=60, canaries=("pin:2:R=3",)
    )
    prepared = prepare_study(settings)
    asked: list[Mapping[str, Any]] = []

    class AskedError(Exception):
        pass

    def train(classifier: Any, examples: Any, **options: Any) -> None:
        weights = [p.detach().clone() for p in classifier.model.parameters()]
        asked.append(options | {"examples": examples, "weights": weights})
        raise AskedError

    monkeypatch.setattr(budget, "train", train)
    (one,) = prepared.budgets
    for training in (lambda: one.train(0), lambda: one.retrain(0), lambda: one.retrain(1)):
        with pytest.raises(AskedError):
            training()
    target, *again = asked
    for other in again:
        for what in ("examples", "plan", "recipe", "compute", "validation", "repeatable_noise"):
            assert other[what] == target[what]
    assert len({options["seed"] for options in asked}) == 3
    # Not those of a reference either.
    assert {options["seed"] for options in again}.isdisjoint(one._seed_of(n) for n in range(50))
    assert any((a != b).any() for a, b in zip(target["weights"], again[0]["weights"], strict=True))


def _retraining(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "retrainings" / "model-0000.npz"


def test_a_retraining_says_something_else_than_its_target(out: Path) -> None:
    for run in _runs(out):
        (flips,) = run["retrainings"]
        assert flips["against"] == run["name"] and flips["train_seconds"] > 0
        own = load_arrays(out / "runs" / run["name"] / "target.npz")
        other = load_arrays(_retraining(out, run["name"]))
        differ = (own["test_intents"] != other["test_intents"]).mean()
        assert flips["disagreement"] == pytest.approx(differ)
        assert (own["test_confidence"] != other["test_confidence"]).all()


def _never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(budget, "train", fail)


def _measured(folder: Path) -> list[dict[str, Any]]:
    changed = ("breakdown", "calibration", "flips", "retrainings")
    return [{key: run[key] for key in changed if key in run} for run in _runs(folder)]


def test_a_finished_study_is_read_from_its_files(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _measured(out)
    _never_trained(monkeypatch)
    assert main([*COMPARE, "--out", str(out)]) == 0
    assert _measured(out) == before


def test_a_lost_retraining_alone_is_trained_again(out: Path) -> None:
    lost, kept = _retraining(out, "eps-8"), _retraining(out, "eps-inf")
    before, untouched = load_arrays(lost), kept.stat().st_mtime_ns
    lost.unlink()
    assert main([*COMPARE, "--out", str(out)]) == 0
    found = load_arrays(lost)
    np.testing.assert_allclose(found["test_confidence"], before["test_confidence"], rtol=1e-3)
    assert kept.stat().st_mtime_ns == untouched


@pytest.fixture
def old(out: Path, tmp_path: Path) -> Path:
    """The same study, as an earlier version left it."""
    folder = tmp_path / "old"
    for path in out.rglob("*"):
        kept = path.relative_to(out)
        if path.is_file() and "retrainings" not in kept.parts:
            (folder / kept).parent.mkdir(parents=True, exist_ok=True)
            (folder / kept).write_bytes(path.read_bytes())
    settings = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    assert settings.pop("retrainings") == 1
    (folder / "study.json").write_text(json.dumps(settings), encoding="utf-8")
    for path in folder.glob("runs/*/target.npz"):
        arrays = load_arrays(path)
        save_arrays(path, {k: v for k, v in arrays.items() if not k.startswith("test_")})
    for path in folder.glob("runs/*/references/manifest.json"):
        path.unlink()
    return folder


def test_a_study_of_an_earlier_version_has_its_targets_asked_and_nothing_trained(
    old: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _never_trained(monkeypatch)
    assert main([*PLAIN, "--out", str(old)]) == 0
    for found, expected in zip(_measured(old), _measured(out), strict=True):
        assert "retrainings" not in found
        assert found.get("flips") == expected.get("flips")
        assert found["breakdown"] == expected["breakdown"]


def test_a_study_of_an_earlier_version_goes_on_without_retrainings(tmp_path: Path) -> None:
    record = tmp_path / "study.json"
    settings = StudySettings(data="d", references=8)
    assert study_as_begun(settings, record).chosen_retrainings == 1, "a new one"
    record.write_text(json.dumps(settings.to_dict()), encoding="utf-8")
    assert study_as_begun(settings, record).to_dict() == settings.to_dict()
    earlier = settings.to_dict()
    del earlier["retrainings"]
    record.write_text(json.dumps(earlier), encoding="utf-8")
    assert study_as_begun(settings, record).to_dict() == earlier
    asked = replace(settings, retrainings=2)
    assert study_as_begun(asked, record).to_dict() != earlier, "which is refused"
    record.write_text("[]", encoding="utf-8")
    assert study_as_begun(settings, record) == settings


@pytest.mark.parametrize(
    ("references", "asked", "chosen"), [(7, None, 0), (8, None, 1), (8, 0, 0), (0, 2, 2)]
)
def test_one_retraining_is_made_where_many_models_are_trained_anyway(
    references: int, asked: int | None, chosen: int
) -> None:
    settings = StudySettings(data="d", references=references, retrainings=asked, attacks=("loss",))
    assert settings.chosen_retrainings == chosen
    assert settings.to_dict().get("retrainings", 0) == chosen


@pytest.mark.parametrize("number", ["-1", "1000000"])
def test_a_number_of_retrainings_that_cannot_be_is_refused(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    assert main([*PLAIN, "--retrainings", number, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`retrainings`" in line and not out.exists()


def _rows(**labels: Any) -> list[dict[str, Any]]:
    """Calls to one of four people, and alarms, all unlike."""
    return [
        {"text": text, "tokens": text.split(), "split": split}
        | ({"tags": tags} if "tags" in labels else {})
        | ({"intent": intent} if "intent" in labels else {})
        for split, numbers in (("train", range(60)), ("test", range(60, 80)))
        for n in numbers
        for text, tags, intent in (
            (f"call {'abcd'[n % 4]} {n}", ["O", "B-name", "O"], "call"),
            (f"wake up {n}", ["O", "O", "O"], "wake"),
        )
    ]


@pytest.mark.parametrize(
    ("labels", "kinds"), [({"tags": True}, {"slots"}), ({"intent": True}, {"intents"})]
)
def test_slots_without_intents_and_intents_without_slots(
    labels: dict[str, Any], kinds: set[str], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in _rows(**labels)), encoding="utf-8")
    command = [*COMPARE, "--data", str(data), "--batch-size", "20", "--epochs", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    ordinary, private = _runs(tmp_path / "out")
    assert set(private["breakdown"]) == kinds | {"rarest_word"}
    assert ("calibration" in ordinary) == ("intents" in kinds)
    assert private["flips"]["texts"] == 40
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What did privacy change" in page


def test_a_study_without_ordinary_training_compares_with_nothing(tmp_path: Path) -> None:
    command = [*PLAIN, "--epsilons", "8", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    (run,) = _runs(tmp_path / "out")
    assert "flips" not in run and "retrainings" not in run
    assert "change" not in run["breakdown"]["intents"][0]
    assert "What did privacy change" not in (tmp_path / "out" / "report.html").read_text("utf-8")


# ---- groups of people

# A name that is in no text, so that its traces are its own.
NORTH, SOUTH = "North <b>Þ", "South"


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _with_groups(north: str, south: str) -> list[dict[str, Any]]:
    """Whoever calls is of the north, whoever wakes of the south; every fifth says nothing. Some
    test texts of the south have the other label, so that whatever is learnt, groups lie apart."""
    return [
        row
        | ({"group": north if row["intent"] == "call" else south} if place % 5 else {})
        | ({"intent": "call"} if row["split"] == "test" and place % 6 == 1 else {})
        for place, row in enumerate(_rows(intent=True, tags=True))
    ]


def _without_groups() -> list[dict[str, Any]]:
    rows = _with_groups(NORTH, SOUTH)
    return [{key: row[key] for key in row if key != "group"} for row in rows]


GROUPED = [*PLAIN, "--batch-size", "20", "--epochs", "3"]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    data = _write(folder / "data.jsonl", _with_groups(NORTH, SOUTH))
    assert main([*GROUPED, "--data", data, "--out", str(folder / "out")]) == 0
    return folder


def test_accuracy_by_group_is_that_of_the_saved_models(grouped: Path) -> None:
    rows = [row for row in _with_groups(NORTH, SOUTH) if row["split"] == "test"]
    accuracy = []
    for run in _runs(grouped / "out"):
        said = dpnlu.load(grouped / "out" / "runs" / run["name"] / "target").predict(
            [row["text"] for row in rows]
        )
        right = np.array([p.intent == row["intent"] for p, row in zip(said, rows, strict=True)])
        of = {
            name: right[[row.get("group") == name for row in rows]].mean()
            for name in (NORTH, SOUTH)
        }
        found = {row["name"]: row for row in run["breakdown"]["groups"]}
        assert {name: row["right"] for name, row in found.items()} == pytest.approx(of)
        assert [found[name]["test"] for name in (NORTH, SOUTH)] == [16, 16]
        # Half of the training texts that have a group may be audited, and half of those left out.
        assert all(48 >= found[name]["training"] >= 10 for name in (NORTH, SOUTH))
        gap = run["group_gap"]
        assert gap["gap"] == pytest.approx(abs(of[NORTH] - of[SOUTH]))
        accuracy.append(of)
        assert gap["gap"] > 0, "groups that are alike test nothing"
    ordinary, private = (abs(of[NORTH] - of[SOUTH]) for of in accuracy)
    assert gap["change"] == pytest.approx(private - ordinary)
    assert "change" not in _runs(grouped / "out")[0]["group_gap"]


def test_groups_are_in_the_report_and_in_no_other_file(grouped: Path) -> None:
    page = (grouped / "out" / "report.html").read_text(encoding="utf-8")
    assert "Texts by group, the worst first; 8 test texts have no group" in page
    assert "North &lt;b&gt;Þ" in page and "North <b>" not in page
    for path in (grouped / "out" / "runs").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"North" not in content and b"South" not in content, path


def test_other_groups_change_their_entries_alone_and_train_nothing(
    grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which shows that no model has seen them."""
    before = _measured(grouped / "out")
    gaps = [run["group_gap"] for run in _runs(grouped / "out")]
    _never_trained(monkeypatch)
    command = [*GROUPED, "--data", str(grouped / "data.jsonl"), "--out", str(grouped / "out")]
    _write(grouped / "data.jsonl", _with_groups(SOUTH, NORTH))
    assert main(command) == 0
    after = _measured(grouped / "out")
    other = {NORTH: SOUTH, SOUTH: NORTH}
    for old, new, gap, run in zip(before, after, gaps, _runs(grouped / "out"), strict=True):
        swapped = {row["name"]: row for row in new["breakdown"].pop("groups")}
        for row in old["breakdown"].pop("groups"):
            assert swapped[other[row["name"]]] == row | {"name": other[row["name"]]}
        assert old == new
        assert run["group_gap"]["gap"] == gap["gap"]
        assert run["group_gap"]["lowest"] == other[gap["lowest"]]
    _write(grouped / "data.jsonl", _without_groups())
    assert main(command) == 0
    for run in _runs(grouped / "out"):
        assert "groups" not in run["breakdown"] and "group_gap" not in run
    page = (grouped / "out" / "report.md").read_text(encoding="utf-8")
    section = page.partition("## What did privacy change")[2].partition("\n## ")[0]
    assert "Flips" in section and "group" not in section


def test_a_study_draws_and_encodes_the_same_with_and_without_groups(tmp_path: Path) -> None:
    studies = [
        prepare_study(
            StudySettings(data=_write(tmp_path / "d.jsonl", rows), attacks=("loss",), references=0)
        )
        for rows in (_without_groups(), _with_groups(NORTH, SOUTH))
    ]
    plain, with_groups = studies
    assert (plain.study.membership == with_groups.study.membership).all()
    for without, member in zip(plain.study.examples(0), with_groups.study.examples(0), strict=True):
        assert without == replace(member, group=None)
    assert any(example.group == NORTH for example in with_groups.study.examples(0))
    assert plain.settings.to_dict() == with_groups.settings.to_dict()
    assert plain.corpus.tags == with_groups.corpus.tags
    assert plain.corpus.intents == with_groups.corpus.intents


@pytest.mark.parametrize("group", [7, ["a"], " ", {"name": "a"}])
def test_what_is_no_group_is_refused_in_one_line(
    group: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _rows(intent=True)
    rows[3]["group"] = group
    data, out = _write(tmp_path / "data.jsonl", rows), tmp_path / "out"
    assert main([*PLAIN, "--data", data, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{data}, line 4: " in line and "group" in line and not out.exists()
