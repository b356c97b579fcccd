"""Public data and private ones: learnt first, beside, or both, and covered by no budget."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import dpnlu
from dpnlu.cli.main import main
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs import public_data, resumable
from dpnlu.runs.model_directory import load
from dpnlu.runs.train import train


def _rows(intents: dict[str, str], *, slots: bool = False) -> list[dict[str, Any]]:
    rows = []
    for split, numbers in (("train", range(20)), ("test", range(20, 26))):
        for number in numbers:
            for intent, words in intents.items():
                text = f"{words} {number}"
                row: dict[str, Any] = {"text": text, "intent": intent, "split": split}
                if slots:
                    tokens = text.split()
                    row["tokens"] = tokens
                    row["tags"] = ["O"] * (len(tokens) - 1) + ["B-number"]
                rows.append(row)
    return rows


PRIVATE = {"music": "play", "alarm": "wake me at"}
PUBLIC = {"music": "put on", "weather": "rain or sun"}


class Training:
    """`dpnlu train --public` into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "m"
        self.write("private", _rows(PRIVATE))
        self.write("public", _rows(PUBLIC))

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def __call__(self, *more: str, public: bool = True) -> int:
        given = ["--data", str(self.folder / "private.jsonl"), "--out", str(self.out), "--quiet"]
        given += ["--public", str(self.folder / "public.jsonl")] if public else []
        given += ["--delta", "1e-3"]
        given += ["--epsilon", "3", "--batch-size", "8", "--epochs", "1"]
        return main(["train", *given, *more])


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_the_model_knows_what_is_public_and_says_so(training: Training) -> None:
    # Under so much noise nothing is learnt of the private data in one epoch.
    assert training("--epsilon", "0.01", "--learning-rate", "1e-6") == 0
    model = dpnlu.load(training.out)
    assert model.classifier.encoding.labels.intents == ("alarm", "music", "weather")
    (answer,) = model.predict(["rain or sun 3"])
    assert answer.intent == "weather"
    card = (training.out / "README.md").read_text(encoding="utf-8")
    assert "public.jsonl, on which the model was trained first" in card


def test_the_budget_counts_the_private_data_alone(training: Training) -> None:
    assert training() == 0
    saved, ledger = load(training.out), Ledger.read(training.out / "ledger.jsonl")
    assert saved.plan is not None and saved.plan.num_examples == 40
    assert len(ledger) == saved.plan.steps and ledger.epsilon() <= 3


