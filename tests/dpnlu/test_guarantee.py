"""What one example adds, whatever it is: searched for by adversaries, in every precision.

The contribution is measured in float64 from what an engine adds up for the example: it is at most
the bound, up to one part in a thousand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.clipped import clip_gradients, gradient_norms
from dpnlu.engines.clipper import Clipper
from dpnlu.engines.compiled import CompiledClipping
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense
from dpnlu.gradients.rows import (
    Bags,
    Rows,
)
from dpnlu.gradients.uses import combine
from dpnlu.mechanism.plan import PrivacyPlan

BOUND = 0.02
EXCESS = 1 + 1e-3
WIDTH, POSITIONS, WORDS = 48, 12, 20


# ---- whole layers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer whose outputs are weighted by what the adversary chooses: losses are Σ v · y.

    Attributes:
        inputs: makes (2, T, …) inputs; None: the adversary has ids instead of numbers.
    """

    name: str
    make: Callable[[], nn.Module]
    outputs: int = WIDTH
    takes_ids: bool = False

    def __str__(self) -> str:
        return self.name


class OverTime(nn.Module):
    """A layer applied along the positions, (B, T, d) -> (B, T, p)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mT).mT


class First(nn.Module):
    """The first of what a layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids).tanh(), self.table.weight)


class Bag(nn.Module):
    """The mean of words, for each position anew."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(WORDS, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)[:, None].expand(-1, ids.shape[1], -1)


class Gated(nn.Module):
    """Parameters added and multiplied, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.gate, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x) * self.gate + self.shift)


