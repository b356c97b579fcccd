"""What mixes examples, or is not seen, is refused in every precision and at every scale; what does
neither never is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpnlu.engines import free_memory
from dpnlu.gradients import trace
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.trace import Trace
from dpnlu.training.handle import privatize

FEATURES, CLASSES, SIZE = 6, 3, 12
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.float32, True),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:private.step was called outside", "ignore:More than . programs"
)


class Net(nn.Module):
    """Two layers; a row of the batch is FEATURES numbers and a class."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def hidden(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.body(rows[:, :FEATURES]))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.hidden(rows))

    def losses(self, rows: Tensor) -> Tensor:
        """Outside of forward."""
        return _entropy(self.head(self.hidden(rows)), rows)


def _classes(rows: Tensor) -> Tensor:
    return rows[:, FEATURES].long()


def _entropy(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(rows.dtype), _classes(rows), reduction="none")


def plain(model: nn.Module, rows: Tensor) -> Tensor:
    return _entropy(model(rows), rows)


def _rows(count: int = SIZE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    labels = torch.randint(CLASSES, (count, 1))
    return list(torch.cat([torch.randn(count, FEATURES), labels], 1).to(dtype))


Losses = Callable[[nn.Module, Tensor], Tensor]


def train(
    model: nn.Module,
    losses: Losses,
    rows: list[Tensor],
    make_plan,
    *,
    way: str = "stepper",
    autocast: bool = False,
    engine: str | None = None,
    verify: bool = True,
    physical: int | None = None,
    steps: int = 3,
    sample_rate: float = 1.0,
) -> Tensor:
    """Train without noise; the last released sum, flat."""

    def losses_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return losses(model, batch)

    fields = {"noise_multiplier": 0.0, "sample_rate": sample_rate, "steps": steps}
    plan = make_plan(num_examples=len(rows), **fields)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with privatize(model, optimizer, plan, engine=engine, verify=verify) as private:
        step = {
            "stepper": lambda: private.stepper(losses_of),
            "step": lambda: lambda batch: private.step(losses_of(batch)),
            "compiled": lambda: private.compile(losses_of),
        }[way]()
        for batch in private.loader(rows, physical_batch_size=physical):
            step(batch)
        return torch.cat([gradient.flatten() for gradient in private.gradients.values()])


@pytest.fixture
def released(make_plan, monkeypatch) -> Callable[..., Tensor]:
    # What is traced is run as it is.
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)

    def run(model: nn.Module, losses: Losses, rows: list[Tensor], **options) -> Tensor:
        return train(model, losses, rows, make_plan, **options)

    return run


# ---- what mixes ------------------------------------------------------------------------------


def _with_batch_mean(share: float) -> Losses:
    def losses(model: Net, rows: Tensor) -> Tensor:
        logits = model(rows)
        return _entropy(logits - share * logits.mean(0), rows)

    return losses


def _with_auxiliary(share: float) -> Losses:
    return lambda model, rows: plain(model, rows) + share * model(rows).mean(0).square().sum()


def _contrastive(share: float) -> Losses:
    def losses(model: Net, rows: Tensor) -> Tensor:
        logits = model(rows)
        pairs = F.cross_entropy(logits @ logits.mT, torch.arange(len(rows)), reduction="none")
        return _entropy(logits, rows) + share * pairs

    return losses


MIXING = {
    "a term of the loss of the whole batch, times 0.01": _with_auxiliary(0.01),
    "a hundredth of the batch's mean": _with_batch_mean(0.01),
    "in-batch negatives, times 0.03": _contrastive(0.03),
    "in-batch negatives, times 1e-5": _contrastive(1e-5),
    "the mean loss, for everybody": lambda model, rows: plain(model, rows).mean().expand(len(rows)),
    "softmax over the batch": lambda model, rows: _entropy(model(rows).softmax(0), rows),
    "standardised activations": lambda model, rows: _entropy(
        model.head(F.batch_norm(model.hidden(rows), None, None, training=True)), rows
    ),
}


