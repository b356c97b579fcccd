"""All engines keep one contract; the loop over examples and neighbouring batches say which."""

import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.engines import ENGINES
from dpnlu.engines.microbatch import Microbatch
from dpnlu.engines.opacus import Opacus
from dpnlu.engines.outcome import OpenUnit
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import SquaredNorms

# torch's opinion of the hooks that Opacus uses.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

PER_EXAMPLE = ["book_keeping", "per_example", "opacus"]
EXAMPLES, POSITIONS, WORDS = 6, 5, 11


class Feedforward(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))


class Bag(nn.Module):
    """Layers that every engine supports, on token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.words(ids)).tanh()).mean(1)


class Tagger(nn.Module):
    """A BiLSTM with a head for the text and one for its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4, padding_idx=0)
        self.recurrent = nn.LSTM(4, 3, batch_first=True, bidirectional=True)
        self.intent, self.slots = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.words(ids))
        return self.intent(hidden.amax(1)) + self.slots(hidden).sin().sum(1)


class Tied(nn.Module):
    """A word embedding that is the output layer too, and transitions added by broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.output = nn.Linear(4, WORDS)
        self.output.weight = self.words.weight
        self.transitions = nn.Parameter(torch.randn(WORDS, WORDS))

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.output(self.words(ids).tanh())
        pairs = logits[:, :-1, :, None] + self.transitions + logits[:, 1:, None, :]
        return pairs.logsumexp((2, 3))


class Encoder(nn.Module):
    """A small BERT with default inputs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
        config = hf.BertConfig(vocab_size=WORDS, num_hidden_layers=1, **sizes)
        self.encoder = hf.AutoModel.from_config(config).eval()
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids).last_hidden_state[:, 0])


def _vectors(count: int) -> Tensor:
    return torch.randn(count, 3)


def _texts(count: int) -> Tensor:
    return torch.randint(0, WORDS, (count, POSITIONS))


