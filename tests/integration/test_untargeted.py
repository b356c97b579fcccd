"""Values that a model was trained on, told from others without any canary."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.gazetteer import FIRST_NAMES
from attacks.report import validate
from dpnlu.cli.main import main
from dpnlu.compare.untargeted import untargeted_entry
from dpnlu.nlu.classifier import Architecture, build
from dpnlu.nlu.data import HashedVocabulary, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.runs.model_directory import load

SEEN = FIRST_NAMES[:60:2]
CARRIERS = ("call", "write to", "please ring", "tell")


def _rows() -> list[dict[str, object]]:
    rows = []
    for split, names in (("train", SEEN), ("test", ("zoe", "kim"))):
        for name in names:
            for carrier in CARRIERS:
                tokens = [*carrier.split(), name]
                tags = ["O"] * (len(tokens) - 1) + ["B-person"]
                rows.append({"tokens": tokens, "tags": tags, "intent": "talk", "split": split})
        for word in ("music", "lights", "heating", "radio", "oven", "fan") * 4:
            for carrier in CARRIERS:
                tokens = [*carrier.split(), word]
                rows.append(
                    {"tokens": tokens, "tags": ["O"] * len(tokens), "intent": "do", "split": split}
                )
    return [{"text": " ".join(row["tokens"])} | row for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("people") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, _rows())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "model"
    command = ["train", "--data", str(data), "--epsilon", "inf", "--epochs", "30", "--quiet"]
    assert main([*command, "--dropout", "0", "--out", str(out)]) == 0
    return out


def test_a_model_gives_away_whom_it_knows(data: Path, model: Path) -> None:
    classifier, corpus = load(model).classifier, load_corpus(str(data), seed=0)
    found = untargeted_entry(classifier, corpus, slot="person", values=FIRST_NAMES)
    assert found["trained_on"] == len(SEEN)
    assert found["auc"] > 0.9
    assert found["precision_at"][0]["precision"] == 1.0
    assert {entry["value"] for entry in found["first"]} <= set(SEEN)
    assert found["carriers"] == len(CARRIERS)
    assert not found["calibrated"]


def test_models_that_were_not_trained_are_right_by_chance(data: Path) -> None:
    corpus = load_corpus(str(data), seed=0)
    found = []
    for seed in range(12):
        torch.manual_seed(seed)
        classifier = build(
            Architecture(name="lstm", embedding_size=8, hidden_size=8),
            Labels(("do", "talk"), ("B-person", "O")),
            HashedVocabulary(),
        )
        entry = untargeted_entry(classifier, corpus, slot="person", values=FIRST_NAMES)
        found.append(entry["auc"])
    # Of an AUC by chance the deviation is sqrt((a + b + 1) / 12 a b), here about 0.06.
    assert abs(np.mean(found) - 0.5) < 4 * 0.06 / np.sqrt(len(found))


def test_a_model_is_no_reference_for_itself(data: Path, model: Path) -> None:
    classifier, corpus = load(model).classifier, load_corpus(str(data), seed=0)
    found = untargeted_entry(
        classifier, corpus, slot="person", values=FIRST_NAMES, reference=classifier
    )
    assert found["calibrated"] and found["auc"] == 0.5


def test_by_the_command(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["attack", str(model), "--data", str(data), "--attacks", "untargeted"]
    command += ["--slot", "person", "--candidates", *FIRST_NAMES, "--references", "0", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "100% of the first 10" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    validate(report)
    assert report["runs"][0]["untargeted"]["slot"] == "person"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--slot", "city"], "at least 3 values of the slot 'city' that were trained on"),
        (["--slot", "person", "--candidates", *SEEN[:2]], "got 2 and"),
        (["--slot", "person", "--public", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused(
    options: list[str],
    says: str,
    data: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["attack", str(model), "--data", str(data), "--attacks", "untargeted", *options]
    assert main([*command, "--references", "0", "--quiet", "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_study_has_no_directory_to_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", "synthetic:300", "--attacks", "untargeted", "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "`dpnlu attack` alone" in capsys.readouterr().err
