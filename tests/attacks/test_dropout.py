"""Dropout with common masks: the same for all examples, right on average, gone afterwards."""

import pytest
import torch
from torch import nn

from attacks.dropout import common_dropout, has_dropout


@pytest.fixture
def model():
    return nn.Sequential(nn.Dropout(0.3), nn.Identity(), nn.Dropout(0.0), nn.Dropout(0.5)).eval()


def _under(model, inputs, *, seed=0):
    with common_dropout(model, generator=torch.Generator().manual_seed(seed)):
        return model(inputs)


def test_all_examples_lose_the_same_units(model):
    out = _under(model, torch.ones(4, 5, 200))
    assert torch.equal(out, out[:1].expand_as(out))
    # what is kept is scaled up by 1/0.7 and 1/0.5
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.35]))
    # standard error of the share of 1 000 units: 0.015
    assert abs(float((out[0] > 0).float().mean()) - 0.35) < 0.06
    words = out[0] > 0
    assert not torch.equal(words[0], words[1])


def test_every_call_draws_a_mask_of_its_own_and_a_seed_repeats_it(model):
    inputs = torch.ones(2, 3, 50)
    with common_dropout(model, generator=torch.Generator().manual_seed(0)):
        first, second = model(inputs), model(inputs)
    assert not torch.equal(first, second)
    assert torch.equal(first, _under(model, inputs))
    assert not torch.equal(first, _under(model, inputs, seed=1))


def test_nothing_is_left_behind(model):
    inputs = torch.randn(2, 3, 50)
    with (
        pytest.raises(KeyError),
        common_dropout(model, generator=torch.Generator().manual_seed(0)),
    ):
        raise KeyError
    assert torch.equal(model(inputs), inputs)
    assert not any(module._forward_hooks for module in model.modules())


def test_only_a_layer_that_drops_counts(model):
    assert has_dropout(model)
    assert not has_dropout(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2)))