@every_precision
@pytest.mark.parametrize("way", ["stepper", "step", "compiled"])
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_is_refused_however_little(released, name, way, precision):
    """… with the module, and with two examples of which one has a part in the other's loss."""
    dtype, autocast = precision
    model = Net().to(dtype)
    before = model.head.weight.detach().clone()
    match = "depend on that example alone" if way == "compiled" else r"^Module \S+: examples mix"
    with pytest.raises(UnsupportedLayerError, match=match):
        released(model, MIXING[name], _rows(dtype=dtype), way=way, autocast=autocast)
    assert torch.equal(model.head.weight, before), "nothing of it was released"


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("name", MIXING)
def test_no_size_of_gradients_hides_it(released, name, scale):
    def losses(model: Net, rows: Tensor) -> Tensor:
        return scale * MIXING[name](model, rows)

    with pytest.raises(UnsupportedLayerError, match="examples mix"):
        released(Net().double(), losses, _rows(dtype=torch.float64))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("stepper", r"^Module \(the loss function\): examples mix"),
        ("step", "head.bias is used elsewhere"),
        ("compiled", r"^Module \(the loss function\): .*let nothing be added up"),
    ],
)
def test_a_parameter_that_meets_a_number_of_all_examples_is_refused(released, way, message):
    def losses(model: Net, rows: Tensor) -> Tensor:
        found = plain(model, rows)
        return found + found.mean() * model.head.bias[0]

    with pytest.raises(UnsupportedLayerError, match=message):
        released(Net(), losses, _rows(), way=way)


def test_the_loss_of_the_next_example_is_not_one_s_own(released):
    """Every row has a part in one loss alone, but not in its own."""
    with pytest.raises(UnsupportedLayerError, match=r"when .* others are exchanged"):
        released(Net(), lambda model, rows: plain(model, rows).roll(1), _rows())


def test_one_masked_loss_does_not_hide_it(released):
    def losses(model: Net, rows: Tensor) -> Tensor:
        mask = (torch.arange(len(rows)) > 0).to(rows)
        return plain(model, rows) * mask + 0.01 * model(rows).mean(0).square().sum()

    with pytest.raises(UnsupportedLayerError, match="examples mix"):
        released(Net(), losses, _rows())


def test_one_example_that_is_not_finite_does_not_hide_it(released):
    def losses(model: Net, rows: Tensor) -> Tensor:
        spoilt = torch.where(torch.arange(len(rows)) == 0, math.inf, 1.0)
        return plain(model, rows) * spoilt + 0.1 * model(rows)[1:].mean()

    with pytest.raises(UnsupportedLayerError, match="examples mix"):
        released(Net(), losses, _rows())


# ---- what mixes later ------------------------------------------------------------------------