@dataclass(frozen=True)
class Kind:
    """A kind of model, what it receives, and the engines that support it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor] = _texts
    engines: tuple[str, ...] = ("book_keeping", "per_example")

    def __str__(self) -> str:
        return self.make.__name__


KINDS = [
    Kind(Feedforward, _vectors, tuple(PER_EXAMPLE)),
    Kind(Bag, engines=tuple(PER_EXAMPLE)),
    Kind(Tagger),
    Kind(Tied),
    Kind(Encoder),
]
PAIRS = [(kind, engine) for kind in KINDS for engine in kind.engines]
every_pair = pytest.mark.parametrize(("kind", "engine"), PAIRS, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def losses_of(model: nn.Module, inputs: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """(B,) losses of very different sizes, if the weights are."""
    return weights * (model(inputs) + 1).square().flatten(1).sum(1)


def _weights(count: int) -> Tensor:
    return 10 ** torch.linspace(-4, 3, count)[torch.randperm(count)]


def _norms(rows: list[Tensor]) -> Tensor:
    """(B,) norms of per-example gradients, all parameters together."""
    return torch.cat([row.flatten(1) for row in rows], 1).norm(dim=1)


def _weighted(rows: list[Tensor], coefficients: Tensor) -> Tensor:
    return torch.cat([torch.einsum("b,b...->...", coefficients, row).flatten() for row in rows])


@pytest.fixture
def oracle(per_example_gradients):
    """The clipped sum by the loop, flat; `clip` takes norms to coefficients."""

    def compute(model, batch, clip) -> Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        rows = per_example_gradients(losses_of(model, *batch), parameters)
        return _weighted(rows, clip(_norms(rows)))

    return compute


# ---- per-example clipping --------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@every_pair
@pytest.mark.parametrize("size", [1, 4, EXAMPLES])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_per_example_engines_agree_with_the_loop(clipped_sum, oracle, kind, engine, size, clipping):
    """… for every rule, however the logical batch is cut into physical ones."""
    model, batch = kind.make(), (kind.inputs(EXAMPLES), _weights(EXAMPLES))
    rules = {
        "flat": lambda norms: (0.7 / norms).clamp(max=1),
        "automatic": lambda norms: 0.7 / (norms + 0.01),
    }
    found = clipped_sum(
        engine, model, losses_of, batch,
        physical_batch_size=size, max_grad_norm=0.7, clipping=clipping,
    )  # fmt: skip
    torch.testing.assert_close(found, oracle(model, batch, rules[clipping]), rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
@every_pair
def test_one_example_moves_the_sum_by_at_most_the_bound(clipped_sum, kind, engine):
    """Each clipping unit adds at most `max_grad_norm`: neighbouring batches, adversarial losses."""
    model, bound = kind.make(), 0.3
    inputs, weights = kind.inputs(EXAMPLES), 1e4 * _weights(EXAMPLES)
    whole = clipped_sum(engine, model, losses_of, (inputs, weights), max_grad_norm=bound)
    moved = []
    for left_out in range(EXAMPLES):
        kept = torch.arange(EXAMPLES) != left_out
        batch = (inputs[kept], weights[kept])
        neighbour = clipped_sum(engine, model, losses_of, batch, max_grad_norm=bound)
        moved.append(float((whole - neighbour).norm()))
    assert max(moved) <= bound * (1 + 1e-9)
    assert max(moved) >= bound * 0.999, "the bound is reached: the test would notice a larger step"


@every_pair
def test_norms_are_those_before_clipping(make_plan, per_example_gradients, kind, engine):
    model, inputs = kind.make(), kind.inputs(4)
    parameters = list(model.parameters())
    expected = _norms(per_example_gradients(losses_of(model, inputs), parameters))
    with ENGINES[engine](model, make_plan()) as made:
        clipped = made.clip(losses_of(model, inputs), unit=OpenUnit())
    torch.testing.assert_close(clipped.norms, expected, rtol=1e-4, atol=1e-5)
    assert clipped.non_finite == 0


@every_pair
def test_sums_are_added_to_the_buffers_and_scaled(make_plan, kind, engine):
    model, inputs, weights = kind.make(), kind.inputs(4), torch.tensor([1e-2, 1.0, 1e-2, 1e2])
    found = []
    for start, scale in ((0.0, 1.0), (5.0, 0.25)):
        into = {p: torch.full_like(p, start) for p in model.parameters()}
        with ENGINES[engine](model, make_plan()) as made:
            clipped = made.clip(losses_of(model, inputs, weights), unit=OpenUnit())
        clipped.total.add_to(into, scale=scale)
        found.append(torch.cat([(total - start).flatten() / scale for total in into.values()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@every_pair
def test_an_empty_batch_adds_nothing(clipped_sum, make_plan, kind, engine):
    model = kind.make()
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    with ENGINES[engine](model, make_plan()) as made:
        losses = losses_of(model, kind.inputs(4))[:0] if engine != "opacus" else torch.zeros(0)
        clipped = made.clip(losses, unit=OpenUnit())
    if clipped.total is not None:
        clipped.total.add_to(into, scale=1.0)
    assert clipped.norms.shape == (0,) and clipped.non_finite == 0
    assert not any(total.any() for total in into.values())


def test_an_example_without_a_gradient_is_no_division_by_zero(clipped_sum):
    model = Feedforward()
    for engine in PER_EXAMPLE:
        for clipping in ("flat", "automatic"):
            batch = (_vectors(3), torch.zeros(3))
            assert not clipped_sum(engine, model, losses_of, batch, clipping=clipping).any()


# ---- what is not finite ----------------------------------------------------------------------


def _steep(losses: Tensor, example: int) -> Tensor:
    """The same losses, one of them with an infinite slope."""
    extra = (losses[example] - losses[example].detach()).sqrt()
    return losses + F.one_hot(torch.tensor(example), len(losses)) * extra


SPOILT = {
    "infinite loss": lambda losses: losses * torch.tensor([1, math.inf, 1, 1]),
    "no number as loss": lambda losses: losses * torch.tensor([1, math.nan, 1, 1]),
    "infinity added": lambda losses: losses + torch.tensor([0, math.inf, 0, 0]),
    "infinite gradient of a finite loss": lambda losses: _steep(losses, 1),
    "infinite gradient of the last loss": lambda losses: _steep(losses, 3),
    "infinite last loss": lambda losses: losses * torch.tensor([1, 1, 1, math.inf]),
}


def _flags(name: str) -> Tensor:
    return torch.arange(4) == (3 if "last" in name else 1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("first", [True, False], ids=["in the first batch", "later"])
@pytest.mark.parametrize("engine", PER_EXAMPLE)
@pytest.mark.parametrize("name", SPOILT)
def test_an_example_that_is_not_finite_adds_exactly_nothing(
    make_plan, per_example_gradients, engine, name, first
):
    """… is counted, and takes nothing away from the others; or the whole batch is refused."""
    model, inputs, kept = Feedforward(), _vectors(4), ~_flags(name)
    parameters = list(model.parameters())
    rows = per_example_gradients(losses_of(model, inputs)[kept], parameters)
    expected = _weighted(rows, (1 / _norms(rows)).clamp(max=1))

    into = {p: torch.zeros_like(p) for p in parameters}
    with ENGINES[engine](model, make_plan()) as made:
        if not first:
            made.clip(losses_of(model, inputs))
        losses = SPOILT[name](losses_of(model, inputs))
        try:
            clipped = made.clip(losses)
        except (ValueError, RuntimeError) as error:
            assert engine == "per_example" and "finite" in str(error)
            return
    clipped.total.add_to(into, scale=1.0)
    assert clipped.non_finite == 1
    found = torch.cat([total.flatten() for total in into.values()])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS[1:4], ids=str)
def test_activations_that_are_not_finite_stay_with_their_example(clipped_sum, kind, value):
    """Embedding, BiLSTM, tied weights: nothing of the bad example reaches a sum or a norm."""
    model, ids = kind.make(), kind.inputs(4) % (WORDS - 1)
    ids[1, 2] = WORDS - 1
    model.words.weight.data[WORDS - 1] = value
    model.words.weight.data[: WORDS - 1].clamp_(-2, 2)
    if kind.make is Tied:
        # The output layer meets the poisoned row in every example: all are lost, none is spoilt.
        assert not clipped_sum("book_keeping", model, losses_of, ids).any()
        return
    found = clipped_sum("book_keeping", model, losses_of, ids)
    kept = torch.arange(4) != 1
    expected = clipped_sum("book_keeping", model, losses_of, ids[kept])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert bool(torch.isfinite(found).all())


# ---- micro-batches ---------------------------------------------------------------------------

MICROBATCH = {"clipping_unit": "microbatch", "microbatches": 3}


def _unit_sum(make_plan, model, inputs, cuts, weights=1.0) -> Tensor:
    """What one micro-batch adds, given in pieces that end at `cuts`."""
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    made, unit, start = Microbatch(model, make_plan(**MICROBATCH)), OpenUnit(), 0
    for end in cuts:
        losses = losses_of(model, inputs[start:end], weights)
        clipped = made.clip(losses, unit=unit, closes_unit=end == cuts[-1])
        assert (clipped.total is None) is (end != cuts[-1])
        start = end
    clipped.total.add_to(into, scale=1.0)
    return torch.cat([total.flatten() for total in into.values()])


@pytest.mark.usefixtures("double")
@every_kind
@pytest.mark.parametrize("weight", [1e-6, 1e3], ids=["short", "long"])
def test_a_microbatch_adds_its_clipped_mean(make_plan, oracle, kind, weight):
    """… however it is cut into physical batches."""
    model, inputs = kind.make(), kind.inputs(5)
    mean = oracle(model, (inputs, weight), torch.ones_like) / 5
    expected = mean * min(1.0, 1 / float(mean.norm()))
    for cuts in ([5], [2, 5], [1, 2, 3, 4, 5]):
        found = _unit_sum(make_plan, model, inputs, cuts, weight)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("double")
@every_kind
def test_one_example_moves_a_microbatch_by_at_most_twice_the_bound(make_plan, kind):
    model, inputs = kind.make(), kind.inputs(5)
    weights = 1e4 * _weights(5) * torch.tensor([1, -1, 1, -1, 1])
    whole = _unit_sum(make_plan, model, inputs, [5], weights)
    for left_out in range(5):
        kept = torch.arange(5) != left_out
        neighbour = _unit_sum(make_plan, model, inputs[kept], [4], weights[kept])
        assert float((whole - neighbour).norm()) <= 2 * (1 + 1e-9)


@pytest.mark.usefixtures("double")
def test_one_example_can_move_a_microbatch_by_twice_the_bound(make_plan):
    """Gradients +M and -3M with M far above C: without the second, the clipped mean goes from -C
    to +C. A sensitivity of C would be too small."""
    model = nn.Linear(1, 1, bias=False)

    def adds(slopes: list[float]) -> float:
        into = {model.weight: torch.zeros(1, 1)}
        plan = make_plan(**MICROBATCH, max_grad_norm=0.5)
        losses = (model(torch.tensor(slopes)[:, None])).flatten()
        Microbatch(model, plan).clip(losses, unit=OpenUnit()).total.add_to(into, scale=1.0)
        return float(into[model.weight])

    assert adds([1e3, -3e3]) == pytest.approx(-0.5)
    assert adds([1e3]) == pytest.approx(0.5)
    assert make_plan(**MICROBATCH, max_grad_norm=0.5).sensitivity == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_microbatch_that_is_not_finite_adds_exactly_nothing(make_plan, value):
    model, inputs = Feedforward(), _vectors(4)
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    made, unit = Microbatch(model, make_plan(**MICROBATCH)), OpenUnit()
    weights = torch.tensor([1, value, 1, 1])
    clipped = made.clip(losses_of(model, inputs, weights), unit=unit)
    assert clipped.non_finite == 1 and clipped.total is None
    clipped = made.clip(losses_of(model, inputs), unit=unit)
    clipped.total.add_to(into, scale=1.0)
    assert any(total.any() for total in into.values())
    assert clipped.non_finite == 0 and all(bool(torch.isfinite(t).all()) for t in into.values())


@pytest.mark.usefixtures("double")
def test_a_whole_batch_is_divided_into_microbatches_at_random(make_plan):
    """At most as many units as planned, each with its clipped mean; assigned anew each time."""
    model = nn.Linear(8, 1, bias=False)
    found = []
    for _ in range(40):
        into = {model.weight: torch.zeros(1, 8)}
        losses = 1e3 * model(torch.eye(8)).flatten()
        clipped = Microbatch(model, make_plan(**MICROBATCH)).clip(losses)
        clipped.total.add_to(into, scale=1.0)
        assert 1 <= len(clipped.norms) <= 3
        shares = into[model.weight][0]
        # An example in a unit of m has 1 / √m: each unit's shares have norm 1.
        sizes = (1 / shares.square()).round().long()
        counts = torch.bincount(sizes, minlength=9)
        assert all(int(count) % size == 0 for size, count in enumerate(counts) if count)
        found.append(tuple(sizes.tolist()))
    assert len(set(found)) > 10


# ---- the check of the first batches ----------------------------------------------------------


class Mixing(nn.Module):
    """Hidden states without their mean over the batch, as batch normalisation would do."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)
        self.mixes = True

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.before(inputs)
        return self.after(hidden - hidden.mean(0) if self.mixes else hidden - hidden.mean(1, True))