def _interrupted(training: Training, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Begin a training, and end it after its fourth release."""
    really = Ledger.append

    def append(ledger: Ledger, release: Any, **told: Any) -> None:
        really(ledger, release, **told)
        if len(ledger) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", append)
        assert training(*more) == 1


def test_an_interrupted_training_does_not_learn_the_public_data_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = []

    def counted(*given: Any, **named: Any) -> Any:
        learnt.append(len(given[1]))
        return train(*given, **named)

    monkeypatch.setattr(public_data, "train", counted)
    _interrupted(training, monkeypatch)
    assert training("--resume") == 0
    assert learnt == [40]


def test_slots_of_both_are_known(training: Training) -> None:
    training.write("private", _rows(PRIVATE, slots=True))
    training.write("public", _rows(PUBLIC, slots=True))
    assert training() == 0
    assert load(training.out).classifier.encoding.labels.tags == ("B-number", "I-number", "O")


def test_public_data_without_what_the_private_have_are_refused(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.write("private", _rows(PRIVATE, slots=True))
    assert training() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and "public data with slots" in line
    assert not training.out.exists()


def test_public_data_that_are_not_there_are_refused(
    training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    (training.folder / "public.jsonl").unlink()
    assert training() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and "public.jsonl" in line
    assert not training.out.exists()


# ---- beside ----------------------------------------------------------------------------------

# Under so much noise nothing is learnt of the private data, but for what stands out from it.
DROWNED = ("--epsilon", "0.05", "--max-grad-norm", "1e-6", "--epochs", "4")


def test_what_every_step_has_beside_is_learnt_and_the_card_says_so(training: Training) -> None:
    assert training(*DROWNED, "--public-use", "beside", "--public-weight", "0.5") == 0
    answers = dpnlu.load(training.out).predict(["rain or sun 3", "put on 4"])
    assert [answer.intent for answer in answers] == ["weather", "music"]
    card = (training.out / "README.md").read_text(encoding="utf-8")
    assert "not clipped and without noise, was added at every step with weight 0.5" in card
    assert "trained first" not in card
    saved, ledger = load(training.out), Ledger.read(training.out / "ledger.jsonl")
    assert saved.plan is not None and saved.plan.num_examples == 40
    assert len(ledger) == saved.plan.steps and ledger.epsilon() <= 0.05


def test_the_bound_may_be_what_public_data_tell(training: Training) -> None:
    assert training("--public-use", "beside", "--clipping", "public:0.5") == 0
    ledger = Ledger.read(training.out / "ledger.jsonl")
    assert ledger.bound is not None and 0 < ledger.bound < math.inf
    card = (training.out / "README.md").read_text(encoding="utf-8")
    told = f"norm at most what public examples told before each step, at last {ledger.bound:.4g},"
    assert f"{told} per example (public:0.5 clipping)" in card


@pytest.mark.parametrize(("use", "first"), [("beside", []), ("both", [40])])
def test_an_interrupted_training_goes_on_with_public_data_beside(
    training: Training, monkeypatch: pytest.MonkeyPatch, use: str, first: list[int]
) -> None:
    ordinary, beside = [], []

    def taught(*given: Any, **named: Any) -> Any:
        ordinary.append(len(given[1]))
        return train(*given, **named)

    def told(*given: Any, **named: Any) -> Any:
        beside.append(named["public"].count)
        return train(*given, **named)

    monkeypatch.setattr(public_data, "train", taught)
    monkeypatch.setattr(resumable, "train", told)
    asked = ("--public-use", use, "--clipping", "public:0.5")
    _interrupted(training, monkeypatch, *asked)
    before = Ledger.read(training.out / "ledger.jsonl")
    assert len(before) == 4
    assert training("--resume", *asked) == 0
    assert ordinary == first and beside == [40, 40]
    ledger = Ledger.read(training.out / "ledger.jsonl")
    assert len(ledger) == ledger.plan.steps and ledger.epsilon() <= 3
    assert ledger.identity == before.identity


@pytest.mark.parametrize(
    "other", [("--public-use", "first"), ("--public-use", "beside", "--public-weight", "0.5")]
)
def test_an_interrupted_training_goes_on_as_it_began(
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    other: tuple[str, ...],
) -> None:
    _interrupted(training, monkeypatch, "--public-use", "beside")
    assert training("--resume", *other) == 2
    assert "settings with which the training" in capsys.readouterr().err
    training.write("public", _rows(PUBLIC | {"music": "louder"}))
    assert training("--resume", "--public-use", "beside") == 2
    assert "data with which the training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "public", "message"),
    [
        (["--public-use", "beside"], False, "--public with --public-use beside"),
        (["--public-use", "later"], True, "`public_use` to be one of first, beside, both"),
        (["--public-weight", "0.5"], True, "--public-weight with --public-use"),
        (["--public-weight", "-1", "--public-use", "both"], True, "`public_weight`"),
        (["--public-weight", "0", "--public-use", "both"], True, "weight > 0"),
        (["--public-use", "beside", "--epsilon", "inf"], True, "a finite ε, with public"),
        (["--clipping", "public:0.5"], True, "--public SPEC --public-use beside"),
        (["--clipping", "public:0.5"], False, "--public SPEC --public-use beside"),
        (["--public-use", "beside", "--engine", "opacus"], True, "'opacus'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    training: Training,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    public: bool,
    message: str,
) -> None:
    assert training(*given, public=public) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and message in line
    assert not training.out.exists()


@pytest.mark.parametrize("command", ["compare --epsilons 8", "diagnose --epsilon 8 --public"])
def test_what_takes_no_public_data_refuses_their_bound_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = ["--out", str(tmp_path / "there")] if command.startswith("compare") else []
    asked = [*command.split(), "--data", "synthetic:200", "--clipping", "public:0.5", "--quiet"]
    assert main([*asked, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got public:0.5, which `dpnlu train` alone takes" in line
    assert not list(tmp_path.iterdir())


def test_references_of_a_model_clipped_by_public_norms_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tmp_path / "model"), tmp_path / "report"
    beside = "--public synthetic:80 --public-use beside --clipping public:0.5 --epochs 0.5"
    trained = ["train", "--data", "synthetic:60", "--epsilon", "8", *beside.split()]
    assert main([*trained, "--quiet", "--out", model]) == 0
    capsys.readouterr()
    attack = ["attack", model, "--data", "synthetic:60", "--audit-examples", "20", "--quiet"]
    assert main([*attack, "--attacks", "lira", "--references", "2", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got one clipped by public:0.5: set --references 0" in line and not out.exists()
    assert main([*attack, "--attacks", "loss", "--references", "0", "--out", str(out)]) == 0


@pytest.mark.parametrize("public", [True, False])
def test_a_report_says_that_references_lack_the_public_data(tmp_path: Path, public: bool) -> None:
    model, out = str(tmp_path / "model"), tmp_path / "report"
    train = ["train", "--data", "synthetic:60", "--epsilon", "8", "--epochs", "0.5", "--quiet"]
    assert main([*train, *["--public", "synthetic:80"][: 2 * public], "--out", model]) == 0
    attack = ["attack", model, "--data", "synthetic:60", "--audit-examples", "20", "--quiet"]
    assert main([*attack, "--attacks", "lira", "--references", "2", "--out", str(out)]) == 0
    (run,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["runs"]
    said = [warning for warning in run["warnings"] if "its reference models did not" in warning]
    assert len(said) == public
