"""Recurrent networks: the values are torch's, the gradients those of the loop."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpnlu.gradients.rules import OPERATIONS
from dpnlu.gradients.tape import Tape
from dpnlu.training.handle import privatize

pytestmark = pytest.mark.usefixtures("double")

STEPS, INPUTS, UNITS = 5, 3, 4


@dataclass(frozen=True)
class Network:
    """A recurrent network and how it is called.

    Attributes:
        pack: None: padded; otherwise the argument `enforce_sorted` of packing.
        state: where it starts from: "zeros", "learned" for all examples, or "given" for each.
    """

    kind: type[nn.RNNBase]
    options: dict = field(default_factory=dict, hash=False)
    pack: bool | None = None
    state: str = "zeros"

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        packed = {None: "", True: " packed", False: " packed unsorted"}[self.pack]
        return f"{self.kind.__name__}({options}){packed} {self.state}"


class Tagger(nn.Module):
    """Uses every output and every last state, each in another way."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.before = nn.Linear(INPUTS, INPUTS)
        self.network = network
        self.recurrent = network.kind(INPUTS, UNITS, **network.options)
        layers = self.recurrent.num_layers * (2 if self.recurrent.bidirectional else 1)
        sizes = [self.recurrent.proj_size or UNITS, UNITS]
        self.sizes = [(layers, size) for size in sizes[: 1 + (network.kind is nn.LSTM)]]
        if network.state == "learned":
            self.first = nn.ParameterList(torch.randn(n, 1, size) for n, size in self.sizes)

    def initial(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...] | None:
        batch = len(inputs)
        if self.network.state == "zeros":
            return None
        if self.network.state == "learned":
            states = tuple(state.expand(-1, batch, -1).contiguous() for state in self.first)
        else:
            start = inputs.sum((1, 2))[None, :, None]
            states = tuple(
                (start + torch.arange(n)[:, None, None] + torch.arange(size)).sin()
                for n, size in self.sizes
            )
        return states if len(states) == 2 else states[0]

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.before(inputs)
        first = self.initial(hidden)
        batch_first = self.recurrent.batch_first
        values = hidden if batch_first else hidden.transpose(0, 1)
        if self.network.pack is None:
            outputs, last = self.recurrent(values, first)
        else:
            packed = pack_padded_sequence(
                values, lengths, batch_first=batch_first, enforce_sorted=self.network.pack
            )
            outputs, last = self.recurrent(packed, first)
            outputs, _ = pad_packed_sequence(outputs, batch_first=batch_first, total_length=STEPS)
        outputs = outputs if batch_first else outputs.transpose(0, 1)
        states = last if isinstance(last, tuple) else (last,)
        found = [outputs, *(2 * state.transpose(0, 1).tanh() for state in states)]
        places = [(1 + torch.arange(x.shape[1:].numel())).view(x.shape[1:]).sqrt() for x in found]
        return sum((x * place).sin().sum((1, 2)) for x, place in zip(found, places, strict=True))


LSTM, GRU, RNN = nn.LSTM, nn.GRU, nn.RNN
FIRST = {"batch_first": True}
DEEP = {"num_layers": 2, "bidirectional": True, **FIRST}
RELU = {"nonlinearity": "relu"}
NETWORKS = [
    *(
        Network(kind, options, pack)
        for kind in (LSTM, GRU, RNN)
        for options in ({}, FIRST, DEEP, {"bias": False, **FIRST})
        for pack in (None, False)
    ),
    *(Network(kind, FIRST, True) for kind in (LSTM, GRU, RNN)),
    *(Network(kind, {"dropout": 0.5, **DEEP}) for kind in (LSTM, GRU, RNN)),
    *(
        Network(kind, DEEP, pack, state)
        for kind in (LSTM, GRU, RNN)
        for pack in (None, False)
        for state in ("learned", "given")
    ),
    Network(LSTM, DEEP, True, "given"),
    Network(LSTM, {"proj_size": 2, **FIRST}),
    Network(LSTM, {"proj_size": 2, **DEEP}, False, "given"),
    Network(LSTM, {"proj_size": 2, "bias": False, **FIRST}),
    Network(RNN, {**RELU, **FIRST}),
    Network(RNN, {**RELU, **DEEP}, False),
]
# Lengths of the examples of a batch; those that are to be packed sorted are.
BATCHES = [(3, 5, 1, 5), (2,), (4, 1, 1, 1, 5), ()]
DETERMINISTIC = [network for network in NETWORKS if "dropout" not in network.options]


def every_pair(networks: list[Network]) -> pytest.MarkDecorator:
    """Networks and lengths; an empty batch cannot be packed."""
    pairs = [(n, lengths) for n in networks for lengths in BATCHES if lengths or n.pack is None]
    return pytest.mark.parametrize(("network", "lengths"), pairs, ids=str)


