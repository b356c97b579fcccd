"""Clipped sums of gradients that are known."""

import math

import pytest
import torch
from torch import nn

from dpnlu.engines.clipped import clip_gradients, gradient_norms
from dpnlu.gradients.forms import Dense

pytestmark = pytest.mark.usefixtures("double")


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
    plan = make_plan(max_grad_norm=1.5)
    clipped = clip_gradients(parts, norms, losses, plan)
    clipped.total.add_to(into, scale=2.0)
    for found, right in zip(into.values(), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-12)
    assert clipped.non_finite == (spoilt is not None)
