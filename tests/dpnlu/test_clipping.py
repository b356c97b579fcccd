"""The contract of every clipping rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpnlu.engines.clipper import Clipper
from dpnlu.mechanism.clipping import CLIPPING_RULES, clipping_rule
from dpnlu.mechanism.clipping.automatic import automatic
from dpnlu.mechanism.clipping.flat import flat
from dpnlu.mechanism.clipping.rule import Adaptation

NORMS = st.lists(
    st.floats(0, 1e30) | st.sampled_from([0.0, 1e-30, 1.0, 1e30]), min_size=0, max_size=8
)
BOUNDS = st.floats(1e-3, 1e3)
# Every rule, with what can be said of it.
SPECS = [
    *("flat", "automatic", "automatic:1e-3", "quantile:0.5", "quantile:0.9:1:0.1"),
    *("per_layer", "per_layer:size", "per_layer:weights"),
    *("groups", "groups:size", "groups:weights", "groups:3,0.1"),
    *("public:0.1", "public:0.9"),
]
every_rule = pytest.mark.parametrize("spec", SPECS)
few = settings(max_examples=30, deadline=None)


def test_every_rule_is_tested():
    assert {spec.split(":")[0] for spec in SPECS} == set(CLIPPING_RULES)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(norms=NORMS, bound=BOUNDS)
def test_no_unit_contributes_more_than_the_bound(spec, dtype, norms, bound):
    """coefficient * norm <= bound for every norm >= 0."""
    norms = torch.tensor(norms, dtype=dtype)
    coefficients = clipping_rule(spec).coefficients(norms, bound)
    assert coefficients.shape == norms.shape and coefficients.dtype == dtype
    assert bool((coefficients >= 0).all()) and bool(torch.isfinite(coefficients).all())
    assert bool((coefficients * norms <= bound * (1 + 4 * torch.finfo(dtype).eps)).all())


@every_rule
@few
@given(norms=NORMS, bound=BOUNDS)
def test_every_unit_and_group_is_judged_by_itself(spec, norms, bound):
    rule, norms = clipping_rule(spec).coefficients, torch.tensor(norms, dtype=torch.float64)
    singly = [rule(norm[None], bound) for norm in norms]
    assert torch.equal(rule(norms, bound), torch.cat([*singly, norms[:0]]))
    bounds = norms.new_tensor([[bound], [2 * bound]])
    both = torch.stack([rule(norms, bound), rule(norms, 2 * bound)])
    assert torch.allclose(rule(norms.expand(2, -1), bounds), both, rtol=1e-15, atol=0)


@every_rule
def test_an_infinite_norm_gets_coefficient_zero(spec):
    assert clipping_rule(spec).coefficients(torch.tensor([math.inf]), 1.0).item() == 0


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
    other = clipping_rule("automatic:1").coefficients(norms, 1.0)
    torch.testing.assert_close(other, 1 / (norms + 1))


# ---- groups ----------------------------------------------------------------------------------


class Model(nn.Module):
    """Two modules with two parameters each, one of their own, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"in": nn.Linear(3, 5), "out": nn.Linear(5, 1)})
        self.scale = nn.Parameter(torch.full((4,), 3.0))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)


GROUPS = (("body.in", "scale"), ("body.out.weight", "body.out.bias"))
# How the bound is divided -> the size of each group, layers: scale, in, out.
PER_LAYER = {
    "per_layer": lambda model: [1, 1, 1],
    "per_layer:uniform": lambda model: [1, 1, 1],
    "per_layer:size": lambda model: [2, math.sqrt(20), math.sqrt(6)],
    "per_layer:weights": lambda model: [
        6,
        *(_length(model.body[name].parameters()) for name in ("in", "out")),
    ],
    "groups": lambda model: [1, 1],
    "groups:size": lambda model: [math.sqrt(24), math.sqrt(6)],
    "groups:weights": lambda model: [
        math.hypot(_length(model.body["in"].parameters()), 6),
        _length(model.body["out"].parameters()),
    ],
    "groups:3,4": lambda model: [3, 4],
}


def _length(parameters) -> float:
    return float(torch.cat([p.detach().flatten() for p in parameters]).norm())


def _divided(spec, make_plan, **changes) -> tuple[Model, Clipper]:
    model = Model()
    listed = {"clipping_groups": GROUPS} if spec.startswith("groups") else {}
    plan = make_plan(clipping=spec, max_grad_norm=0.7, **listed | changes)
    return model, Clipper.of(model, plan)