class Scheduled:
    """A loss with a number that changes after the fourth batch."""

    def __init__(self, first: float, then: float, losses: Callable) -> None:
        self.calls, self.values, self.losses = 0, (first, then), losses

    def __call__(self, model: nn.Module, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.losses(self.values[self.calls > 4], model, rows)


class Gate(Net):
    """What mixes stands behind a gate, or an adapter, that is zero at first."""

    def __init__(self, *, buffer: bool = False) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("gate", torch.zeros(()))
        else:
            self.gate = nn.Parameter(torch.zeros(8))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.hidden(rows)
        return self.head(hidden + self.gate * hidden.mean(0).expand_as(hidden))


def _mixed_up(share: float, model: Net, rows: Tensor) -> Tensor:
    hidden = model.hidden(rows)
    return _entropy(model.head(share * hidden + (1 - share) * hidden.flip(0)), rows)


def _turned(dim: float, model: Net, rows: Tensor) -> Tensor:
    return _entropy(model.head(model.hidden(rows).softmax(int(dim))), rows)


LATER = {
    "a weight that is warmed up from 0": lambda: (
        Net(),
        Scheduled(0.0, 0.1, lambda share, model, rows: _contrastive(share)(model, rows)),
    ),
    "a share that was 1": lambda: (Net(), Scheduled(1.0, 0.7, _mixed_up)),
    "a dimension": lambda: (Net(), Scheduled(1, 0, _turned)),
    "a gate that starts at zero": lambda: (Gate(), plain),
    "a buffer that starts at zero": lambda: (Gate(buffer=True), _opening_the_gate()),
}


def _opening_the_gate() -> Losses:
    def losses(share: float, model: Gate, rows: Tensor) -> Tensor:
        model.gate.fill_(share)
        return plain(model, rows)

    return Scheduled(0.0, 0.5, losses)


@pytest.mark.parametrize("way", ["stepper", "step"])
@pytest.mark.parametrize("name", LATER)
def test_what_mixes_later_is_refused_then(released, name, way):
    """… though the graph has the same nodes."""
    model, losses = LATER[name]()
    with pytest.raises(UnsupportedLayerError, match=r"examples mix|are exchanged"):
        released(model, losses, _rows(), way=way, steps=9)


# ---- what is not seen ------------------------------------------------------------------------


def _decayed(model: Net, rows: Tensor) -> Tensor:
    return plain(model, rows) + 1e-4 * model.head.weight.square().sum()


def _functional(model: Net, rows: Tensor) -> Tensor:
    parameters = {name: 2 * value for name, value in model.named_parameters()}
    return _entropy(torch.func.functional_call(model, parameters, (rows,)), rows)


def _net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def _picked_scalars(model: Net, rows: Tensor) -> Tensor:
    """Rows are chosen by their values, and one number of each meets a parameter."""
    losses = _entropy(model(rows), rows)
    large = losses.detach() > 1.1
    scaled = losses[large] * model.head.bias[0]
    return losses.masked_scatter(large, scaled.to(losses.dtype))


@every_precision
def test_whose_single_numbers_are_is_found_as_well(make_plan, precision):
    dtype, autocast = precision
    rows = _rows(dtype=dtype)
    found, expected = (
        train(_net(dtype), _picked_scalars, rows, make_plan, autocast=autocast, engine=engine)
        for engine in ("book_keeping", "per_example")
    )
    close = 0.02 if autocast else 1e-4
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


class Hidden(torch.autograd.Function):
    """Uses weights where nobody looks."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.mT

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return gradient @ weight, gradient.mT @ inputs


def _hidden(model: Net, rows: Tensor) -> Tensor:
    return _entropy(Hidden.apply(model.hidden(rows), model.head.weight), rows)


class Reversible(torch.autograd.Function):
    """Computes gradients of weights by a backward pass of its own."""

    @staticmethod
    def forward(ctx, inputs: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs.detach())
        with torch.no_grad():
            return layer(inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        inputs = ctx.saved_tensors[0].clone()
        with torch.enable_grad():
            ctx.layer(inputs.requires_grad_()).backward(gradient)
        return inputs.grad, None


def _reversible(model: Net, rows: Tensor) -> Tensor:
    return _entropy(Reversible.apply(model.hidden(rows), model.head), rows)


def _scripted_product(inputs: Tensor, weight: Tensor) -> Tensor:
    return inputs @ weight.t()


def _scripted(model: Net, rows: Tensor) -> Tensor:
    product = torch.jit.script(_scripted_product)
    return _entropy(product(model.hidden(rows), model.head.weight), rows)


def _reentrant(model: Net, rows: Tensor) -> Tensor:
    hidden = model.hidden(rows).detach().requires_grad_()
    return _entropy(checkpoint(model.head, hidden, use_reentrant=True), rows)


# What is done, and whether a stepper sees it.
UNSEEN = {
    "a method beside forward, by the parameter": (_decayed, True),
    "a custom autograd function": (_hidden, False),
    "a reversible layer": (_reversible, False),
    "a scripted function": (_scripted, False),
    "reentrant checkpointing": (_reentrant, False),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:None of the inputs have")
@pytest.mark.parametrize("physical", [None, 1], ids=["batches", "one by one"])
@pytest.mark.parametrize("way", ["stepper", "step"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_not_seen_is_refused_by_name_at_any_batch_size(released, name, way, physical):
    losses, is_seen = UNSEEN[name]
    if way == "stepper" and is_seen:
        expected = released(
            _seeded(), losses, _same_rows(), engine="per_example", physical=physical
        )
        found = released(_seeded(), losses, _same_rows(), way=way, physical=physical)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return
    match = r"(head|body)\.\w+ is used elsewhere|use_reentrant|calling backward\(\) inside"
    model = Net()
    with pytest.raises(UnsupportedLayerError, match=match):
        released(model, losses, _rows(), way=way, physical=physical)
    assert all(parameter.grad is None for parameter in model.parameters())


def _seeded() -> Net:
    torch.manual_seed(5)
    return Net()


def _same_rows() -> list[Tensor]:
    torch.manual_seed(6)
    return _rows()


@pytest.mark.parametrize("way", ["stepper", "step"])
def test_a_forward_pass_of_another_size_before_is_no_hindrance(released, way):
    """… with gradients enabled."""

    def losses(model: Net, rows: Tensor) -> Tensor:
        model(rows[:1])
        return plain(model, rows)

    expected = released(_seeded(), plain, _same_rows(), engine="per_example")
    torch.testing.assert_close(released(_seeded(), losses, _same_rows(), way=way), expected)


def test_losses_of_another_forward_pass_are_refused(make_plan):
    """Outside the loader nobody says how many examples there are."""
    model = Net()
    private = privatize(model, torch.optim.SGD(model.parameters(), lr=1.0), make_plan())
    rows = torch.stack(_rows())
    stray = plain(model, rows[:5])
    assert len(stray) == 5
    with pytest.raises(ValueError, match=r"the 5 examples .* got 12"):
        private.step(plain(model, rows))
    private.close()


# ---- what is valid ---------------------------------------------------------------------------


class Chain(nn.Module):
    """A conditional random field by hand, in a method; its losses are differences of logarithms
    that nearly cancel where it is sure."""

    def __init__(self, confidence: float) -> None:
        super().__init__()
        self.emissions = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.transitions = nn.Parameter(confidence * torch.eye(CLASSES))

    def losses(self, rows: Tensor) -> Tensor:
        states = self.emissions(rows[:, None, :FEATURES].expand(-1, 5, -1))
        score = states[:, 0]
        for step in range(1, 5):
            pairs = score[:, :, None] + self.transitions + states[:, step, None]
            score = pairs.logsumexp(1)
        path = _classes(rows)[:, None].expand(-1, 5)
        gold = states.gather(2, path[..., None])[..., 0].sum(1)
        gold = gold + self.transitions[path[:, :-1], path[:, 1:]].sum(1)
        return score.logsumexp(1) - gold


def _twice(model: Net, rows: Tensor) -> Tensor:
    """Two views of the batch, one after the other, and a term between them."""
    logits = model(torch.cat([rows, rows + 0.1]))
    one, other = logits.chunk(2)
    distance = F.kl_div(one.log_softmax(1), other.softmax(1), reduction="none").sum(1)
    return _entropy(one, rows) + distance


def _sorted(model: Net, rows: Tensor) -> Tensor:
    order = rows[:, 0].argsort()
    return plain(model, rows[order])[order.argsort()]


def _routed(model: Net, rows: Tensor) -> Tensor:
    """Each row goes through the layer that its first number chooses."""
    first = rows[:, 0] > 0
    losses = torch.zeros(len(rows), dtype=rows.dtype)
    losses[first] = plain(model, rows[first])
    losses[~first] = 0.5 * plain(model, rows[~first])
    return losses


@dataclass(frozen=True)
class Valid:
    """A training that mixes nothing; `ways` see all of it."""

    losses: Losses
    model: Callable[[], nn.Module] = Net
    ways: tuple[str, ...] = ("stepper", "step", "compiled")


VALID = {
    "plain": Valid(plain),
    "a method beside forward": Valid(lambda model, rows: model.losses(rows)),
    "tiny gradients": Valid(lambda model, rows: 1e-14 * plain(model, rows)),
    "vanishing gradients": Valid(lambda model, rows: 0 * plain(model, rows)),
    "huge gradients": Valid(lambda model, rows: 1e14 * plain(model, rows)),
    "some masked": Valid(lambda model, rows: plain(model, rows) * (rows[:, 0] > 0)),
    "a chain": Valid(lambda m, rows: m.losses(rows), lambda: Chain(0.5), ("stepper",)),
    "a chain that is sure": Valid(lambda m, rows: m.losses(rows), lambda: Chain(9.0), ("stepper",)),
    "functional_call with what is computed": Valid(_functional),
    "decayed weights": Valid(_decayed, ways=("stepper", "compiled")),
    "two views side by side": Valid(_twice, ways=("stepper", "step")),
    "sorted by values": Valid(_sorted, ways=("stepper", "step")),
    "routed by values": Valid(_routed, ways=("stepper",)),
    "two passes": Valid(lambda m, rows: plain(m, rows) + _entropy(m(rows.square()), rows)),
    "a gate on its own example": Valid(lambda m, rows: plain(m, rows * m.head.bias.mean())),
}
PAIRS = [(name, way) for name, valid in VALID.items() for way in valid.ways]


@every_precision
@pytest.mark.parametrize(("name", "way"), PAIRS, ids=str)
def test_what_is_valid_is_never_refused_and_exact(released, name, way, precision):
    """… over many batches of all sizes, single examples among them."""
    dtype, autocast = precision
    valid = VALID[name]
    steps = 8 if way == "compiled" else 30  # a program for every size
    if name == "a gate on its own example" and way == "step":
        pytest.skip("the parameter is used outside the model")
    options = {"sample_rate": 0.3, "steps": steps, "way": way, "autocast": autocast}
    released(valid.model().to(dtype), valid.losses, _rows(dtype=dtype), **options)
    if autocast or way == "compiled":
        return
    found = []
    for engine in ("book_keeping", "per_example"):
        torch.manual_seed(1)
        model, rows = valid.model().to(dtype), _rows(dtype=dtype)
        found.append(released(model, valid.losses, rows, engine=engine, way=way))
    tolerance = 1e-9 if dtype is torch.float64 else 1e-3
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance * float(found[1].norm()))


# ---- in pieces ---------------------------------------------------------------------------------


@pytest.fixture
def in_pieces(monkeypatch) -> None:
    """The places of small models are gone through in pieces, too, as those of large ones are."""
    monkeypatch.setattr(trace, "_PIECE", 1)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_refused_in_pieces(released, name):
    with pytest.raises(UnsupportedLayerError, match="examples mix"):
        released(Net(), MIXING[name], _rows())


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("name", VALID)
def test_what_is_valid_is_exact_in_pieces(released, name):
    valid, found = VALID[name], []
    for engine in ("book_keeping", "per_example"):
        torch.manual_seed(1)
        model, rows = valid.model().double(), _rows(dtype=torch.float64)
        found.append(released(model, valid.losses, rows, engine=engine))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9 * float(found[1].norm()))


@pytest.mark.usefixtures("in_pieces")
def test_a_wrong_gradient_is_found_in_every_piece(released, monkeypatch):
    """… of either layer, by plain automatic differentiation."""
    right = OuterProducts.add_weighted_sum
    for width in (FEATURES, 8):

        def wrong(use, coefficients, out, width=width):
            right(use, coefficients * (1.01 if use.left.shape[2] == width else 1.0), out)

        monkeypatch.setattr(OuterProducts, "add_weighted_sum", wrong)
        name = "body" if width == FEATURES else "head"
        with pytest.raises(UnsupportedLayerError, match=f"gradient of {name}.weight .* a defect"):
            released(Net(), plain, _rows())


def test_a_wrong_norm_is_found(released, monkeypatch):
    right = OuterProducts.squared_norms

    def wrong(use, grams):
        norms = right(use, grams)
        return replace(norms, values=1.1 * norms.values)

    monkeypatch.setattr(OuterProducts, "squared_norms", wrong)
    with pytest.raises(UnsupportedLayerError, match=r"the norm .* of an example's gradient"):
        released(Net(), plain, _rows())


@pytest.mark.parametrize("is_large", [False, True])
def test_free_memory_is_handed_back_where_a_batch_takes_much(released, monkeypatch, is_large):
    handed_back = []
    monkeypatch.setattr(free_memory, "_trim", handed_back.append)
    if is_large:
        monkeypatch.setattr(trace, "_PIECE", 1)
    released(Net(), plain, _rows())
    assert bool(handed_back) is is_large


@given(sizes=st.lists(st.integers(0, 2**24), max_size=12))
def test_pieces_are_all_places_in_order_and_no_large_half(sizes):
    places = [SimpleNamespace(nbytes=size) for size in sizes]
    pieces = Trace.pieces(SimpleNamespace(places=places))
    assert [number for piece in pieces for number in piece] == list(range(len(sizes)))
    assert 1 <= len(pieces) <= 2
    if sum(sizes) >= 2**24:
        for piece in pieces:
            assert sum(sizes[number] for number in piece) <= sum(sizes) / 2 + max(sizes) / 2


def test_a_check_draws_no_random_numbers_of_others(released):
    """Dropout drops what it would without checks."""

    class Dropped(Net):
        def hidden(self, rows: Tensor) -> Tensor:
            return F.dropout(super().hidden(rows), 0.5)

    found = []
    for verify in (True, False):
        torch.manual_seed(2)
        found.append(released(Dropped(), plain, _rows(), verify=verify, steps=6))
    assert torch.equal(*found)


def test_checks_can_be_left_out(released):
    released(Net(), _with_batch_mean(1.0), _rows(), verify=False)
