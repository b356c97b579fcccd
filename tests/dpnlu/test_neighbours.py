"""Neighbouring batches: what one unit can change of a released sum, for every engine, clipping rule
and adjacency; and the cases that reach what is stated.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dpnlu.engines import ENGINES
from dpnlu.engines.outcome import OpenUnit
from dpnlu.mechanism.plan import ADJACENCIES
from dpnlu.testing import assert_private_step

# torch's opinion of the hooks that Opacus uses.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

BOUND = 0.7
# Of float32, and what a rule may miss by rounding.
EXCESS = 1 + 1e-5
RULES = [
    *("flat", "automatic", "per_layer", "per_layer:size", "per_layer:weights"),
    *("groups:3,1", "quantile:0.3"),
]
GROUPS = (("0", "2.bias"), ("2.weight",))
UNITS = {
    "book_keeping": "example",
    "per_example": "example",
    "opacus": "example",
    "microbatch": "microbatch",
}
MICROBATCHES = 3
every_adjacency = pytest.mark.parametrize("adjacency", ADJACENCIES)


@dataclass(frozen=True)
class Released:
    """What a step would release without noise, and the centred count of what is unclipped."""

    total: Tensor
    count: float


@pytest.fixture
def plan_for(make_plan):
    def plan(engine: str, rule: str):
        changes = {"clipping": rule, "max_grad_norm": BOUND}
        if UNITS[engine] == "microbatch":
            changes |= {"clipping_unit": "microbatch", "microbatches": MICROBATCHES}
        if rule.startswith("groups"):
            changes["clipping_groups"] = GROUPS
        return make_plan(**changes)

    return plan


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def _released(
    engine: str,
    plan,
    groups: list[tuple[Tensor, Tensor]],
    bound: float,
    users: Tensor | None = None,
) -> Released:
    """The sum that an engine makes of clipping groups, each inputs (b, 3) and weights (b,)."""
    model = _model()
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    count = 0.0
    with ENGINES[engine](model, plan) as made:
        made.clipper.bound = bound
        for inputs, weights in groups:
            losses = weights * (model(inputs) + 1).square().sum(1)
            outcome = made.clip(losses, unit=OpenUnit(), users=users)
            if outcome.total is not None:
                outcome.total.add_to(into, scale=1.0)
            if outcome.unclipped is not None:
                count += float(outcome.unclipped.sum()) - len(outcome.norms) / 2
    return Released(torch.cat([total.flatten() for total in into.values()]).double(), count)


def _groups(engine: str, inputs: Tensor, weights: Tensor, places: Tensor):
    """The examples in their clipping groups; places (B,) say which, where there are several."""
    if UNITS[engine] == "example":
        return [(inputs, weights)]
    return [(inputs[places == k], weights[places == k]) for k in range(MICROBATCHES)]


def _neighbours(adjacency: str, count: int):
    """Batches (inputs, weights, places), the same but for example 0, in one micro-batch."""
    inputs = torch.randn(count, 3)
    weights = 10 ** (4 * torch.rand(count) - 2) * (2 * torch.randint(0, 2, (count,)) - 1)
    places = torch.randint(0, MICROBATCHES, (count,))
    if adjacency == "add-remove-one":
        other = inputs[1:], weights[1:], places[1:]
    elif adjacency == "zero-out-one":
        other = inputs, torch.cat((weights.new_zeros(1), weights[1:])), places
    else:
        replaced = torch.cat((inputs[:1] + torch.randn(1, 3), inputs[1:]))
        other = replaced, torch.cat((-weights[:1], weights[1:])), places
    return (inputs, weights, places), other


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", UNITS)
@every_adjacency
def test_one_unit_moves_the_sum_by_no_more_than_the_sensitivity(plan_for, engine, rule, adjacency):
    """At every scale of gradients, with one example or none beside, and with an adapted bound."""
    plan = plan_for(engine, rule)
    for seed, count in enumerate((1, 2, 5, 1, 3, 6)):
        torch.manual_seed(seed)
        pair = _neighbours(adjacency, count)
        bound = BOUND if seed < 3 or plan.clipping != "quantile:0.3" else 0.1
        one, other = (_released(engine, plan, _groups(engine, *b), bound) for b in pair)
        moved = float((one.total - other.total).norm())
        assert moved <= plan.sensitivity_under(adjacency) * bound / BOUND * EXCESS
        # A gradient of zero counts as unclipped: who is zeroed out may move the count by 1, too.
        is_half = adjacency == "add-remove-one" and plan.microbatches is None
        assert abs(one.count - other.count) <= (0.5 if is_half else 1.0)


# ---- what is stated is reached ---------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ["book_keeping", "per_example", "opacus"])
def test_an_example_that_is_replaced_moves_the_sum_by_twice_the_bound(plan_for, engine, rule):
    """By its opposite: the sensitivity under replace-one could not be stated as C."""
    plan = plan_for(engine, rule)
    inputs, weights = torch.ones(1, 3), torch.tensor([1e6])
    one, other = (_released(engine, plan, [(inputs, w)], BOUND) for w in (weights, -weights))
    moved = float((one.total - other.total).norm())
    assert moved == pytest.approx(2 * BOUND, rel=1e-3)
    assert moved > 1.9 * plan.sensitivity
    assert plan.sensitivity_under("replace-one") == 2 * plan.sensitivity == 2 * BOUND


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rest", [1, 7])
def test_a_micro_batch_is_turned_around_by_one_example(plan_for, rule, rest):
    """Gradients of +M and of -3M each: without the second the clipped mean moves from -C to C,
    however many lie in the micro-batch. A sensitivity of C would be half of what is needed."""
    plan = plan_for("microbatch", rule)
    inputs = torch.ones(rest + 1, 3)
    weights = torch.tensor([-3.0 * rest] + [1.0] * rest) * 1e6
    one = _released("microbatch", plan, [(inputs, weights)], BOUND)
    other = _released("microbatch", plan, [(inputs[1:], weights[1:])], BOUND)
    moved = float((one.total - other.total).norm())
    assert moved == pytest.approx(2 * BOUND, rel=1e-3)
    assert moved <= plan.sensitivity * EXCESS and plan.sensitivity == 2 * BOUND


@pytest.mark.parametrize("rule", ["per_layer", "per_layer:size", "groups:3,1"])
@pytest.mark.parametrize("engine", UNITS)
def test_groups_fill_the_bound_and_no_more(plan_for, engine, rule):
    """Each group clipped to C itself would come to C times the root of their number."""
    plan = plan_for(engine, rule)
    inputs, weights = torch.ones(1, 3), torch.tensor([1e6])
    total = _released(engine, plan, [(inputs, weights)], BOUND).total
    assert float(total.norm()) == pytest.approx(BOUND, rel=1e-5)
    first = float(total[:20].norm())
    shares = {"per_layer": math.sqrt(1 / 2), "per_layer:size": math.sqrt(20 / 32)}
    if rule in shares:
        assert first == pytest.approx(BOUND * shares[rule], rel=1e-5)


@every_adjacency
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_examples_adds_nothing(plan_for, rule, adjacency):
    nothing = [(torch.zeros(0, 3), torch.zeros(0))]
    for engine in UNITS:
        found = _released(engine, plan_for(engine, rule), nothing, BOUND)
        assert not found.total.any() and found.count == 0


@pytest.mark.parametrize("engine", UNITS)
def test_the_stated_neighbours_are_those_of_the_plan(plan_for, make_plan, engine):
    plan = plan_for(engine, "flat")
    assert plan.sensitivity == plan.sensitivity_under("add-remove-one")
    truncated = make_plan(sampling="truncated_poisson", max_batch_size=5)
    assert truncated.sensitivity == truncated.sensitivity_under("zero-out-one")
    with pytest.raises(ValueError, match="`adjacency` to be one of add-remove-one"):
        plan.sensitivity_under("shuffle")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ["book_keeping", "per_example", "opacus"])
def test_a_user_with_all_examples_moves_the_sum_by_the_bound(plan_for, engine, rule):
    """Whose share in each group is clipped as a whole; and a user of one's own is an example."""
    torch.manual_seed(2)
    inputs, weights = torch.randn(6, 3), 10 ** (4 * torch.rand(6) - 2)
    users = torch.tensor([0, 1, 0, 2, 0, 1])
    plan = plan_for(engine, rule)
    whole = _released(engine, plan, [(inputs, weights)], BOUND, users)
    rest = users != 0
    others = _released(engine, plan, [(inputs[rest], weights[rest])], BOUND, users[rest] - 1)
    assert float((whole.total - others.total).norm()) <= plan.sensitivity * EXCESS
    assert abs(whole.count - others.count) <= 0.5
    singly = _released(engine, plan, [(inputs, weights)], BOUND, torch.arange(6))
    plain = _released(engine, plan, [(inputs, weights)], BOUND)
    torch.testing.assert_close(singly.total, plain.total, rtol=1e-4, atol=1e-6)
    assert singly.count == plain.count


