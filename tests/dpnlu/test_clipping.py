"""The contract of every clipping rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpnlu.mechanism.clipping import CLIPPING_RULES, automatic, flat

NORMS = st.lists(
    st.floats(0, 1e30) | st.sampled_from([0.0, 1e-30, 1.0, 1e30]), min_size=0, max_size=8
)
BOUNDS = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("rule", CLIPPING_RULES.values(), ids=CLIPPING_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(norms=NORMS, bound=BOUNDS)
def test_no_unit_contributes_more_than_the_bound(rule, dtype, norms, bound):
    """coefficient * norm <= max_grad_norm for every norm >= 0."""
    norms = torch.tensor(norms, dtype=dtype)
    coefficients = rule(norms, bound)
    assert coefficients.shape == norms.shape and coefficients.dtype == dtype
    assert bool((coefficients >= 0).all()) and bool(torch.isfinite(coefficients).all())
    assert bool((coefficients * norms <= bound * (1 + 4 * torch.finfo(dtype).eps)).all())


@pytest.mark.parametrize("rule", CLIPPING_RULES.values(), ids=CLIPPING_RULES)
@given(norms=NORMS, bound=BOUNDS)
def test_every_unit_is_judged_by_itself(rule, norms, bound):
    norms = torch.tensor(norms, dtype=torch.float64)
    singly = [rule(norm[None], bound) for norm in norms]
    assert torch.equal(rule(norms, bound), torch.cat([*singly, norms[:0]]))


@pytest.mark.parametrize("rule", CLIPPING_RULES.values(), ids=CLIPPING_RULES)
def test_an_infinite_norm_gets_coefficient_zero(rule):
    assert rule(torch.tensor([math.inf]), 1.0).item() == 0


@given(norms=NORMS, bound=BOUNDS)
def test_flat_clipping_leaves_what_is_short_and_puts_the_rest_on_the_bound(norms, bound):
    norms = torch.tensor(norms, dtype=torch.float64)
    clipped = flat(norms, bound) * norms
    assert torch.allclose(clipped, norms.clamp(max=bound), rtol=1e-12, atol=0)


def test_automatic_clipping_normalises_every_unit():
    """C / (norm + 0.01): nearly the bound for what is not tiny, and linear in the bound."""
    norms = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    expected = torch.tensor([0.5, 1 / 1.01, 100 / 100.01], dtype=torch.float64)
    torch.testing.assert_close(automatic(norms, 1.0) * norms, expected)
    torch.testing.assert_close(automatic(norms, 3.0), 3 * automatic(norms, 1.0))
