"""Corpora with slots and without intents: loaded, trained on, measured, attacked."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpnlu.cli.main import main
from dpnlu.nlu.classifier import Architecture, Classifier, build
from dpnlu.nlu.data import Corpus, DataError, Example, HashedVocabulary, load_corpus, read_labels
from dpnlu.nlu.encoding import Labels, SubwordEncoding, WordEncoding, encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.metrics import evaluate
from dpnlu.nlu.models import EncoderClassifier, Outputs, intent_slot_loss

NAMES = ("anna", "berta", "carla", "dora")
TAGS = ("B-x", "I-x", "O")
SLOTS = Labels((), TAGS)
EXAMPLE = Example(
    id="1",
    text="a b c",
    tokens=("a", "b", "c"),
    tags=("O", "B-x", "I-x"),
    intent=None,
    split="train",
)


def _rows(**more: str) -> list[dict[str, object]]:
    """Calls to one of four names, which are slots, and alarms, which have none; all unlike."""
    return [
        {"text": text, "tokens": text.split(), "tags": tags, "split": split} | more
        for split, numbers in (("train", range(60)), ("test", range(60, 80)))
        for n in numbers
        for text, tags in (
            (f"call {NAMES[n % 4]} {n}", ["O", "B-name", "O"]),
            (f"wake up {n}", ["O", "O", "O"]),
        )
    ]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[list[dict[str, object]]], Path]:
    def write(rows: list[dict[str, object]]) -> Path:
        path = tmp_path / "slots.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("more", [{}, {"intent": "book_flight"}], ids=["no intent", "one intent"])
def test_a_corpus_of_slots_has_no_intents(written, more: dict[str, str]) -> None:
    corpus = load_corpus(str(written(_rows(**more))))
    assert not corpus.has_intents and corpus.intents == ()
    assert corpus.tags == ("B-name", "I-name", "O")
    assert not corpus.labels_are_public
    declared = Corpus(name="c", examples=corpus.examples, declared_slots=("name",))
    assert declared.labels_are_public


def test_an_intent_on_some_rows_alone_is_refused(written) -> None:
    rows = _rows()
    rows[3]["intent"] = "call"
    with pytest.raises(DataError, match="an intent on all examples or on none"):
        load_corpus(str(written(rows)))


def test_declared_labels_may_be_of_slots_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text('{"slots": ["name"]}', encoding="utf-8")
    assert read_labels(path) == (None, ("name",))
    path.write_text('{"intents": null}', encoding="utf-8")
    with pytest.raises(DataError, match="no intents and no slots"):
        read_labels(path)


def test_labels_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="got neither"):
        Labels((), ())


def test_a_model_of_slots_refuses_examples_without() -> None:
    bare = Example(id="1", text="a", tokens=("a",), tags=None, intent="x", split="train")
    with pytest.raises(DataError, match="all that the model knows"):
        SLOTS.encode(bare)
    assert SLOTS.encode(EXAMPLE).keys() == {"tags"}


def _classifier(kind: str, encoder: Path) -> Classifier:
    name = "lstm" if kind == "lstm" else f"encoder:{encoder}"
    torch.manual_seed(0)
    return build(Architecture(name=name), SLOTS, HashedVocabulary(20))


@pytest.mark.parametrize("kind", ["lstm", "encoder"])
def test_the_loss_is_that_of_the_slots(kind: str, tiny_encoder: Path) -> None:
    classifier = _classifier(kind, tiny_encoder)
    model = classifier.model
    if model.slot_head is not None:
        torch.nn.init.normal_(model.slot_head.weight)
    assert model.intent_head is None
    assert isinstance(classifier.encoding, WordEncoding | SubwordEncoding)
    batch = classifier.encoding.collate(encode_all(classifier.encoding, [EXAMPLE]))
    outputs = model.eval()(batch)
    assert outputs.intents is None
    logs = outputs.tags[0].log_softmax(1)
    expected = -(logs[0, 2] + logs[1, 0] + logs[2, 1]) / 3
    torch.testing.assert_close(model.per_example_loss(batch), expected[None])


def test_a_loss_of_both_is_the_sum(tiny_encoder: Path) -> None:
    intents, tags = torch.randn(2, 4), torch.randn(2, 3, 5)
    batch = {"intents": torch.tensor([0, 3]), "tags": torch.tensor([[0, 4, -100], [1, 1, 1]])}
    parts = [
        intent_slot_loss(Outputs(*outputs), batch)
        for outputs in ((intents, tags), (intents, None), (None, tags))
    ]
    torch.testing.assert_close(parts[0], parts[1] + parts[2])


def test_a_frozen_encoder_is_read_once_for_slots_alone(tiny_encoder: Path) -> None:
    classifier = _classifier("encoder", tiny_encoder)
    model, encoding = classifier.model.eval(), classifier.encoding
    assert isinstance(model, EncoderClassifier)
    encoded = encode_all(encoding, [EXAMPLE])
    cached = read_once(model, encoding, encoded)
    assert cached[0].keys() == {"states", "tags", "lengths"}
    outputs = [model(encoding.collate(batch)).tags for batch in (encoded, cached)]
    torch.testing.assert_close(*outputs)


def test_what_is_measured_is_the_slots() -> None:
    encoding = WordEncoding(SLOTS, HashedVocabulary(9))

    class SaysTwice(torch.nn.Module):
        """B-x and I-x in the last two words, as is right of the first example of two."""

        def forward(self, batch: dict[str, torch.Tensor]) -> Outputs:
            tags = torch.zeros(2, 3, 3)
            tags[:, 0, 2] = tags[:, 1, 0] = tags[:, 2, 1] = 1
            return Outputs(None, tags)

    other = Example(
        id="2", text="a b c", tokens=("a", "b", "c"), tags=("O",) * 3, intent=None, split="train"
    )
    examples = [EXAMPLE, other]
    found = evaluate(SaysTwice(), encoding, encode_all(encoding, examples), examples)
    assert found.to_dict() == {
        "slot_f1": pytest.approx(2 / 3),
        "frame_accuracy": 0.5,
        "examples": 2,
    }


@pytest.mark.parametrize("epsilon", ["inf", "1000"])
def test_slots_are_trained_from_the_command_line(written, tmp_path: Path, epsilon: str) -> None:
    """Four names are learnt without noise, and with little."""
    out, data = tmp_path / "model", str(written(_rows(intent="x")))
    arguments = ["train", "--data", data, "--epsilon", epsilon, "--delta", "1e-3", "--quiet"]
    more = ["--epochs", "8", "--batch-size", "30", "--learning-rate", "0.03", "--out", str(out)]
    assert main([*arguments, *more]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert "intent_accuracy" not in metrics and metrics["slot_f1"] > 0.8
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "slot f1" in card and "intent accuracy" not in card
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["intents"] == []


def test_a_model_of_slots_is_attacked(written, tmp_path: Path) -> None:
    model, out, data = tmp_path / "model", tmp_path / "attacked", str(written(_rows()))
    train = f"train --data {data} --epsilon inf --epochs 2 --quiet --out {model}"
    assert main(train.split()) == 0
    attack = f"attack {model} --data {data} --references 2 --audit-examples 40 --quiet --out {out}"
    assert main(attack.split()) == 0
    (run,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["runs"]
    assert "intent_accuracy" not in run and run["membership"].keys() == {"loss", "lira", "rmia"}


@pytest.mark.slow
def test_a_study_of_slots_attacks_and_reports_them(written, tmp_path: Path) -> None:
    """Few rows, seen thirty times: they are remembered, and slots alone tell it."""
    out, data = tmp_path / "study", str(written(_rows()))
    arguments = f"compare --data {data} --epsilons inf --epochs 2 --references 2 --quiet"
    more = f"--audit-examples 60 --canaries pin:2:R=2 --out {out}"
    assert main([*arguments.split(), *more.split()]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (run,) = report["runs"]
    absent = {"intent_accuracy", "intent_accuracy_interval", "reference_accuracy"}
    assert not absent & run.keys() and "slot_f1" in run
    assert "intents" not in report["data"] and report["data"]["slots"] == 1
    assert run["membership"].keys() == {"loss", "lira", "rmia"}
    assert all(math.isfinite(found["auc"]) for found in run["membership"].values())
    assert run["canary"]["available_bits"] == pytest.approx(math.log2(100))
    assert "audit" in run
    assert "device" not in json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert "Intent accuracy is" not in (out / "report.md").read_text(encoding="utf-8")