CASES = [
    Case("linear", lambda: nn.Linear(WIDTH, WIDTH)),
    Case("linear, narrow", lambda: nn.Linear(WIDTH, 3), 3),
    Case("layer norm", lambda: nn.LayerNorm(WIDTH)),
    Case("convolution", lambda: OverTime(nn.Conv1d(WIDTH, 8, 3, padding=1)), 8),
    Case("embedding", lambda: nn.Embedding(WORDS, WIDTH), takes_ids=True),
    Case("tied embedding", Tied, WORDS, takes_ids=True),
    Case("LSTM", lambda: First(nn.LSTM(WIDTH, 16, batch_first=True, bidirectional=True)), 32),
    Case("GRU", lambda: First(nn.GRU(WIDTH, 16, batch_first=True)), 16),
    Case("RNN", lambda: First(nn.RNN(WIDTH, 16, batch_first=True, bidirectional=True)), 32),
    Case("gates", Gated),
    Case("group norm", lambda: OverTime(nn.GroupNorm(4, WIDTH))),
    Case("instance norm", lambda: OverTime(nn.InstanceNorm1d(WIDTH, affine=True))),
    Case("PReLU", lambda: OverTime(nn.PReLU(WIDTH))),
    Case("bag of words", Bag, takes_ids=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16 autocast": (torch.float32, True),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


def _losses(model: nn.Module, inputs: Tensor, slopes: Tensor, *, autocast: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = model(inputs)
    return (outputs.float() if autocast else outputs).mul(slopes).flatten(1).sum(1)


def _moved(engine: BookKeeping, inputs: Tensor, slopes: Tensor, *, autocast: bool) -> float:
    """How far the second example moves the sum, in bounds: with it, without it."""
    sums = []
    for count in (2, 1):
        into = {p: torch.zeros_like(p) for p in engine.model.parameters()}
        losses = _losses(engine.model, inputs[:count], slopes[:count], autocast=autocast)
        engine.clip(losses).total.add_to(into, scale=1.0)
        sums.append(torch.cat([total.flatten().double() for total in into.values()]))
    return float((sums[0] - sums[1]).norm()) / BOUND


def _cancelling(case: Case, dtype: torch.dtype, size: float) -> tuple[Tensor, Tensor]:
    """Two examples; in the second one, positions come in pairs that all but cancel."""
    near = 1 + size * torch.randn(1, dtype=dtype)
    slopes = torch.randn(2, POSITIONS, case.outputs, dtype=dtype)
    slopes[1, 1::2] = -slopes[1, ::2] * (1 + size * torch.randn(1, dtype=dtype))
    if case.takes_ids:
        ids = torch.randint(WORDS, (2, POSITIONS))
        ids[1, 1::2] = ids[1, ::2]
        return ids, slopes * 1e3
    inputs = 30 * torch.randn(2, POSITIONS, WIDTH, dtype=dtype)
    inputs[1, 1::2] = inputs[1, ::2] * near
    return inputs, slopes


@every_case
@every_precision
def test_positions_that_all_but_cancel_are_clipped_like_others(make_plan, case, precision):
    """Gram matrices lose in rounding what cancels; the bound that clips does not."""
    dtype, autocast = precision
    engine = BookKeeping(case.make().to(dtype), make_plan(max_grad_norm=BOUND), verify=False)
    for size in (0.0, 1e-6, 1e-4, 1e-2) * 4:
        inputs, slopes = _cancelling(case, dtype, size)
        assert _moved(engine, inputs, slopes, autocast=autocast) <= EXCESS
    engine.close()


@pytest.mark.parametrize("precision", list(PRECISIONS.values())[1:], ids=list(PRECISIONS)[1:])
def test_compiled_steps_clip_them_as_well(make_plan, monkeypatch, precision):
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
    dtype, autocast = precision
    case = CASES[0]
    engine = BookKeeping(case.make().to(dtype), make_plan(max_grad_norm=BOUND))

    def losses_of(batch):
        return _losses(engine.model, *batch, autocast=autocast)

    clipping = CompiledClipping(engine, losses_of, backend="inductor")
    for size in (1e-6, 1e-4) * 4:
        sums = []
        inputs, slopes = _cancelling(case, dtype, size)
        for kept in (2, 1):
            into = {p: torch.zeros_like(p) for p in engine.model.parameters()}
            outcome = clipping.clip((inputs, slopes), count=2, kept=kept)
            outcome.total.add_to(into, scale=1.0)
            sums.append(torch.cat([total.flatten().double() for total in into.values()]))
        assert float((sums[0] - sums[1]).norm()) <= BOUND * EXCESS
    engine.close()


def test_precision_that_is_lowered_everywhere_stays_high_where_norms_are_taken(make_plan):
    """TF32 and bfloat16 in place of float32 are switched off for norms and sums."""
    engine = BookKeeping(nn.Linear(WIDTH, WIDTH), make_plan(max_grad_norm=BOUND), verify=False)
    torch.set_float32_matmul_precision("medium")
    try:
        for size in (1e-6, 1e-4) * 8:
            inputs, slopes = _cancelling(CASES[0], torch.float32, size)
            assert _moved(engine, inputs, slopes, autocast=False) <= EXCESS
        assert torch.get_float32_matmul_precision() == "medium", "put back afterwards"
    finally:
        torch.set_float32_matmul_precision("highest")
        engine.close()


def _ascend(engine: BookKeeping, case: Case, *, steps: int, size: float) -> float:
    """Gradient ascent on how much the norm that is taken falls short of the true one."""
    inputs, slopes = _cancelling(case, torch.float32, size)
    worst = _moved(engine, inputs, slopes, autocast=False)
    for _ in range(steps):
        noise = [torch.randn_like(values) * values.abs().mean() * 1e-3 for values in (slopes,)]
        tried = slopes + noise[0]
        if not case.takes_ids:
            moved_inputs = inputs + 1e-3 * inputs.abs().mean() * torch.randn_like(inputs)
        else:
            moved_inputs = inputs
        now = _moved(engine, moved_inputs, tried, autocast=False)
        if now > worst:
            inputs, slopes, worst = moved_inputs, tried, now
    return worst


@pytest.mark.slow
@every_case
def test_ten_thousand_tries_find_no_example_that_adds_more(make_plan, case):
    """Pairs of all degrees of cancellation, climbed from where they add most."""
    engine = BookKeeping(case.make(), make_plan(max_grad_norm=BOUND), verify=False)
    worst = 0.0
    for attempt in range(200):
        torch.manual_seed(attempt)
        size = 10 ** -(7 * torch.rand(()).item())
        worst = max(worst, _ascend(engine, case, steps=49, size=size))
    engine.close()
    assert worst <= EXCESS
    assert worst > 0.9, "the search reaches the bound: it would notice if it were passed"


# ---- the forms of gradients ------------------------------------------------------------------


def _outer(draw: Callable) -> OuterProducts:
    return OuterProducts(draw(3, POSITIONS, 40), draw(3, POSITIONS, 30))


def _few(draw: Callable) -> OuterProducts:
    return OuterProducts(draw(3, 1, 40), draw(3, 1, 30), transposed=True)


def _written_out(draw: Callable) -> OuterProducts:
    return OuterProducts(draw(3, POSITIONS, 4), draw(3, POSITIONS, 3))


def _rows(draw: Callable) -> Rows:
    return Rows(torch.randint(-1, 6, (3, POSITIONS)), draw(3, POSITIONS, 40), (6, 40))


def _long_rows(draw: Callable) -> Rows:
    return Rows(torch.randint(-1, 6, (3, 150)), draw(3, 150, 10), (6, 10))


def _bags(draw: Callable) -> Bags:
    ids = torch.randint(-1, 6, (3, POSITIONS))
    return Bags(ids, draw(3, POSITIONS), draw(3, 40), (6, 40))


FORMS = {
    "outer": lambda draw: [_outer(draw)],
    "outer, one position": lambda draw: [_few(draw)],
    "outer, written out": lambda draw: [_written_out(draw)],
    "rows": lambda draw: [_rows(draw)],
    "long rows": lambda draw: [_long_rows(draw)],
    "bags": lambda draw: [_bags(draw)],
    "tied bags": lambda draw: [_bags(draw), OuterProducts(draw(3, 5, 40), draw(3, 5, 6))],
    "dense": lambda draw: [Dense(draw(3, 50, 60))],
    "tied": lambda draw: [
        OuterProducts(draw(3, POSITIONS, 40), draw(3, POSITIONS, 6)),
        _rows(draw),
    ],
    "all": lambda draw: [
        OuterProducts(draw(3, POSITIONS, 40), draw(3, POSITIONS, 6)),
        OuterProducts(draw(3, POSITIONS, 6), draw(3, POSITIONS, 40), transposed=True),
        _rows(draw),
        Dense(draw(3, 6, 40)),
    ],
}


def _double(uses):
    return [
        type(use)(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                    for v in vars(use).values()))
        for use in uses
    ]  # fmt: skip


def _cancelled(uses, size: float):
    """The uses, and one more that takes away nearly all of them."""
    total = sum(use.dense().reshape(3, -1) for use in _double(uses))
    shape = uses[0].dense().shape
    rest = -total * (1 + size * torch.randn(3, 1, dtype=torch.float64))
    return [*uses, Dense(rest.float().reshape(shape))]


def _plan(clipping: str) -> PrivacyPlan:
    return PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=BOUND,
        sample_rate=0.5,
        steps=1,
        target_delta=1e-5,
        num_examples=8,
        clipping=clipping,
    )


@hypothesis.given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 2**31),
    scale=st.integers(-18, 15),
    cancels=st.one_of(st.none(), st.floats(0, 7)),
    clipping=st.sampled_from(["flat", "automatic"]),
)
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
def test_no_form_of_gradients_adds_more_than_the_bound(form, seed, scale, cancels, clipping):
    """In float32, at every scale, whatever cancels; the factors say in float64 how long it is."""
    torch.manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape) * 10 ** (scale + torch.randn(shape[0], *(1,) * (len(shape) - 1)))

    uses = FORMS[form](draw)
    if cancels is not None:
        uses = _cancelled(uses, 10**-cancels)
    exact = sum(use.dense().reshape(3, -1) for use in _double(uses)).norm(dim=1)
    weight, told = (
        nn.Parameter(torch.zeros(uses[0].dense().shape[1:])),
        nn.Parameter(torch.zeros(3)),
    )
    # Beside it a gradient too short to matter, which tells the coefficient of each example.
    short = 1e-15 * torch.eye(3)
    parts, losses = {weight: combine(uses), told: [Dense(short)]}, torch.zeros(3)
    norms = gradient_norms(parts, losses)
    into = {parameter: torch.zeros_like(parameter) for parameter in parts}
    clipped = clip_gradients(
        parts, norms, losses, Clipper({"weight": weight, "told": told}, _plan(clipping))
    )
    clipped.total.add_to(into, scale=1.0)
    coefficients = into[told].double() / 1e-15
    for example in range(3):
        length, factor = float(exact[example]), float(coefficients[example])
        if not clipped.finite[example]:
            assert factor == 0
        elif math.isfinite(length):
            assert length * factor <= BOUND * EXCESS
            if cancels is None and length > 1e-9:
                assert length * factor >= 0.98 * min(BOUND, length) * length / (length + 0.01)