def _batch(network: Network, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    ordered = sorted(lengths, reverse=True) if network.pack else list(lengths)
    return torch.randn(len(lengths), STEPS, INPUTS), torch.tensor(ordered, dtype=torch.long)


@every_pair(NETWORKS)
def test_each_example_has_its_own_gradient(assert_taped_exactly, network, lengths):
    model, batch = Tagger(network), _batch(network, lengths)
    drops = bool(network.options.get("dropout"))
    assert_taped_exactly(model, lambda model: model(*batch), same_pass=drops)


@pytest.mark.parametrize("network", [n for n in DETERMINISTIC if n.pack is None], ids=str)
def test_plain_differentiation_of_a_taped_pass_is_right(per_example_gradients, network):
    """It is what other engines, and the check of the first batches, rely on."""
    model, batch = Tagger(network), _batch(network, (5, 5, 5))
    parameters = list(model.parameters())
    expected = per_example_gradients(model(*batch), parameters)
    tape = Tape(model, OPERATIONS)
    found = per_example_gradients(model(*batch), parameters)
    tape.close()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@every_pair(DETERMINISTIC)
def test_the_values_are_torchs_own(network, lengths):
    model, batch = Tagger(network), _batch(network, lengths)
    expected = model(*batch)
    tape = Tape(model, OPERATIONS)
    found = model(*batch)
    tape.close()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(*batch), expected, rtol=0, atol=0)


def test_the_operation_on_packed_rows_outside_of_modules(per_example_gradients, taped_gradients):
    """A loss function may call it, with the network's weights; no module says how it packed."""
    network, inputs = nn.LSTM(INPUTS, UNITS), torch.randn(4, STEPS, INPUTS)
    weights = list(network.parameters())

    def losses() -> Tensor:
        packed = pack_padded_sequence(inputs, torch.tensor([5, 4, 2, 2]), batch_first=True)
        before = inputs.new_ones(1, 4, UNITS), inputs.new_ones(1, 4, UNITS)
        options = (True, 1, 0.0, True, False)
        states = torch.lstm(packed.data, packed.batch_sizes, before, weights, *options)[1]
        return states[0].sin().sum(1)

    expected = per_example_gradients(losses(), weights)
    tape = Tape(network, OPERATIONS)
    with tape.recording(inputs):
        outputs = losses()
    found = taped_gradients(tape, outputs)
    tape.close()
    for weight, rows in zip(weights, expected, strict=True):
        (use,) = found[weight]
        torch.testing.assert_close(use.dense().view_as(rows), rows)


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_dropout_between_layers_drops_and_scales(kind):
    """Only there: were all of it dropped, the second layer would see nothing, as in torch. And
    nothing is dropped in evaluation."""
    model = Tagger(Network(kind, {"dropout": 0.5, **DEEP}))
    batch = _batch(model.network, (5, 5, 5))
    tape = Tape(model, OPERATIONS)
    assert not torch.allclose(model(*batch), model(*batch))
    tape.close()
    for training, dropout in ((True, 1.0), (False, 0.5)):
        model.train(training).recurrent.dropout = dropout
        expected = model(*batch)
        tape = Tape(model, OPERATIONS)
        torch.testing.assert_close(model(*batch), expected)
        tape.close()


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_what_is_dropped_is_doubled_elsewhere(kind):
    """The mean over many passes is that without dropout, if the second layer is linear in effect:
    here, its weights are tiny."""
    network = kind(INPUTS, UNITS, num_layers=2, dropout=0.5, batch_first=True)
    for name, parameter in network.named_parameters():
        if "l1" in name:
            parameter.data.mul_(1e-4)
    inputs = torch.randn(1, STEPS, INPUTS).expand(20_000, -1, -1)
    expected = network.eval()(inputs[:1])[0][0].detach()
    tape = Tape(network, OPERATIONS)
    found = network.train()(inputs)[0].detach()
    tape.close()
    error = (found.mean(0) - expected).abs() / (found.std(0) / 20_000**0.5)
    assert float(error.max()) < 5


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
@pytest.mark.parametrize(
    "trained", ["", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "l1_reverse"]
)
@pytest.mark.parametrize("raw", [False, True], ids=["inside a model", "on raw input"])
def test_a_part_may_be_frozen(assert_taped_exactly, kind, trained, raw):
    model = Tagger(Network(kind, DEEP))
    batch = _batch(model.network, (5, 5, 5))
    for name, parameter in model.recurrent.named_parameters():
        parameter.requires_grad_(trained in name)
    model.before.requires_grad_(not raw)
    assert_taped_exactly(model, lambda model: model(*batch))


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_a_frozen_network_passes_gradients_on(assert_taped_exactly, kind):
    model = Tagger(Network(kind, DEEP, state="learned"))
    model.recurrent.requires_grad_(False)
    batch = _batch(model.network, (5, 5, 5))
    assert_taped_exactly(model, lambda model: model(*batch))


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_one_network_used_twice(assert_taped_exactly, kind):
    """As for the two sentences of a pair: norms are taken of the sum of the uses."""
    model = Tagger(Network(kind, FIRST))
    one, other = _batch(model.network, (5, 5, 5)), _batch(model.network, (5, 5, 5))
    assert_taped_exactly(model, lambda model: model(*one) * model(*other))


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN])
def test_outputs_that_do_not_matter(assert_taped_exactly, kind):
    """A loss on the last hidden state alone, or on the first output alone."""
    model = Tagger(Network(kind, DEEP))
    inputs = torch.randn(3, STEPS, INPUTS)

    def last(model):
        state = model.recurrent(model.before(inputs))[1]
        return (state[0] if kind is LSTM else state)[0].sin().sum(1)

    assert_taped_exactly(model, last)
    assert_taped_exactly(
        model, lambda model: model.recurrent(model.before(inputs))[0][:, 0].sin().sum(1)
    )


