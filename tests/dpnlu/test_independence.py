"""What crosses examples without a gradient path is found by exchanging half of the batch; what does
not cross is never accused of it."""

import math
import random
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpnlu.engines.batches import Places, by_example, exchanged, leaves_of
from dpnlu.engines.moment import Moments
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.training.handle import privatize

SIZE, WIDTH, CLASSES = 12, 5, 3
PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.float32, True),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


class Net(nn.Module):
    """Rows of WIDTH numbers and a class -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)

    def hidden(self, rows: Tensor) -> Tensor:
        return torch.tanh(self.body(rows[:, :WIDTH]))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.hidden(rows))


def _classes(rows: Tensor) -> Tensor:
    return rows[:, WIDTH].long()


def plain(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows).to(rows.dtype), _classes(rows), reduction="none")


def _rows(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    labels = torch.randint(CLASSES, (SIZE, 1))
    return list(torch.cat([torch.randn(SIZE, WIDTH), labels], 1).to(dtype))


@pytest.fixture
def train(make_plan, monkeypatch) -> Callable[..., None]:
    # What is exchanged is drawn alike in every run of these tests.
    monkeypatch.setattr(random, "SystemRandom", lambda: random.Random(0))
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)

    def run(
        model,
        losses,
        data,
        *,
        way="stepper",
        engine=None,
        autocast=False,
        collate=None,
        steps=4,
        **k,
    ) -> int:
        def losses_of(batch):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return losses(model, batch)

        plan = make_plan(num_examples=len(data), steps=steps, **{"sample_rate": 1.0} | k)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with privatize(model, optimizer, plan, engine=engine) as private:
            step = {
                "stepper": lambda: private.stepper(losses_of),
                "step": lambda: lambda batch: private.step(losses_of(batch)),
                "compiled": lambda: private.compile(losses_of),
            }[way]()
            try:
                for batch in private.loader(data, collate_fn=collate):
                    step(batch)
            except UnsupportedLayerError:
                assert len(private.ledger) == 0, "nothing may have been released"
                raise
            return len(private.ledger)

    return run


# ---- what crosses ----------------------------------------------------------------------------


class Standardised(Net):
    """The inputs, by statistics of the batch: behind it no gradient goes."""

    def forward(self, rows: Tensor) -> Tensor:
        numbers = rows[:, :WIDTH]
        # Of one row alone, which a microbatch may be, there is a deviation too.
        scaled = (numbers - numbers.mean(0)) / (1 + numbers.std(0, correction=0))
        return super().forward(torch.cat([scaled, rows[:, WIDTH:]], 1))


class Limited(Net):
    """Routing with room for half of the batch: whoever comes later is left out."""

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.hidden(rows)
        wanted = rows[:, 0] > 0
        has_room = wanted & (wanted.cumsum(0) <= len(rows) // 4)
        return self.head(hidden * has_room[:, None])


def _centred(model: Net, rows: Tensor) -> Tensor:
    logits = model(rows)
    logits = logits - 0.01 * logits.mean(0).detach()
    return F.cross_entropy(logits.to(rows.dtype), _classes(rows), reduction="none")


def _against_keys(model: Net, rows: Tensor) -> Tensor:
    """In-batch negatives whose gradients are stopped."""
    logits = model(rows)
    pairs = F.cross_entropy(logits @ logits.detach().mT, torch.arange(len(rows)), reduction="none")
    return plain(model, rows) + 0.1 * pairs


def _by_tokens(model: Net, rows: Tensor) -> Tensor:
    return plain(model, rows) / (rows[:, :WIDTH] > 0).sum()


def _by_classes(model: Net, rows: Tensor) -> Tensor:
    counts = torch.bincount(_classes(rows), minlength=CLASSES)
    return plain(model, rows) / counts[_classes(rows)]


def _mined(model: Net, rows: Tensor) -> Tensor:
    losses = plain(model, rows)
    return losses * (losses >= losses.detach().median())


class Backward(torch.autograd.Function):
    """Divides gradients by what the batch holds; losses stay what they are."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        ctx.size = values.abs().mean()
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient / ctx.size


def _rescaled_backward(model: Net, rows: Tensor) -> Tensor:
    logits = model.head(Backward.apply(model.hidden(rows)))
    return F.cross_entropy(logits.to(rows.dtype), _classes(rows), reduction="none")


@dataclass(frozen=True)
class Crossing:
    """`inside`: in the model, where `private.step` sees it too."""

    losses: Callable
    model: Callable[[], nn.Module] = Net
    inside: bool = False
    traced: bool = True


