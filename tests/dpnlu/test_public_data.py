"""Public data beside private ones: learnt first, without noise, and covered by no budget."""

import json
from pathlib import Path
from typing import Any

import pytest

import dpnlu
from dpnlu.cli.main import main
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs import public_data
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

    def __call__(self, *more: str) -> int:
        given = ["--data", str(self.folder / "private.jsonl"), "--out", str(self.out), "--quiet"]
        given += ["--public", str(self.folder / "public.jsonl"), "--delta", "1e-3"]
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


def test_an_interrupted_training_does_not_learn_the_public_data_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, learnt = Ledger.append, []

    def append(ledger: Ledger, release: Any) -> None:
        really(ledger, release)
        if len(ledger) == 4:
            raise KeyboardInterrupt

    def counted(*given: Any, **named: Any) -> Any:
        learnt.append(len(given[1]))
        return train(*given, **named)

    monkeypatch.setattr(public_data, "train", counted)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", append)
        assert training() == 1
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