class TimeMajor(nn.Module):
    """Time before the batch, as many steps as there are examples or a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.transpose(0, 1)).transpose(0, 1)


@pytest.fixture
def add(make_plan):
    """Gives an engine the losses of one batch after the other; returns the last clipped sum."""

    def run(model, batches, *, engine="book_keeping", losses=losses_of, **options) -> Tensor:
        with ENGINES[engine](model, make_plan(), **options) as made:
            for batch in batches:
                into = {p: torch.zeros_like(p) for p in model.parameters()}
                batch = batch if isinstance(batch, tuple) else (batch,)
                clipped = made.clip(losses(model, *batch))
                if len(clipped.norms):
                    clipped.total.add_to(into, scale=1.0)
        return torch.cat([total.flatten() for total in into.values()])

    return run


@pytest.mark.parametrize("sizes", [[4], [1, 4], [0, 4], [1, 1, 4]], ids=str)
def test_examples_that_mix_are_noticed(add, sizes):
    """… as soon as there are two of them, though the first batch may have held only one."""
    inputs = torch.randn(4, 3)
    with pytest.raises(
        UnsupportedLayerError, match=r"Module before: .*for example \d.*that example alone"
    ):
        add(Mixing(), [inputs[:size] for size in sizes])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("sizes", [[4], [1, 4], [4, 2, 3, 4]], ids=str)
def test_time_may_come_first(add, sizes):
    """… whatever multiples of each other the numbers of steps and of examples are."""
    model, inputs = TimeMajor(), torch.randn(4, 4, 3)
    batches = [inputs[:size] for size in sizes]
    expected = add(model, batches, engine="per_example")
    torch.testing.assert_close(add(model, batches), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("chosen", [False, True], ids=["always", "by their values"])
def test_examples_that_change_places_keep_their_gradients(add, chosen):
    """Wherever they stand, though the norms of all of them agree."""

    class Reversing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            if not chosen:
                return self.layer(inputs.flip(0)).flip(0)
            order = inputs[:, 0].argsort()
            return self.layer(inputs[order])[order.argsort()]

    def losses(model, inputs):
        return torch.arange(1.0, len(inputs) + 1) * model(inputs).sum(1)

    model = Reversing()
    for size in (4, 2, 3, 4):
        batches = [torch.eye(4), torch.eye(4)[torch.randperm(4)[:size]]]
        expected = add(model, batches, engine="per_example", losses=losses)
        torch.testing.assert_close(add(model, batches, losses=losses), expected)


def test_wrong_norms_are_noticed_though_the_sums_are_right(add, monkeypatch):
    """The check covers what the coefficients are made of."""
    ones, zeros = torch.ones(4), torch.zeros(4)
    monkeypatch.setattr("dpnlu.engines.clipped.norms_of_all", lambda *_: SquaredNorms(ones, zeros))
    with pytest.raises(UnsupportedLayerError, match=r"norm .* of an example's gradient"):
        add(Feedforward(), [_vectors(4)])


def test_a_batch_level_loss_is_noticed(add):
    """In-batch negatives: each loss is a vector entry, and depends on all examples."""

    def contrastive(model, inputs):
        hidden = model(inputs)
        return F.cross_entropy(hidden @ hidden.mT, torch.arange(len(inputs)), reduction="none")

    with pytest.raises(UnsupportedLayerError, match="that example alone"):
        add(Feedforward(), [_vectors(4)], losses=contrastive)


def test_a_course_not_seen_before_is_checked_too(add):
    """Mixing that begins in the second batch, by another course of the forward pass."""

    class Later(Mixing):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(4, 4)
            self.calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            hidden = self.before(inputs)
            if self.calls > 1:
                hidden = self.extra(hidden - hidden.mean(0))
            return self.after(hidden)

    with pytest.raises(UnsupportedLayerError):
        add(Later(), [_vectors(4), _vectors(4)])


def test_however_many_courses_were_seen_a_new_one_is_checked(add):
    class Growing(Mixing):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            hidden = self.before(inputs)
            for _ in range(self.calls):
                hidden = hidden + self.after(hidden).sum(1, keepdim=True)
            return self.after(hidden - hidden.mean(0) if self.calls > 20 else hidden)

    with pytest.raises(UnsupportedLayerError):
        add(Growing(), [_vectors(4)] * 21)


def test_the_check_can_be_left_out(add):
    add(Mixing(), [_vectors(4)], verify=False)


def test_the_check_changes_nothing(add):
    model, inputs = Feedforward(), _vectors(4)
    torch.testing.assert_close(add(model, [inputs]), add(model, [inputs], verify=False))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("first", [(3, 3, 3, 3), (3,), ()], ids=str)
@pytest.mark.parametrize("lengths", [(1, 3, 3, 1), (3, 1), (1, 3, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("inside", [True, False], ids=["in the model", "beside it"])
def test_tokens_picked_out_of_the_batch_are_refused_or_kept_apart(add, first, lengths, inside):
    """Of an uneven number of tokens per example, nobody can say by position whose they are; that
    the first batch's texts were of one length proves nothing."""

    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
            mask = torch.arange(3) < lengths[:, None]
            tokens = self.head(self.body(inputs)[mask]).square().sum(1)
            return torch.zeros(len(inputs)).index_add(0, mask.nonzero()[:, 0], tokens)

    def losses(model, inputs, lengths):
        return model(inputs, lengths) if inside else model.forward(inputs, lengths)

    model = Picking()
    cuts = [cut for cut in (first, lengths) if cut]
    batches = [(torch.randn(len(cut), 3, 3), torch.tensor(cut)) for cut in cuts]
    expected = add(model, batches[-1:], engine="per_example", losses=losses)
    with suppress(UnsupportedLayerError):
        found = add(model, batches, losses=losses)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:No rule for")