CROSSING = {
    "statistics of the inputs": Crossing(plain, Standardised, inside=True),
    "routing with limited room": Crossing(plain, Limited, inside=True),
    "a detached mean of the batch": Crossing(_centred),
    "detached keys": Crossing(_against_keys),
    "division by the batch's tokens": Crossing(_by_tokens),
    "class frequencies": Crossing(_by_classes, traced=False),
    "mining of hard examples": Crossing(_mined),
    "gradients divided by what the batch holds": Crossing(_rescaled_backward, traced=False),
}
WAYS = [
    (name, way)
    for name, case in CROSSING.items()
    for way in ("stepper", "step", "compiled")
    if way == "stepper" or (way == "step" and case.inside) or (way == "compiled" and case.traced)
]


@every_precision
@pytest.mark.parametrize(("name", "way"), WAYS, ids=str)
def test_what_crosses_examples_without_a_gradient_is_refused(train, name, way, precision):
    dtype, autocast = precision
    case = CROSSING[name]
    with pytest.raises(UnsupportedLayerError, match=r"that example alone.*are exchanged"):
        train(case.model().to(dtype), case.losses, _rows(dtype), way=way, autocast=autocast)


@pytest.mark.parametrize("name", [n for n in CROSSING if not n.startswith("gradients")])
def test_so_it_is_by_the_engine_that_loops_over_examples(train, name):
    """It computes each gradient by itself, but of losses in which others have a part."""
    case = CROSSING[name]
    with pytest.raises(UnsupportedLayerError, match="are exchanged"):
        train(case.model(), case.losses, _rows(), engine="per_example")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch, of Opacus' hooks
def test_so_it_is_by_opacus_whose_count_of_forward_passes_is_left_as_it_is(train):
    assert train(Net(), plain, _rows(), engine="opacus") == 4
    with pytest.raises(UnsupportedLayerError, match="are exchanged"):
        train(Standardised(), plain, _rows(), engine="opacus")


def test_within_a_microbatch_examples_may_mix(train):
    """It is clipped as a whole."""
    fields = {"clipping_unit": "microbatch", "microbatches": 2}
    assert train(Standardised(), plain, _rows(), **fields) == 4


