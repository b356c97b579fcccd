"""Adam with a second moment from which the noise is subtracted."""

import numpy as np
import pytest
import torch
from torch import nn

import dpnlu
from dpnlu.training.adam_bc import AdamBC, tell_noise
from dpnlu.training.checkpoint import load_checkpoint, save_checkpoint
from dpnlu.training.handle import privatize


def _pair(make, other, **options):
    """Two copies of a parameter, each with an optimizer."""
    start = torch.linspace(-1, 1, 12).view(3, 4)
    both = [nn.Parameter(start.clone()) for _ in range(2)]
    return both, [make([both[0]], **options), other([both[1]], **options)]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.3}])
def test_without_noise_it_is_adamw(options):
    options = {"weight_decay": 0.0} | options
    weights, optimizers = _pair(AdamBC, torch.optim.AdamW, **options)
    optimizers[0].noise_std = 0.0
    for _ in range(20):
        gradient = torch.randn(3, 4)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_the_moment_is_that_of_the_gradients_alone():
    """Constant gradients under noise that falls from step to step: entries then move by the
    learning rate, however small their gradient. Without the correction they would hardly move."""
    gradient = torch.tensor([1.0, 2.0]).repeat_interleave(500)
    moved = {}
    for kind in (AdamBC, torch.optim.AdamW):
        weight = nn.Parameter(torch.zeros(1000))
        optimizer = kind([weight], lr=1e-3, betas=(0.99, 0.999), weight_decay=0.0)
        for step in range(3000):
            std = 3.0 if step < 1500 else 2.0
            weight.grad = gradient + std * torch.randn(1000)
            if kind is AdamBC:
                optimizer.noise_std = std
            if step == 2500:
                before = weight.detach().clone()
            optimizer.step()
        moved[kind] = (before - weight.detach()).view(2, 500).mean(1) / 500 / 1e-3
    assert moved[AdamBC].tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    plain = moved[torch.optim.AdamW].tolist()
    assert plain[0] < 0.5 and plain[1] < 0.75


@pytest.mark.usefixtures("double")
def test_pure_noise_moves_weights_by_no_more_than_the_floor_allows():
    weight = nn.Parameter(torch.zeros(2000))
    optimizer = AdamBC([weight], lr=1.0, betas=(0.0, 0.999), least=0.25)
    optimizer.noise_std = 2.0
    for _ in range(50):
        before = weight.detach().clone()
        weight.grad = 2.0 * torch.randn(2000)
        optimizer.step()
        longest = (weight.grad / (0.5 * 2.0)).abs()
        assert bool(((weight.detach() - before).abs() <= longest * (1 + 1e-5)).all())


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("rule", ["flat", "quantile:0.5"])
def test_a_private_training_tells_it_the_noise_of_every_step(make_plan, rule):
    """Of what the optimizer meets: the sum's, divided by the expected batch size."""
    model = nn.Linear(3, 2)
    optimizer = AdamBC(model.parameters(), lr=0.1)
    plan = make_plan(noise_schedule="list:1,0.5", clipping=rule, steps=4)
    told = []
    with privatize(model, optimizer, plan) as private:
        for step in range(4):
            planned = plan.noise_std_at(step, bound=private.max_grad_norm) / plan.divisor
            private.step(model(torch.randn(4, 3)).square().sum(1))
            told.append((optimizer.noise_std, planned))
    assert all(found == pytest.approx(planned) for found, planned in told)
    assert told[3][0] < told[0][0]


def test_it_goes_on_from_a_checkpoint(tmp_path):
    weights, optimizers = _pair(AdamBC, AdamBC, lr=0.1)
    models = [nn.ParameterList([weight]) for weight in weights]
    for step in range(6):
        if step == 3:
            save_checkpoint(tmp_path / "c", models[0], optimizers[0], steps=3)
            load_checkpoint(tmp_path / "c", models[1], optimizers[1])
        for weight, optimizer in zip(weights, optimizers, strict=True):
            torch.manual_seed(step)
            weight.grad = torch.randn(3, 4)
            optimizer.noise_std = 0.5
            if weight is weights[0] or step >= 3:
                optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_noise_that_nobody_told_of_is_no_zero():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="to be told of the noise"):
        AdamBC([weight]).step()


def test_a_closure_computes_the_gradients_first():
    """As of torch's own; some trainers compute them nowhere else."""
    weight, seen = nn.Parameter(torch.ones(2)), []
    optimizer = AdamBC([weight], lr=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        seen.append(optimizer.noise_std)
        tell_noise(optimizer, 0.0)
        return loss

    assert optimizer.step(closure).item() == 2.0 and seen == [None]
    assert weight.tolist() == pytest.approx([0.9, 0.9])


def test_the_noise_is_told_to_whoever_needs_it():
    class Around:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    corrected = AdamBC([nn.Parameter(torch.zeros(2))])
    tell_noise(Around(Around(corrected)), 0.5)
    assert corrected.noise_std == 0.5
    tell_noise(Around(torch.optim.SGD([nn.Parameter(torch.zeros(2))])), 0.5)  # nothing happens


@pytest.mark.parametrize("least", [0.0, 1.0, -0.1, np.nan])
def test_a_floor_that_is_none_is_refused(least):
    with pytest.raises(ValueError, match=r"`least` in \(0, 1\)"):
        AdamBC([nn.Parameter(torch.zeros(2))], least=least)


def test_it_has_a_name_for_users():
    assert dpnlu.AdamBC is AdamBC
