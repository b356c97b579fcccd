"""Defences as options of training: each does what it says, and is refused where it cannot."""

import json
from pathlib import Path

import pytest

import dpnlu
from dpnlu.cli.main import main
from dpnlu.nlu.classifier import Architecture
from dpnlu.nlu.encoding import WordEncoding, without_digits
from dpnlu.runs.model_directory import load

QUICK = ("--data", "synthetic:300", "--epsilon", "inf", "--epochs", "1", "--quiet")


def _rows(splits: tuple[str, ...]) -> str:
    rows = [
        {"text": text, "tokens": text.split(), "tags": tags, "intent": intent, "split": split}
        for split in splits
        for number in range(12)
        for text, tags, intent in (
            (f"call 555-01{number:02} {split}", ["O", "B-number", "O"], "call"),
            (f"wait {number} minutes {split}", ["O", "B-time", "I-time", "O"], "wait"),
        )
    ]
    return "\n".join(json.dumps(row) for row in rows)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "data.jsonl"
    path.write_text(_rows(("train", "valid", "test")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("redacted") / "model"
    command = ["train", "--data", str(corpus), "--epsilon", "inf", "--epochs", "3", "--quiet"]
    command += ["--redact-digits", "--vocabulary", "fitted", "--characters", "4"]
    assert main([*command, "--out", str(out)]) == 0
    return out


class TestRedaction:
    def test_a_saved_model_reads_all_numbers_alike(self, model: Path) -> None:
        loaded = dpnlu.load(model)
        first, second, other = loaded.predict(["call 555-0199", "call 421-7730", "call 42"])
        assert first.probability == second.probability != other.probability
        assert load(model).classifier.architecture.redact_digits

    def test_no_number_is_among_its_files(self, model: Path) -> None:
        words = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))
        assert "000-0000" in json.dumps(words) and "555" not in json.dumps(words)

    def test_digits_of_every_script_are_digits(self) -> None:
        assert without_digits(["7pm", "٣", "five", "²"]) == ["0pm", "0", "five", "0"]

    def test_a_sub_word_encoder_redacts_too(self, tiny_encoder: Path, tmp_path: Path) -> None:
        command = ["train", *QUICK, "--model", f"encoder:{tiny_encoder}", "--redact-digits"]
        assert main([*command, "--out", str(tmp_path / "model")]) == 0
        encoding = load(tmp_path / "model").classifier.encoding
        assert encoding.redact_digits and not isinstance(encoding, WordEncoding)
        read = [encoding.read(("call", digits))["subwords"].tolist() for digits in ("42", "17")]
        assert read[0] == read[1]


def test_the_weights_of_early_stopping_are_those_of_a_shorter_training(
    corpus: Path, tmp_path: Path
) -> None:
    command = ["train", "--data", str(corpus), "--epsilon", "inf", "--epochs", "400", "--quiet"]
    command += ["--patience", "1", "--weight-decay", "0.1"]
    assert main([*command, "--out", str(tmp_path / "model")]) == 0
    saved = load(tmp_path / "model")
    assert saved.metrics["steps"] <= 400 * 24 // 64 + 1
    assert (saved.recipe.patience, saved.recipe.weight_decay) == (1, 0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--epsilon", "3", "--patience", "2"], "patience in ordinary training alone"),
        (["--epsilon", "inf", "--patience", "0"], "`patience` >= 1"),
        (["--epsilon", "inf", "--weight-decay", "-1"], "`weight_decay`"),
        (["--epsilon", "inf", "--characters", "-1"], "filters over characters"),
        (["--epsilon", "inf", "--characters", "5", "--model", "encoder:x"], "and 0 for an encoder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: list[str],
    says: str,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model"
    assert main(["train", "--data", str(corpus), "--quiet", *options, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert not out.exists()


def test_patience_without_a_validation_split_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(_rows(("train", "test")), encoding="utf-8")
    for command in (["train", "--epsilon", "inf"], ["compare", "--epsilons", "inf"]):
        command += ["--data", str(tmp_path / "data.jsonl"), "--patience", "1", "--quiet"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert "a validation split" in message and message.count("\n") == 1


def test_an_older_model_without_these_settings_can_be_read() -> None:
    old = {"name": "lstm", "embedding_size": 5, "dropout": 0.1, "freeze_encoder": False}
    assert not Architecture(**old).redact_digits