def test_cell_states_that_alone_matter(assert_taped_exactly):
    model = Tagger(Network(LSTM, DEEP))
    inputs = torch.randn(3, STEPS, INPUTS)
    assert_taped_exactly(
        model, lambda model: model.recurrent(model.before(inputs))[1][1].sin().sum((0, 2))
    )


def test_a_large_network_in_single_precision(per_example_gradients, taped_gradients):
    """Where the fast product is used, rounding is that of float32."""
    torch.set_default_dtype(torch.float32)
    model = nn.LSTM(40, 64, batch_first=True, bidirectional=True)
    inputs = torch.randn(8, 12, 40)
    expected_values = model(inputs)[0]
    tape = Tape(model, OPERATIONS)
    outputs = model(inputs)[0]
    losses = outputs.square().sum((1, 2))
    torch.testing.assert_close(outputs, expected_values, rtol=1e-4, atol=1e-5)
    expected = per_example_gradients(losses, list(model.parameters()))
    found = taped_gradients(tape, losses)
    tape.close()
    for parameter, rows in zip(model.parameters(), expected, strict=True):
        dense = sum(use.dense() for use in found[parameter])
        torch.testing.assert_close(dense, rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_inputs_are_computed_with_in_the_weights_precision(
    per_example_gradients, taped_gradients, bidirectional
):
    torch.set_default_dtype(torch.float32)
    network = nn.LSTM(4, 6, batch_first=True, bidirectional=bidirectional)
    model = nn.Sequential(nn.Linear(5, 4), network)
    inputs = torch.randn(3, 7, 5)
    plain = model[1](model[0](inputs))[0]
    expected = per_example_gradients(plain.square().sum((1, 2)), list(model.parameters()))
    tape = Tape(model, OPERATIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(inputs)[0]
        assert outputs.dtype == torch.bfloat16
        found = taped_gradients(tape, outputs.float().square().sum((1, 2)))
    tape.close()
    for parameter, rows in zip(model.parameters(), expected, strict=True):
        dense = sum(use.dense() for use in found[parameter])
        assert float((dense - rows).norm()) < 0.03 * float(rows.norm())


def _assigned(weight: Tensor) -> None:
    weight.data = 0.5 * weight.data


def _written(weight: Tensor) -> None:
    weight.data.mul_(0.5)  # leaves no version behind


@pytest.mark.parametrize("change", [_assigned, _written])
def test_weights_that_change_within_a_logical_batch_are_not_used_as_they_were(make_plan, change):
    """As when averaged weights are put in for an evaluation, and taken out again."""
    sums = {}
    for engine in ("book_keeping", "per_example"):
        torch.manual_seed(0)
        model = nn.LSTM(4, 3, batch_first=True).double()
        plan = make_plan(noise_multiplier=0.0, num_examples=6, sample_rate=1.0, max_grad_norm=0.01)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = list(torch.randn(6, 5, 4).double())
        with privatize(model, optimizer, plan, engine=engine) as private:
            step = private.stepper(lambda batch, model=model: model(batch)[0].square().sum((1, 2)))
            for batch in private.loader(data, physical_batch_size=2):
                if step(batch):
                    break
                change(model.weight_hh_l0)
            sums[engine] = list(private.gradients.values())
    for found, expected in zip(*sums.values(), strict=True):
        torch.testing.assert_close(found, expected)