@pytest.mark.parametrize("cancels", [None, 2, 5])
@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_gradients_adds_more_than_its_group_s_share(form, cancels):
    """Where parameters are clipped in groups, the norm in each is an upper bound, too."""
    shares = {"form": 0.6, "other": 0.8}
    for seed in range(6):
        torch.manual_seed(seed)
        scale = 10.0 ** (seed - 3)
        uses = FORMS[form](lambda *shape, scale=scale: scale * torch.randn(*shape))
        if cancels is not None:
            uses = _cancelled(uses, 10.0**-cancels)
        exact = sum(use.dense().reshape(3, -1) for use in _double(uses)).norm(dim=1)
        other = torch.randn(3, 7) * 10.0 ** torch.randint(-3, 3, (3, 1))
        told = 1e-15 * torch.eye(3)
        sizes = {"form": uses[0].dense().shape[1:], "other": (7,)}
        sizes |= {"told.one": (3,), "told.two": (3,)}
        weights = {name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
        gradients = [combine(uses), [Dense(other)], [Dense(told)], [Dense(told)]]
        parts = dict(zip(weights.values(), gradients, strict=True))
        listed = (("form", "told.one"), ("other", "told.two"))
        plan = replace(_plan("flat"), clipping="groups:3,4", clipping_groups=listed)
        clipped = clip_gradients(parts, None, torch.zeros(3), Clipper(weights, plan))
        into = {parameter: torch.zeros_like(parameter) for parameter in parts}
        clipped.total.add_to(into, scale=1.0)
        lengths = {"form": exact, "other": other.double().norm(dim=1)}
        for name, teller in (("form", "told.one"), ("other", "told.two")):
            added = into[weights[teller]].double() / 1e-15 * lengths[name]
            bound = BOUND * shares[name]
            assert bool((added <= bound * EXCESS).all())
            if cancels is None:
                wanted = lengths[name].clamp(max=bound)
                assert bool((added >= 0.98 * wanted).all())