def test_the_module_in_which_it_begins_is_named(train):
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), Centring()
            self.last = nn.Linear(WIDTH, CLASSES)

        def forward(self, rows: Tensor) -> Tensor:
            return self.last(self.second(self.first(rows[:, :WIDTH])))

    class Centring(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden - hidden.detach().mean(0)

    with pytest.raises(UnsupportedLayerError, match="first in module second:"):
        train(Deep(), plain, _rows())


def test_one_example_that_is_not_finite_hides_nothing(train):
    def losses(model: Net, rows: Tensor) -> Tensor:
        spoilt = torch.where(torch.arange(len(rows)) == 0, math.nan, 1.0)
        return _by_tokens(model, rows) * spoilt

    with pytest.raises(UnsupportedLayerError, match="are exchanged"):
        train(Net(), losses, _rows())


# ---- what does not ---------------------------------------------------------------------------


class Dropped(Net):
    def hidden(self, rows: Tensor) -> Tensor:
        return F.dropout(super().hidden(rows), 0.3, self.training)


def _with_noise_of_all_kinds(model: Net, rows: Tensor) -> Tensor:
    """Random numbers of torch, of Python and of NumPy."""
    numpy = np.random.rand()  # noqa: NPY002
    return plain(model, rows) * (1 + random.random() + numpy) + torch.rand(len(rows))


class Counting(Net):
    """Keeps count of its calls, in a buffer, and drops out by it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.hidden(rows) / (1 + self.calls))


INDEPENDENT = {
    "plain": (Net, plain),
    "dropout": (Dropped, plain),
    "random numbers of all kinds": (Net, _with_noise_of_all_kinds),
    "a buffer that counts calls": (Counting, plain),
}


@every_precision
@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_keeps_examples_apart_is_never_accused(train, name, precision):
    dtype, autocast = precision
    make, losses = INDEPENDENT[name]
    options = {"sample_rate": 0.4, "steps": 25, "autocast": autocast}
    assert train(make().to(dtype), losses, _rows(dtype), **options) == 25


def test_what_the_check_runs_again_leaves_buffers_alone(train):
    model = Counting()
    train(model, plain, _rows(), steps=5)
    assert float(model.calls) == 5


def test_a_model_that_is_not_repeatable_cannot_be_checked_and_says_so(train):
    """Its losses depend on how often it was called, in a way that nobody can put back."""

    class Drifting(Net):
        calls = 0

        def forward(self, rows: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(rows) * self.calls

    with pytest.warns(UserWarning, match="could not be checked"):
        train(Drifting(), plain, _rows(), steps=1)


# ---- batches of all kinds --------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    labels: Tensor


class Plain:
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels, self.name = inputs, labels, "batch"


def _stacked(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    joined = torch.stack(rows)
    return joined[:, :WIDTH], joined[:, WIDTH].long()


KINDS = {
    "dictionary": lambda x, y: {"inputs": x, "labels": y, "name": "batch"},
    "mapping": lambda x, y: UserDict(inputs=x, labels=y),
    "dataclass": Batch,
    "object": Plain,
    "nested": lambda x, y: [{"inputs": (x,)}, [None, (y, 3)]],
    "time first": lambda x, y: {"inputs": x.mT.contiguous(), "labels": y},
}


def _read(batch) -> tuple[Tensor, Tensor]:
    leaves = leaves_of(batch)
    return leaves[0], leaves[1]


def _of_kind(name: str, crossing: bool) -> Callable:
    def losses(model: nn.Module, batch) -> Tensor:
        inputs, labels = _read(batch)
        inputs = inputs.mT if name == "time first" else inputs
        logits = model(inputs - inputs.mean(0) if crossing else inputs)
        return F.cross_entropy(logits, labels, reduction="none")

    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_are_exchanged(train, kind):
    """… as many examples as numbers among them."""

    def collate(rows: list[Tensor]):
        return KINDS[kind](*_stacked(rows))

    options = {"collate": collate, "sample_rate": 0.4, "steps": 20}
    assert train(nn.Linear(WIDTH, CLASSES), _of_kind(kind, False), _rows(), **options) == 20
    with pytest.raises(UnsupportedLayerError, match="are exchanged"):
        train(nn.Linear(WIDTH, CLASSES), _of_kind(kind, True), _rows(), collate=collate)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, packed) -> Tensor:
        states, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)
        return self.head(states.sum(1))


@pytest.mark.parametrize("way", ["stepper", "step"])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_packed_sequences_are_exchanged_whole(train, way, is_sorted):
    texts = [torch.randn(length, 3) for length in [5, 4, 4, 3, 2, 1] * 2]

    def collate(some: list[Tensor]):
        some = sorted(some, key=len, reverse=True) if is_sorted else some
        lengths = torch.tensor([len(text) for text in some])
        padded = nn.utils.rnn.pad_sequence(some, batch_first=True)
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=is_sorted)

    def losses(model: nn.Module, packed) -> Tensor:
        return model(packed).square().sum(1)

    options = {"collate": collate, "way": way, "sample_rate": 0.7, "steps": 8}
    assert train(Recurrent(), losses, texts, **options) == 8


def test_an_exchange_puts_rows_where_it_says():
    batch = {"a": torch.arange(4), "b": (torch.arange(8).view(2, 4), "x"), "c": torch.zeros(3)}
    source = torch.tensor([0, 0, 2, 0])
    found = exchanged(batch, source, [0, 1, None])
    assert found["a"].tolist() == [0, 0, 2, 0]
    assert found["b"][0].tolist() == [[0, 0, 2, 0], [4, 4, 6, 4]] and found["b"][1] == "x"
    assert found["c"] is batch["c"] and batch["a"].tolist() == [0, 1, 2, 3]


def test_dimensions_that_held_the_examples_once_by_chance_are_told_apart():
    places = Places()
    places.learn([torch.zeros(4, 4), torch.zeros(4)], 4)
    assert list(places.ways()) == [(0, 0), (1, 0)]
    places.learn([torch.zeros(4, 3), torch.zeros(3)], 3)
    assert list(places.ways()) == [(1, 0)]


def test_a_weight_of_the_classes_is_no_row_of_the_batch(train):
    """It came with the batch, and once had as many entries as there were examples."""

    def collate(rows: list[Tensor]):
        return (*_stacked(rows), torch.tensor([1.0, 2.0, 3.0]))

    def losses(model: nn.Module, batch) -> Tensor:
        inputs, labels, weight = batch
        return F.cross_entropy(model(inputs), labels, weight=weight, reduction="none")

    rows = _rows()
    model = nn.Linear(WIDTH, CLASSES)
    with warnings.catch_warnings():
        assert train(model, losses, rows, collate=collate, sample_rate=0.25, steps=40) == 40


def test_random_numbers_are_repeated_and_then_go_on_as_before():
    torch.manual_seed(0)
    random.seed(0)
    moment = Moments(nn.Linear(1, 1)).now()
    first = (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: NPY002
    after = torch.get_rng_state()
    with moment.repeated():
        again = (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: NPY002
    assert first == again
    assert torch.equal(torch.get_rng_state(), after)


def test_what_is_said_of_each_example():
    outputs = {"logits": torch.zeros(4, 2), "states": torch.zeros(3, 4), "mean": torch.zeros(2)}
    assert [tuple(leaf.shape) for leaf in by_example(outputs, 4)] == [(4, 2), (4, 3)]
