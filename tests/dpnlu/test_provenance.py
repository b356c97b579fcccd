"""What comes from the batch and what does not, by descent: sizes that agree mean nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.provenance import Provenance
from dpnlu.training.handle import privatize

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:No rule for"),
]
WORDS, WIDTH, POSITIONS, LABELS = 12, 4, 6, 6
# Of 12 texts: numbers of examples that are, divide or are multiples of all sizes of the models.
SIZES = (1, 2, 3, 4, 6, 12)


@pytest.fixture
def released(make_plan) -> Callable:
    """The last sum that a training without noise releases, flat; the same by the loop."""

    def run(make, losses_of, data, *, way="stepper", engine=None, size=None, steps=2) -> Tensor:
        torch.manual_seed(0)
        model = make()
        fields = {"noise_multiplier": 0.0, "sample_rate": 1.0, "steps": steps}
        plan = make_plan(num_examples=len(data), **fields)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with privatize(model, optimizer, plan, engine=engine) as private:

            def losses(batch: Tensor) -> Tensor:
                return losses_of(model, batch)

            step = private.stepper(losses)
            if way == "step":
                step = lambda batch: private.step(losses(batch))  # noqa: E731
            for batch in private.loader(data, physical_batch_size=size):
                step(batch)
            return torch.cat([gradient.flatten() for gradient in private.gradients.values()])

    return run


@pytest.fixture
def texts() -> list[Tensor]:
    return list(torch.randint(WORDS, (12, POSITIONS)))


def _summed(logits: Tensor) -> Tensor:
    return (logits + 0.5).sin().flatten(1).sum(1)


# ---- constants that have as many rows as there may be examples -------------------------------


class Prompted(nn.Module):
    """A prompt of virtual tokens, kept as a plain attribute, as adapters keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.prompt = nn.Embedding(WORDS, WIDTH), nn.Embedding(4, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.tokens = torch.arange(4)

    def forward(self, ids: Tensor) -> Tensor:
        prompt = self.prompt(self.tokens[None].expand(len(ids), -1))
        return self.head(torch.cat([prompt, self.words(ids)], 1).tanh())


class PromptMade(Prompted):
    """… and made by a layer, from all tokens at once."""

    def forward(self, ids: Tensor) -> Tensor:
        made = self.head.weight @ self.prompt(self.tokens).tanh().mT
        prompt = (made.mT @ self.head.weight)[None].repeat(len(ids), 1, 1)
        return self.head(torch.cat([prompt, self.words(ids)], 1).tanh())


class Positioned(nn.Module):
    """Position ids and a mask of the weights, kept as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.where = torch.arange(POSITIONS)
        self.mask = (torch.rand(3, WIDTH) > 0.3).double()

    def forward(self, ids: Tensor) -> Tensor:
        states = self.words(ids) + self.positions(self.where[: ids.shape[1]])
        return F.linear(states.tanh(), self.head.weight * self.mask, self.head.bias)


class Labelled(nn.Module):
    """Texts are compared with the names of the labels, which the model holds as ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.names = [torch.randint(WORDS, (LABELS, 2))]

    def encoded(self, ids: Tensor) -> Tensor:
        return self.body(self.words(ids)).tanh().mean(1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoded(ids) @ self.encoded(self.names[0]).mT


class Cached(nn.Module):
    """Makes its positions once, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.where: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.where is None:
            self.where = torch.arange(ids.shape[1])
        return (self.words(ids) * self.positions(self.where)).tanh()


class Shaped(nn.Module):
    """Tensors that take nothing of the batch but its shape, and come to hold some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.start = nn.Parameter(torch.randn(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        states = self.words(ids)
        shifted = states.new_zeros(states.shape)
        shifted[:, 1:] = self.layer(states[:, :-1])
        shifted[:, 0] = self.start
        empty = torch.zeros_like(ids)
        return (shifted + self.words(empty)).tanh()


def in_model(model: nn.Module, ids: Tensor) -> Tensor:
    return _summed(model(ids))


def _beside(model: Labelled, ids: Tensor) -> Tensor:
    """The labels' names are known to the loss alone."""
    names = torch.arange(LABELS)[:, None].expand(LABELS, 2)
    return _summed(model.encoded(ids) @ model.encoded(names).mT)


CONSTANTS = {
    "a prompt": (Prompted, in_model, ("stepper", "step")),
    "a prompt that is made": (PromptMade, in_model, ("stepper", "step")),
    "positions and masks": (Positioned, in_model, ("stepper", "step")),
    "names of labels": (Labelled, in_model, ("stepper", "step")),
    "names of labels in the loss": (Labelled, _beside, ("stepper",)),
    "positions that are kept": (Cached, in_model, ("stepper", "step")),
    "shapes of the batch": (Shaped, in_model, ("stepper", "step")),
}
PAIRS = [(name, way) for name, (_, _, ways) in CONSTANTS.items() for way in ways]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "way"), PAIRS, ids=str)
def test_constants_with_as_many_rows_as_there_are_examples(released, texts, name, way, size):
    make, losses, _ = CONSTANTS[name]
    expected = released(make, losses, texts, engine="per_example", size=size)
    found = released(make, losses, texts, way=way, size=size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_computed_without_gradients_is_of_the_batch_too(released, texts, size):
    """Positions counted from a mask, as for padded texts."""

    class Counted(Positioned):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                where = ((ids > 2).cumsum(1) - 1).clamp(min=0)
            return self.head((self.words(ids) + self.positions(where)).tanh())

    expected = released(Counted, in_model, texts, engine="per_example", size=size)
    for way in ("stepper", "step"):
        found = released(Counted, in_model, texts, way=way, size=size)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_batches_in_containers_of_any_kind(released, texts):
    class Held:
        def __init__(self, ids: Tensor) -> None:
            self.ids = {"words": [ids]}

    class Reading(Positioned):
        def forward(self, held) -> Tensor:
            return super().forward(held.ids["words"][0])

    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        return _summed(model(Held(ids)))

    expected = released(Positioned, in_model, texts, engine="per_example")
    for way in ("stepper", "step"):
        found = released(Reading, losses, texts, way=way)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# ---- what an earlier batch left --------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("queue", torch.zeros(24, WIDTH))
        self.kept: list[Tensor] = []

    def states(self, ids: Tensor) -> Tensor:
        return self.words(ids).mean(1)


def _running_mean(model: Words, states: Tensor) -> Tensor:
    with torch.no_grad():
        model.mean.mul_(0.9).add_(0.1 * states.mean(0))
    return states - model.mean


def _running_mean_replaced(model: Words, states: Tensor) -> Tensor:
    model.mean = 0.9 * model.mean + 0.1 * states.detach().mean(0)
    return states - model.mean


def _running_mean_out(model: Words, states: Tensor) -> Tensor:
    torch.mean(states.detach(), 0, out=model.mean)
    return states - model.mean


def _ring_buffer(model: Words, states: Tensor) -> Tensor:
    similar = states @ model.queue.clone().mT
    model.queue[: len(states)] = states.detach()
    return similar


def _ring_buffer_by_copy(model: Words, states: Tensor) -> Tensor:
    model.queue[: len(states)].copy_(states.detach())
    return states


def _list_of_states(model: Words, states: Tensor) -> Tensor:
    model.kept.append(states.detach())
    return states + model.kept[0].mean(0)


def _state_with_its_graph(model: Words, states: Tensor) -> Tensor:
    model.kept.append(states)
    return states + model.kept[0].mean(0).detach()


def _ids_of_before(model: Words, states: Tensor) -> Tensor:
    model.kept.append((states > 0).long().sum(1) % WORDS)
    return states + model.words(model.kept[0]).mean(0)


LEFT = {
    "a running mean": _running_mean,
    "a running mean that is replaced": _running_mean_replaced,
    "a running mean, out=": _running_mean_out,
    "a ring buffer": _ring_buffer,
    "a ring buffer, by copies": _ring_buffer_by_copy,
    "a list": _list_of_states,
    "a list with graphs": _state_with_its_graph,
    "ids": _ids_of_before,
}


@pytest.mark.parametrize("way", ["stepper", "step"])
@pytest.mark.parametrize("name", LEFT)
def test_what_carries_one_batch_into_the_next_is_refused(released, texts, name, way):
    """It would carry one example into the loss of another, or out of the model unclipped."""

    class Carrying(Words):
        def forward(self, ids: Tensor) -> Tensor:
            return LEFT[name](self, self.states(ids))

    match = (
        r"takes up values of the batch|computed from an earlier batch|examples mix|used elsewhere"
    )
    with pytest.raises(UnsupportedLayerError, match=match):
        released(Carrying, in_model, texts, way=way, steps=3)


def test_a_buffer_that_is_a_view_of_what_is_written_is_refused(released, texts):
    class Carrying(Words):
        def __init__(self) -> None:
            super().__init__()
            self.kept.append(torch.zeros(30, WIDTH))
            self.register_buffer("part", self.kept[0][:24])

        def forward(self, ids: Tensor) -> Tensor:
            states = self.states(ids)
            self.kept[0][: len(ids)] = states.detach()
            return states - self.part.mean(0)

    with pytest.raises(UnsupportedLayerError, match="part takes up values of the batch"):
        released(Carrying, in_model, texts, steps=1)


def test_buffers_that_change_by_themselves_are_none_of_it(released, texts):
    """A schedule, a power iteration: they do not see the batch."""

    class Scheduled(Words):
        def forward(self, ids: Tensor) -> Tensor:
            self.mean += 0.1
            self.queue.normal_()
            return self.head(self.states(ids) * self.mean)

    expected = released(Scheduled, in_model, texts, engine="per_example")
    torch.testing.assert_close(released(Scheduled, in_model, texts), expected)


def test_the_same_tensors_may_be_handed_over_again(make_plan):
    """Whole batches, without a loader: they are what is trained on, and not left behind."""
    model = Words()
    model.forward = lambda ids: model.head(model.states(ids))
    ids = torch.randint(WORDS, (8, POSITIONS))
    with privatize(model, torch.optim.SGD(model.parameters(), lr=0.1), make_plan()) as private:
        step = private.stepper(lambda batch: in_model(model, batch))
        with pytest.warns(UserWarning, match="outside private.loader"):
            step(ids)
        for _ in range(3):
            step(ids)
            private.step(in_model(model, ids))


def test_weights_that_are_exchanged_through_data_are_noticed(released):
    """An average of the weights is put in for evaluation, and taken out again."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.LSTM(3, 4, batch_first=True, bidirectional=True)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.recurrent(inputs)[0]

    def losses(model: Recurrent, inputs: Tensor) -> Tensor:
        weights = [parameter.data for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data = 0.5 * parameter.data
        model(inputs)
        for parameter, values in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(values)  # in place, past the count of versions
        return _summed(model(inputs))

    data = list(torch.randn(6, 5, 3))
    expected = released(Recurrent, losses, data, engine="per_example", steps=1)
    for way in ("stepper", "step"):
        found = released(Recurrent, losses, data, way=way, steps=1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_a_tensor_in_the_place_of_one_that_is_gone_is_another():
    """Python gives new objects the ids of old ones."""
    provenance = Provenance(nn.Linear(2, 2))
    for _ in range(100):
        batched = torch.ones(2, requires_grad=True) * 2
        provenance.derive(torch.mul, (), batched, batched=True)
        assert provenance.is_batched(batched)
        key = id(batched)
        del batched
        new = torch.ones(2, requires_grad=True)
        assert provenance.is_batch_independent(new) or not provenance.is_batched(new)
        if id(new) == key:
            return
    pytest.skip("no id came again")
