"""Signals against their definitions, where float32 probabilities would have lost them."""

import numpy as np
import pytest
import torch
from torch import nn

from attacks.signals import Predictions, collect


@pytest.fixture
def predictions():
    torch.manual_seed(0)
    tags = torch.randint(0, 5, (6, 4))
    tags[0, 2:] = tags[3, 1:] = -100
    return Predictions(torch.randn(6, 3), torch.randint(0, 3, (6,)), torch.randn(6, 4, 5), tags)


def _read(*batches):
    return collect(nn.Identity(), lambda batch: batch, batches)


def test_loss_and_margins_are_those_of_the_probabilities(predictions):
    found = _read(predictions)
    for example in range(6):
        p = predictions.intent_logits[example].double().softmax(0)
        true = p[predictions.intents[example]]
        margin = torch.log(true / (1 - true))
        assert found.intent_margin[example] == pytest.approx(float(margin), rel=1e-9)
        words = [
            (q.double().softmax(0), int(tag))
            for q, tag in zip(
                predictions.tag_logits[example], predictions.tags[example], strict=True
            )
            if tag >= 0
        ]
        slots = np.mean([float(torch.log(q[t] / (1 - q[t]))) for q, t in words])
        assert found.slot_margin[example] == pytest.approx(slots, rel=1e-9)
        of_tags = -np.mean([float(torch.log(q[t])) for q, t in words])
        assert found.slot_loss[example] == pytest.approx(of_tags, rel=1e-9)
        assert found.loss[example] == pytest.approx(float(of_tags - torch.log(true)), rel=1e-9)


def test_confidence_beyond_float32_is_kept():
    """Probabilities of 1 - 1e-20 and 1 - 1e-30 are both 1 in any floating point."""
    logits = torch.tensor([[46.0, 0.0], [69.0, 0.0]])
    found = _read(Predictions(logits, torch.tensor([0, 0])))
    np.testing.assert_allclose(found.intent_margin, [46, 69])
    assert found.loss[0] > found.loss[1] > 0


def test_padding_changes_nothing(predictions):
    wider = Predictions(
        predictions.intent_logits,
        predictions.intents,
        torch.cat((predictions.tag_logits, torch.randn(6, 3, 5)), 1),
        torch.cat((predictions.tags, torch.full((6, 3), -100)), 1),
    )
    for name, values in _read(predictions).to_arrays().items():
        np.testing.assert_allclose(_read(wider).to_arrays()[name], values)


def test_batches_are_put_together_in_order(predictions):
    halves = [
        Predictions(*(values[part] for values in vars(predictions).values()))
        for part in (slice(0, 2), slice(2, 6))
    ]
    for name, values in _read(predictions).to_arrays().items():
        np.testing.assert_array_equal(_read(*halves).to_arrays()[name], values)


def test_a_model_without_slots_has_no_signals_of_slots():
    found = _read(Predictions(torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))
    assert set(found.to_arrays()) == {"loss", "intent_margin"} and found.margins.shape == (4,)


def test_an_example_without_tags_has_the_loss_of_its_intent():
    tags = torch.full((1, 2), -100)
    found = _read(Predictions(torch.randn(1, 3), torch.tensor([1]), torch.randn(1, 2, 5), tags))
    assert found.slot_margin[0] == 0 and np.isfinite(found.loss).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_read_in_evaluation_mode_and_left_as_it_was(training):
    model = nn.Dropout(0.5).train(training)
    states = torch.ones(2, 3)

    def predict(batch):
        assert not model.training and not torch.is_grad_enabled()
        return Predictions(model(batch), torch.tensor([0, 1]))

    collect(model, predict, [states])
    assert model.training is training
    with pytest.raises(RuntimeError):
        collect(model, lambda batch: batch @ batch, [states])
    assert model.training is training


def test_signals_of_slots_alone_are_those_parts(predictions):
    slots = Predictions(tag_logits=predictions.tag_logits, tags=predictions.tags)
    found, both = _read(slots), _read(predictions)
    assert found.to_arrays().keys() == {"loss", "slot_loss", "slot_margin"}
    np.testing.assert_allclose(found.loss, both.slot_loss)
    np.testing.assert_allclose(found.margins, both.slot_margin)
    with pytest.raises(ValueError, match="got neither"):
        _read(Predictions())
