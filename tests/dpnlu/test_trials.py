"""The best of several trainings: what is kept, what it costs, and what an interruption leaves."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpnlu
from dpnlu.accounting.tuning import NUMBERS, calibrate_tuning, tuning_epsilon
from dpnlu.cli.main import main
from dpnlu.mechanism import selection
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs import trials
from dpnlu.runs.model_directory import load
from dpnlu.runs.trials import searched

ROWS = [
    {"text": f"{word} {number}", "intent": intent, "split": split}
    for split, numbers in (("train", range(12)), ("valid", range(12, 16)), ("test", range(16, 20)))
    for number in numbers
    for word, intent in (("play", "music"), ("wake me at", "alarm"))
]
SPACE = "learning_rate=0.01,0.02:max-grad-norm=0.5,1"
FILES = {
    *("README.md", "config.json", "ledger.jsonl", "metrics.json", "selection.json"),
    *("model.safetensors", "plan.json", "vocabulary.json"),
}


class Training:
    """`dpnlu train --trials` into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "m"
        self.record = self.out / "trials.json"
        self.write(ROWS)
        (folder / "words.txt").write_text("play\nwake\nme\nat\n", encoding="utf-8")

    def write(self, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "data.jsonl").write_text(text, encoding="utf-8")

    def __call__(self, *more: str, trials: str | None = "3", search: str | None = SPACE) -> int:
        given = ["--data", str(self.folder / "data.jsonl"), "--out", str(self.out), "--quiet"]
        given += ["--vocabulary", str(self.folder / "words.txt"), "--epsilon", "3"]
        given += ["--delta", "1e-3", "--batch-size", "8", "--epochs", "1"]
        given += [] if trials is None else ["--trials", trials]
        given += [] if search is None else ["--search", search]
        return main(["train", *given, *more])

    def drawn(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return content


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has a given number of trainings drawn."""

    def draw(count: int) -> None:
        monkeypatch.setattr(trials, "draw_trials", lambda *_: count)

    return draw


@pytest.mark.parametrize("number", ["fixed", "geometric", "logarithmic"])
def test_the_budget_is_that_of_the_whole(
    training: Training, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setattr(selection, "_NUMBERS", (number,))
    assert training() == 0
    assert {path.name for path in training.out.rglob("*")} == FILES
    saved, model = load(training.out), dpnlu.load(training.out)
    assert saved.selection is not None and saved.plan is not None
    recorded = Ledger.read(training.out / "ledger.jsonl")
    assert len(recorded) == saved.plan.steps
    whole = tuning_epsilon(saved.plan.events(), trials=3, number=saved.selection.number, delta=1e-3)
    assert recorded.epsilon() < whole <= 3
    assert whole > 2.95
    assert saved.metrics["epsilon"] == pytest.approx(whole) == model.epsilon
    card = (training.out / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"\*\*\(ε = ([\d.]+), δ = 0.001\)", card)
    assert whole <= float(stated) <= whole * 1.001
    assert saved.selection.number == number and "validation split" in card
    if number == "fixed":
        assert "3 trainings together" in card
    else:
        assert f"{number} distribution of mean 3 and is told to nobody" in card


def test_the_number_is_drawn_in_the_way_that_needs_the_least_noise(training: Training) -> None:
    assert training() == 0
    saved = load(training.out)
    assert saved.plan is not None
    noises = [
        calibrate_tuning(
            lambda sigma: saved.plan.with_noise(sigma).events(),  # type: ignore[union-attr]
            trials=3,
            number=number,
            target_epsilon=3,
            delta=1e-3,
        )
        for number in NUMBERS
        if number != "poisson"
    ]
    assert saved.plan.noise_multiplier == pytest.approx(min(noises), rel=5e-3)


def test_what_does_best_on_the_validation_split_is_kept(
    training: Training, draws: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(4)
    scores = iter([0.2, 0.9, 0.5, 0.9])
    seen = []

    def score(metrics: Any) -> float:
        seen.append(metrics.examples)
        return next(scores)

    monkeypatch.setattr(trials, "_score", score)
    kept: list[Any] = []
    really = trials._tidy

    def tidy(directory: Path) -> None:
        places = [directory / "trials" / str(number) for number in range(4)]
        kept.extend((place / "model.safetensors").read_bytes() for place in places)
        really(directory)

    monkeypatch.setattr(trials, "_tidy", tidy)
    assert training() == 0
    assert seen == [8] * 4  # the validation split, not the test split with its own size
    released = (training.out / "model.safetensors").read_bytes()
    assert kept.index(released) == 1 and len(set(kept)) == 4


def test_settings_are_drawn_from_the_whole_space(
    training: Training, draws: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(64)
    monkeypatch.setattr(trials, "_trained", _stop)
    assert training() == 1
    drawn = training.drawn()["drawn"]
    pairs = {(one["learning_rate"], one["max_grad_norm"]) for one in drawn}
    assert pairs == {(0.01, 0.5), (0.01, 1.0), (0.02, 0.5), (0.02, 1.0)}
    counts = [sum(one == other for other in drawn) for one in drawn]
    assert min(counts) > 2  # 64 draws of 4: fewer than 3 with probability 1e-4


def test_a_known_number_of_trainings_takes_every_combination_as_often(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_NUMBERS", ("fixed",))
    monkeypatch.setattr(trials, "_trained", _stop)
    assert training(trials="8") == 1
    drawn = training.drawn()["drawn"]
    assert len(drawn) == 8
    assert all(sum(one == other for other in drawn) == 2 for one in drawn)


def _stop(*_: Any) -> Any:
    raise KeyboardInterrupt


# ---- interrupted -------------------------------------------------------------------------------


def _interrupt(monkeypatch: pytest.MonkeyPatch, training: Training, *, after: int) -> None:
    """Stop when so many releases were recorded, of all trainings together."""
    really, count = Ledger.append, [0]

    def append(ledger: Ledger, release: Any) -> None:
        really(ledger, release)
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", append)
        assert training() == 1


def test_interrupted_trainings_are_resumed(
    training: Training,
    draws: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draws(3)
    _interrupt(monkeypatch, training, after=5)  # each has three
    before = training.drawn()
    first = (training.out / "trials" / "0" / "model.safetensors").read_bytes()
    assert len(before["scores"]) == 1
    capsys.readouterr()
    assert training() == 2 and "--resume" in capsys.readouterr().err
    assert training("--resume", trials="4") == 2 and "repeat those" in capsys.readouterr().err
    monkeypatch.setattr(trials, "_score", lambda metrics: 0.0)  # the first is at least as good
    assert training("--resume") == 0
    assert {path.name for path in training.out.rglob("*")} == FILES
    assert (training.out / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("place", ["save", "_tidy"])
def test_a_choice_is_completed_that_was_interrupted_at_its_end(
    training: Training, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(trials, place, _stop)
        assert training() == 1
    assert training("--resume") == 0
    assert {path.name for path in training.out.rglob("*")} == FILES
    assert load(training.out).metrics["epsilon"] <= 3


def test_other_data_are_refused(
    training: Training,
    draws: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draws(2)
    _interrupt(monkeypatch, training, after=3)
    training.write([*ROWS[:-1], ROWS[-1] | {"text": "something else"}])
    assert training("--resume") == 2
    assert "other texts" in capsys.readouterr().err


def test_a_changed_record_is_refused(
    training: Training,
    draws: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draws(2)
    _interrupt(monkeypatch, training, after=3)
    training.record.write_text('{"settings": {}}', encoding="utf-8")
    assert training("--resume") == 2
    assert "trials.json" in capsys.readouterr().err


def test_diverged_trainings_are_passed_over(
    training: Training, draws: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws(4)
    space = "learning_rate=0.01,1e38"
    monkeypatch.setattr(trials, "_numbers", lambda *_: [1, 0, 1, 0])
    assert training("--epochs", "4", search=space) == 0
    assert load(training.out).recipe.learning_rate == 0.01


def test_nothing_is_kept_where_all_diverge(
    training: Training, draws: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    draws(2)
    assert training("--epochs", "4", search="learning_rate=1e38") == 1
    assert "diverged" in capsys.readouterr().err
    assert not (training.out / "config.json").exists()


# ---- refused -----------------------------------------------------------------------------------

REFUSED = {
    "a setting of the plan": ({"search": "batch_size=4,8"}, "does not depend"),
    "a setting twice": ({"search": "dropout=0,0.1:dropout=0.2"}, "twice"),
    "no number": ({"search": "learning_rate=fast"}, "floats joined by commas"),
    "nothing": ({"search": "learning_rate=0.1,,0.2"}, "got ''"),
    "no name": ({"search": ""}, "to name"),
    "out of range": ({"search": "dropout=0,1.5"}, "dropout"),
    "a search without trials": ({"trials": None}, "--trials with --search"),
    "no trials": ({"trials": "0"}, "trials"),
    "half a trial": ({"trials": "0.5"}, "trials"),
    "not a number of trials": ({"trials": "nan"}, "trials"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_is_written(
    training: Training, capsys: pytest.CaptureFixture[str], case: tuple[dict[str, Any], str]
) -> None:
    given, says = case
    assert training(**given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and says in line, line
    assert not training.out.exists() or not list(training.out.iterdir())


def test_ordinary_trainings_are_refused(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training("--epsilon", "inf") == 2
    assert "finite --epsilon" in capsys.readouterr().err


def test_data_without_a_validation_split_are_refused(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.write([row for row in ROWS if row["split"] != "valid"])
    assert training() == 2
    assert "validation split" in capsys.readouterr().err


def test_one_training_is_as_ever(training: Training) -> None:
    assert training(trials=None, search=None) == 0
    assert {path.name for path in training.out.rglob("*")} == FILES - {"selection.json"}
    assert load(training.out).selection is None


def test_a_space_is_read_as_its_settings_are() -> None:
    assert searched(None) == {}
    assert searched("slot_loss=chain,words:characters=0,50:weight-decay=0.1") == {
        "slot_loss": ["chain", "words"],
        "characters": [0, 50],
        "weight_decay": [0.1],
    }


def test_an_attack_on_the_best_is_told_the_budget_of_the_whole(
    training: Training, tmp_path: Path
) -> None:
    assert training() == 0
    given = ["--data", str(tmp_path / "data.jsonl"), "--attacks", "loss", "--references", "0"]
    assert main(["attack", str(training.out), *given, "--out", str(tmp_path / "r"), "--quiet"]) == 0
    (run,) = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))["runs"]
    assert run["epsilon"] == load(training.out).metrics["epsilon"]
    assert "second_epsilon" not in run  # no second accountant tells that of a choice
    assert any("best of several trainings" in warning for warning in run["warnings"])
