"""Clipped sums of gradients that are known."""

import math

import pytest
import torch
from torch import nn

from dpnlu.engines.clipped import clip_gradients, gradient_norms
from dpnlu.engines.clipper import Clipper
from dpnlu.gradients.forms import Dense, SquaredNorms

pytestmark = pytest.mark.usefixtures("double")


def _clipper(parts, plan):
    return Clipper({str(place): parameter for place, parameter in enumerate(parts)}, plan)


@pytest.mark.parametrize("spoilt", [None, math.inf, math.nan])
def test_each_example_adds_its_whole_gradient_clipped(make_plan, spoilt):
    rows = {nn.Parameter(torch.zeros(shape)): torch.randn(5, *shape) for shape in [(3,), (2, 4)]}
    whole = torch.cat([values.flatten(1) for values in rows.values()], dim=1)
    factors = (1.5 / whole.norm(dim=1)).clamp(max=1.0)
    if spoilt is not None:
        next(iter(rows.values()))[2, 1] = spoilt
        factors[2] = 0.0
    expected = [
        2.0 * sum(factor * row for factor, row in zip(factors, values.nan_to_num(), strict=True))
        for values in rows.values()
    ]
    into = {parameter: torch.zeros_like(parameter) for parameter in rows}
    parts = {parameter: [Dense(values)] for parameter, values in rows.items()}
    losses = torch.zeros(5)
    norms = gradient_norms(parts, losses)
    clipped = clip_gradients(parts, norms, losses, _clipper(parts, make_plan(max_grad_norm=1.5)))
    clipped.total.add_to(into, scale=2.0)
    for found, right in zip(into.values(), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-12)
    assert clipped.non_finite == (spoilt is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_any_type_leave_the_gradients_theirs(make_plan, dtype):
    values, weight = torch.randn(4, 3, dtype=torch.float32), nn.Parameter(torch.zeros(3).float())
    parts, losses = {weight: [Dense(values)]}, torch.tensor([1.0, math.inf, 2.0, 0.0], dtype=dtype)
    clipped = clip_gradients(parts, None, losses, _clipper(parts, make_plan()))
    into = torch.zeros(3, dtype=torch.float32)
    clipped.total.add_to({weight: into}, scale=1.0)
    factors = (make_plan().max_grad_norm / values.norm(dim=1)).clamp(max=1.0)
    torch.testing.assert_close(into, factors[[0, 2, 3]] @ values[[0, 2, 3]])
    assert clipped.finite.tolist() == [True, False, True, True] and clipped.non_finite == 1
    assert clipped.total.coefficients.dtype is torch.float32


def test_a_gradient_that_nothing_is_known_of_is_written_out(make_plan):
    """Norms whose slack is infinite are taken anew; a norm alone would lose the example."""
    values, weight = torch.randn(4, 3), nn.Parameter(torch.zeros(3))
    parts, losses = {weight: [Dense(values)]}, torch.zeros(4)
    norms = gradient_norms(parts, losses)
    slack = torch.tensor([0.0, math.inf, 1e6, 0.0])
    clipper = _clipper(parts, make_plan())
    clipped = clip_gradients(parts, SquaredNorms(norms.values, slack), losses, clipper)
    expected = clip_gradients(parts, norms, losses, clipper)
    torch.testing.assert_close(clipped.total.coefficients, expected.total.coefficients)