@pytest.mark.parametrize("sizes", [[1], [4], [2], [1, 2], [4, 2]], ids=str)
def test_layers_stacked_in_front_of_the_batch_are_refused_or_right(add, sizes):
    """A learned mixture of two layers; with two examples, dimension 0 looks like the batch."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weights = nn.Linear(3, 3), nn.Parameter(torch.randn(2))

        def forward(self, inputs: Tensor) -> Tensor:
            layers = torch.stack([self.layer(inputs), inputs])
            return (self.weights.softmax(0)[:, None, None] * layers).sum(0)

    model, batches = Mixture(), [_vectors(size) for size in sizes]
    expected = add(model, batches, engine="per_example")
    with suppress(UnsupportedLayerError):
        torch.testing.assert_close(add(model, batches), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
def test_a_coincidence_of_sizes_after_the_first_batch_changes_nothing(add):
    """A parameter laid out along the positions, and then as many examples as positions."""

    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.row = nn.Linear(3, 3), nn.Parameter(torch.randn(1, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs) * self.row.expand(inputs.shape[1], -1)

    model, batches = Along(), [torch.randn(4, 5, 3), torch.randn(5, 5, 3)]
    expected = add(model, batches, engine="per_example")
    torch.testing.assert_close(add(model, batches), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
def test_a_forward_pass_without_a_step_leaves_nothing_behind(make_plan, add):
    """Somebody evaluates between two batches and forgets torch.no_grad()."""
    model, inputs = Encoder(), _texts(4)
    expected = add(model, [inputs], engine="per_example")
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    with ENGINES["book_keeping"](model, make_plan()) as made:
        model(_texts(3))
        made.expect(4)
        made.clip(losses_of(model, inputs)).total.add_to(into, scale=1.0)
    found = torch.cat([total.flatten() for total in into.values()])
    torch.testing.assert_close(found, expected)


# ---- low precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sums_of_a_half_precision_model_are_kept_in_full_precision(make_plan, kind):
    model, inputs = kind.make(), kind.inputs(4)
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    found = {}
    half = kind.make().bfloat16()
    half.load_state_dict(model.state_dict())
    for name, m, cast in (("full", model, torch.float32), ("half", half, torch.bfloat16)):
        into = {p: torch.zeros_like(p, dtype=torch.float32) for p in m.parameters()}
        values = inputs.to(cast) if inputs.is_floating_point() else inputs
        with ENGINES["book_keeping"](m, make_plan()) as made:
            made.clip(losses_of(m, values)).total.add_to(into, scale=1.0)
        found[name] = torch.cat([total.flatten() for total in into.values()])
    assert float((found["full"] - found["half"]).norm()) < 0.2 * float(found["full"].norm())


def autocast_losses(model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(inputs)
    return (outputs.float() + 1).square().flatten(1).sum(1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_precision_comes_close(clipped_sum, kind):
    model, inputs = kind.make(), kind.inputs(4)
    found = clipped_sum("book_keeping", model, autocast_losses, inputs)
    expected = clipped_sum("per_example", model, losses_of, inputs)
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_norms_and_sums_are_taken_in_full_precision_within_autocast_too(clipped_sum, kind):
    """Else an example would add more than the bound by the rounding of a product."""
    model, inputs = kind.make(), kind.inputs(4)
    outside = clipped_sum("book_keeping", model, autocast_losses, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = clipped_sum("book_keeping", model, autocast_losses, inputs)
        one = clipped_sum("book_keeping", model, autocast_losses, inputs[:1], max_grad_norm=1e-3)
    torch.testing.assert_close(within, outside)
    assert float(one.double().norm()) <= 1e-3 * (1 + 1e-5)


def losses_in_float16(model, inputs, factors):
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = model(inputs)
    return outputs.float().square().sum(1) * torch.tensor(factors)


@pytest.mark.parametrize(
    ("factors", "is_proof"),
    [((1.0, 1e-12, 1.0, 1.0), True), ((1e7, 1.0, 1.0, 1.0), False)],
    ids=["tiny for one", "overflowing for one"],
)
def test_a_comparison_that_overflows_proves_nothing(make_plan, factors, is_proof):
    """What was compared in float16 counts as shown if all of it was finite, and only then; what was
    not shown is asked of the next batch."""
    model = Feedforward()
    with ENGINES["book_keeping"](model, make_plan()) as made:
        for given, shown in ((factors, is_proof), ((1.0,) * 4, True)):
            outcome = made.clip(losses_in_float16(model, _vectors(4), given))
            assert bool(outcome.finite.all()) == shown
            assert made.checks.is_shown(made.signature) == shown
            assert (made.checks.layouts(made.signature, 4) is not None) == shown


# ---- no trace --------------------------------------------------------------------------------


@every_pair
def test_closing_an_engine_leaves_the_model_as_it_was(make_plan, kind, engine):
    model, inputs = kind.make(), kind.inputs(4)
    expected, keys = model(inputs), list(model.state_dict())
    into = {p: torch.zeros_like(p) for p in model.parameters()}
    with ENGINES[engine](model, make_plan()) as made:
        clipped = made.clip(losses_of(model, inputs), unit=OpenUnit())
        clipped.total.add_to(into, scale=1.0)
    assert torch.equal(model(inputs), expected) and list(model.state_dict()) == keys
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in model.modules():
        assert not any(getattr(module, name) for name in hooks)
    for parameter in model.parameters():
        assert parameter.grad is None and not vars(parameter) and not parameter._backward_hooks


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("engine", PER_EXAMPLE)
def test_two_engines_work_side_by_side(clipped_sum, make_plan, engine):
    models = [Feedforward(), Feedforward()]
    inputs = [_vectors(4), _vectors(3)]
    expected = [clipped_sum(engine, m, losses_of, x) for m, x in zip(models, inputs, strict=True)]
    with ExitStack() as stack:
        made = [stack.enter_context(ENGINES[engine](m, make_plan())) for m in models]
        losses = [losses_of(m, x) for m, x in zip(models, inputs, strict=True)]
        for index in (1, 0):
            into = {p: torch.zeros_like(p) for p in models[index].parameters()}
            made[index].clip(losses[index]).total.add_to(into, scale=1.0)
            found = torch.cat([total.flatten() for total in into.values()])
            torch.testing.assert_close(found, expected[index])


def test_opacus_refuses_what_it_cannot_do(make_plan):
    with pytest.raises(
        UnsupportedLayerError, match=r"LSTM at recurrent: use engine='book_keeping'"
    ):
        Opacus(Tagger(), make_plan())