@pytest.mark.parametrize("rule", ["automatic", "per_layer:size", "groups:3,1", "quantile:0.3"])
def test_private_steps_release_what_every_rule_says(plan_for, rule):
    """The helper for tests of one's own, which looks at sums and noise of whole steps."""
    torch.manual_seed(4)
    plan, model = plan_for("book_keeping", rule), _model()
    batch = torch.randn(3, 3)
    assert_private_step(model, lambda inputs: (model(inputs) + 1).square().sum(1), batch, plan)


# ---- engines agree ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_exact_engines_clip_alike_in_double_precision(plan_for, rule, double):
    """The loop over examples, written out here, is the oracle."""
    torch.manual_seed(5)
    inputs, weights = torch.randn(6, 3), 10 ** (4 * torch.rand(6) - 3)
    plan = plan_for("per_example", rule)
    expected = _by_hand(plan, inputs, weights)
    for engine in ("book_keeping", "per_example", "opacus"):
        found = _released(engine, plan, [(inputs, weights)], BOUND).total
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def _by_hand(plan, inputs: Tensor, weights: Tensor) -> Tensor:
    model = _model()
    names = [name for name, _ in model.named_parameters()]
    division = {
        "per_layer": [names[:2], names[2:]],
        "groups": [["0.weight", "0.bias", "2.bias"], ["2.weight"]],
    }.get(plan.clipping.split(":")[0], [names])
    how = plan.clipping.partition(":")[2]
    named = dict(model.named_parameters())
    sizes = []
    for group in division:
        flat = torch.cat([named[name].detach().flatten() for name in group])
        sizes.append({"size": math.sqrt(len(flat)), "weights": float(flat.norm())}.get(how, 1.0))
    sizes = [3.0, 1.0] if how == "3,1" else sizes
    bounds = [BOUND * size / math.hypot(*sizes) for size in sizes]
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for example, weight in zip(inputs, weights, strict=True):
        loss = weight * (model(example[None]) + 1).square().sum()
        gradients = dict(zip(names, torch.autograd.grad(loss, list(named.values())), strict=True))
        for group, bound in zip(division, bounds, strict=True):
            norm = float(torch.cat([gradients[name].flatten() for name in group]).norm())
            is_automatic = plan.clipping == "automatic"
            factor = bound / (norm + 0.01) if is_automatic else min(1.0, bound / norm)
            for name in group:
                total[name] += factor * gradients[name]
    return torch.cat([total[name].flatten() for name in names])