@pytest.mark.parametrize("spec", PER_LAYER)
def test_the_bound_is_divided_as_asked(make_plan, spec):
    """In proportion, such that the root of the sum of squares is the plan's bound."""
    model, clipper = _divided(spec, make_plan)
    sizes = PER_LAYER[spec](model)
    assert clipper.bounds == pytest.approx([0.7 * s / math.hypot(*sizes) for s in sizes], rel=1e-6)
    assert math.hypot(*clipper.bounds) == pytest.approx(0.7)
    grouped = [parameter for group in clipper.groups for parameter in group]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(trained) and set(grouped) == set(trained)


BAD_GROUPS = {
    "misses": ((("body",),), "but scale is in none"),
    "repeats": ((("body", "scale"), ("body.in.bias",)), "got body.in.bias twice"),
    "repeats within one": ((("body", "scale", "body.out"),), r"got body.out.\w+ twice"),
    "unknown": ((("body", "scale", "head"),), "got 'head'"),
    "not trained": ((("body", "scale", "fixed"),), "got 'fixed'"),
    "part of a name": ((("bod", "scale"),), "got 'bod'"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_groups_that_do_not_fit_the_model_are_refused(make_plan, case):
    groups, says = BAD_GROUPS[case]
    with pytest.raises(ValueError, match=says):
        _divided("groups", make_plan, clipping_groups=groups)


def test_as_many_shares_as_groups_are_needed(make_plan):
    with pytest.raises(ValueError, match="each of 2 groups, got 3"):
        _divided("groups:1,2,3", make_plan)


def test_weights_of_zero_give_no_bound(make_plan):
    model = Model()
    nn.init.zeros_(model.scale)
    with pytest.raises(ValueError, match="got others with scale"):
        Clipper.of(model, make_plan(clipping="per_layer:weights"))
    Clipper.of(model, make_plan(clipping="per_layer:size"))


# ---- an adaptive bound -----------------------------------------------------------------------


@given(z=st.floats(0.05, 50), budget=st.floats(1e-3, 0.9), s=st.sampled_from([0.5, 1.0]))
def test_sum_and_count_together_have_the_noise_multiplier_of_the_plan(z, budget, s):
    """z_Δ = (z⁻² - (σ_b / s)⁻²)^(-1/2), with s = 1/2 the formula of Andrew et al. (2021)."""
    adaptation = Adaptation(quantile=0.5, rate=0.2, budget=budget)
    count = adaptation.count_std(z, sensitivity=s)
    assert z * adaptation.sum_factor() == pytest.approx((z**-2 - (count / s) ** -2) ** -0.5)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_bound_finds_the_quantile(make_plan, quantile):
    """From far above and far below; with the clipped counted instead, it would run away."""
    norms = torch.linspace(0, 10, 1001)
    plan = make_plan(clipping=f"quantile:{quantile}")
    for start in (0.1, 100.0):
        clipper = Clipper.of(Model(), plan)
        clipper.bound = start
        for _ in range(1000):
            unclipped = clipper.unclipped(clipper.coefficients(norms[None]))
            assert unclipped.tolist() == (norms <= clipper.bound).tolist()
            share = float(unclipped.float().mean())
            clipper.bound = clipper.adaptation.next_bound(clipper.bound, share)
        assert clipper.bound == pytest.approx(10 * quantile, rel=0.02)


def test_what_noise_makes_of_a_share_moves_the_bound_no_further_than_a_share_can():
    adaptation = Adaptation(quantile=0.5, rate=0.2, budget=0.01)
    assert adaptation.next_bound(1.0, 1e9) == adaptation.next_bound(1.0, 1.0) < 1
    assert adaptation.next_bound(1.0, -1e9) == adaptation.next_bound(1.0, 0.0) > 1


BAD_SPECS = [
    *("none", "", "flat:1", "automatic:0", "automatic:-1", "automatic:nan", "automatic:1:2"),
    *("per_layer:depth", "per_layer:1,2", "groups:0,1", "groups:1,-1", "groups:1,nan", "groups:"),
    *("quantile", "quantile:0", "quantile:1", "quantile:1.5", "quantile:-0.1", "quantile:nan"),
    *("quantile:0.5:0", "quantile:0.5:nan", "quantile:0.5:0.2:0", "quantile:0.5:0.2:1"),
    *("quantile:half", "quantile:0.5:0.2:0.1:1"),
    *("public", "public:", "public:0", "public:1", "public:nan", "public:half", "public:0.5:1"),
]


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_rule_that_is_none_is_refused_in_one_line(make_plan, spec):
    with pytest.raises(ValueError, match=r"^Expected `clipping` to be one of flat") as refused:
        make_plan(clipping=spec)
    assert "\n" not in str(refused.value)
