"""The script that makes the table of defences, at a size that tells nothing."""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def defences(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = import_module("defences")
    small = {"epochs": 1.0, "dropout": 0.0}
    cells = [
        module.Cell(name="none", canary="pin:2:R=5", changes=small, rounded=2),
        module.Cell(name="redacted", canary="pin:2:R=5", changes=small | {"redact_digits": True}),
        module.Cell(name="private", canary="pin:2:R=5", changes={"epochs": 1.0}, epsilon=8.0),
    ]
    long = module.Cell(name="long", canary="pin:7:R=5", changes=small, searches=("labels alone",))
    monkeypatch.setattr(module, "DEFENCES", tuple(cells))
    monkeypatch.setattr(module, "ATTACKED", (long,))
    monkeypatch.setattr(module, "SAMPLE", 200)
    return module


def _run(defences: ModuleType, out: Path, options: Sequence[str] = ()) -> list[dict[str, object]]:
    command = ["--data", "synthetic:300", "--name", "some", "--out", str(out), *options]
    defences.main([*command])
    lines = (out / "some.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_a_row_per_model_a_table_and_a_picture(defences: ModuleType, tmp_path: Path) -> None:
    rows = _run(defences, tmp_path, ["--models", "2"])
    assert [(row["cell"], row["model"]) for row in rows] == [
        (cell, number)
        for number in (0, 1)
        for cell in ("none", "probabilities to 2 decimals", "redacted", "private")
    ]
    for row in rows:
        found = row["attacks"]["enumeration"]
        assert (row["rank"] == 1) == (found["wrong"] == 0) or row["rank"] < 100
        assert row["best_loss"] <= row["true_loss"] + 1e-9
    assert rows[0]["secret"] != rows[4]["secret"]
    private = rows[3]
    assert private["epsilon"] <= 8 < private["group_epsilon"]
    page = (tmp_path / "some.md").read_text(encoding="utf-8")
    assert "| redacted | 2 |" in page and "2 [" in page
    assert (tmp_path / "some.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_it_goes_on_where_it_stopped(
    defences: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _run(defences, tmp_path, ["--models", "1", "--cells", "redacted"])
    with (tmp_path / "some.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"cell": "none", "mod')  # killed while it was written
    trained = []
    make = defences.rows_of

    def counted(cell: object, number: int, **options: object) -> object:
        trained.append((cell.name, number))
        return make(cell, number, **options)

    monkeypatch.setattr(defences, "rows_of", counted)
    rows = _run(defences, tmp_path, ["--models", "1"])
    assert rows[: len(first)] == first
    assert trained == [("none", 0), ("private", 0)]
    trained.clear()
    assert _run(defences, tmp_path, ["--models", "1"]) == rows and not trained


def test_no_model_is_begun_without_time(defences: ModuleType, tmp_path: Path) -> None:
    assert _run(defences, tmp_path, ["--minutes", "-1"]) == []


def test_rows_of_other_settings_are_not_mixed_in(defences: ModuleType, tmp_path: Path) -> None:
    _run(defences, tmp_path, ["--minutes", "-1"])
    with pytest.raises(ValueError, match="choose another --name"):
        _run(defences, tmp_path, ["--seed", "1"])


def test_secrets_too_many_to_score_have_an_estimate(defences: ModuleType, tmp_path: Path) -> None:
    (row,) = _run(defences, tmp_path, ["--attacks", "--models", "1"])
    assert "rank" not in row and "enumeration" not in row["attacks"]
    assert 0 <= row["exposure"] <= 23.3
    assert "| long | 1 | – |" in (tmp_path / "some.md").read_text(encoding="utf-8")


def test_the_cells_that_are_measured_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their settings exist, and their names are their own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = import_module("defences")
    for cells in (module.DEFENCES, module.ATTACKED):
        names = [name for cell in cells for name in cell.names]
        assert len(set(names)) == len(names)
        for cell in cells:
            module.TrainSettings(data="d", epsilon=cell.epsilon, **cell.changes)
            module.parse_canary(cell.canary)
