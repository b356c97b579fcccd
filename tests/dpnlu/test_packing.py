"""Packed sequences: no rows are taken for those of another example, and only what is doubtful is
checked."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dpnlu.gradients.packing import Packing, PackRows, SpreadRows, UnpackRows
from dpnlu.gradients.rules import OPERATIONS
from dpnlu.gradients.signature import signature_of, walk
from dpnlu.gradients.tape import Tape

pytestmark = pytest.mark.usefixtures("double")

STEPS, WIDTH = 5, 4


class Model(nn.Module):
    """A layer before the network, a network, and another."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.one = kind(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.other = kind(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)

    def pack(self, inputs: Tensor, lengths: Tensor) -> PackedSequence:
        return pack_padded_sequence(
            self.before(inputs), lengths, batch_first=True, enforce_sorted=False
        )


def _padded(packed: PackedSequence) -> Tensor:
    """(B,) values that depend on every output."""
    outputs = pad_packed_sequence(packed, batch_first=True)[0]
    weights = torch.arange(1, outputs[0].numel() + 1).view(outputs.shape[1:]).sqrt()
    return (outputs.sin() * weights).sum((1, 2))


def _with_rows(packed: PackedSequence, rows: Tensor) -> PackedSequence:
    return PackedSequence(rows, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def _in_another_order(packed: PackedSequence) -> PackedSequence:
    order = packed.unsorted_indices.flip(0)
    return PackedSequence(packed.data, packed.batch_sizes, order.argsort(), order)


def _sorted_by_hand(model: Model, inputs: Tensor, lengths: Tensor) -> Tensor:
    ordered, order = lengths.sort(descending=True)
    rows = model.before(inputs).index_select(0, order)
    outputs = model.one(pack_padded_sequence(rows, ordered, batch_first=True))[0]
    return _padded(outputs)[order.argsort()]


def _called_by_hand(model: Model, packed: PackedSequence, lengths: Tensor) -> Tensor:
    """The operation behind the module does not say how the sequences were sorted."""
    network = model.one
    state = tuple(packed.data.new_zeros(2, len(lengths), WIDTH // 2) for _ in range(2))
    rows = torch.lstm(
        packed.data, packed.batch_sizes, state, network._flat_weights, True, 1, 0.0, True, True
    )[0]
    return _padded(_with_rows(packed, rows))


class Calls(nn.Module):
    """The model, called in one of the ways below."""

    def __init__(self, model: Model, call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        return self.call(self.model, inputs, lengths)


def _packed_raw(inputs: Tensor, lengths: Tensor) -> PackedSequence:
    """As from frozen embeddings."""
    return pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)


def _restored(model: Model, inputs: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Sorted where no gradient shows it, and put back into order behind the network."""
    ordered, order = lengths.sort(descending=True, stable=True)
    rows = model.before(inputs[order])
    place = order.argsort()
    packed, (states, _) = model.one(pack_padded_sequence(rows, ordered, batch_first=True))
    if how == "states":
        return states[:, place].sin().sum((0, 2))
    outputs = pad_packed_sequence(packed, batch_first=how == "batch first")[0].sin()
    if how == "batch first":
        return outputs.index_select(0, place).sum((1, 2))
    if how == "by index":
        return outputs[:, place].sum((0, 2))
    return outputs.index_select(1, place).sum((0, 2))


PLAIN = {
    "unpacked": lambda m, x, n: _padded(m.one(m.pack(x, n))[0]),
    "two in a row": lambda m, x, n: _padded(m.other(m.one(m.pack(x, n))[0])[0]),
    "one after the other": lambda m, x, n: (
        _padded(m.other(m.pack(x, n))[0]) + _padded(m.one(m.pack(x, n))[0])
    ),
    "side by side": lambda m, x, n: (
        (packed := m.pack(x, n)) and _padded(m.one(packed)[0]) + _padded(m.other(packed)[0])
    ),
    "input without gradient": lambda m, x, n: _padded(m.one(_packed_raw(x, n))[0]),
    "input without gradient, time first": lambda m, x, n: _padded(
        m.one(pack_padded_sequence(x.transpose(0, 1), n, enforce_sorted=False))[0]
    ),
    "last state": lambda m, x, n: m.one(m.pack(x, n))[1][0].sin().sum((0, 2)),
    "maximum over steps": lambda m, x, n: (
        pad_packed_sequence(
            m.one(m.pack(x, n))[0], batch_first=True, padding_value=-torch.inf, total_length=STEPS
        )[0]
        .amax(1)
        .sum(1)
    ),
    "time first": lambda m, x, n: pad_packed_sequence(m.one(m.pack(x, n))[0])[0].sin().sum((0, 2)),
    "sorted beforehand": lambda m, x, n: _padded(
        m.one(pack_padded_sequence(m.before(x), n.sort(descending=True)[0], batch_first=True))[0]
    ),
}
DOUBTFUL = {
    "dropout on the rows": lambda m, x, n: (
        (packed := m.pack(x, n)) and _padded(m.one(_with_rows(packed, 2 * packed.data))[0])
    ),
    "a layer on the rows that come out": lambda m, x, n: (
        (packed := m.one(m.pack(x, n))[0]) and _padded(_with_rows(packed, m.before(packed.data)))
    ),
    "rows that stay packed": lambda m, x, n: m.one(m.pack(x, n))[0].data.sum() * torch.ones(len(x)),
    "rows in another order": lambda m, x, n: _padded(m.one(_in_another_order(m.pack(x, n)))[0]),
    "outputs in another order": lambda m, x, n: _padded(_in_another_order(m.one(m.pack(x, n))[0])),
    "never unpacked": lambda m, x, n: _padded(m.pack(x, n)),
    "sorted by hand": _sorted_by_hand,
    "the operation called by hand": lambda m, x, n: _called_by_hand(m, m.pack(x, n), n),
    "sorted outside the graph, outputs restored": lambda m, x, n: _restored(m, x, n, "batch first"),
    "sorted outside the graph, time first": lambda m, x, n: _restored(m, x, n, "time first"),
    "sorted outside the graph, by index": lambda m, x, n: _restored(m, x, n, "by index"),
    "sorted outside the graph, states": lambda m, x, n: _restored(m, x, n, "states"),
    "states in another order": lambda m, x, n: (
        m.one(m.pack(x, n))[1][0][:, n.argsort()].sin().sum((0, 2))
    ),
    "outputs in an order of their own, time first": lambda m, x, n: (
        pad_packed_sequence(m.one(m.pack(x, n))[0])[0].index_select(1, n.argsort()).sum((0, 2))
    ),
    "input without gradient, in another order": lambda m, x, n: _padded(
        _in_another_order(m.one(_packed_raw(x, n))[0])
    ),
    "input without gradient, the operation called by hand": lambda m, x, n: _called_by_hand(
        m, _packed_raw(x, n), n
    ),
}
LENGTHS = [(2, 5, 1, 5), (5, 4, 3, 3), (1, 1, 2, 2)]


def _signature(call, lengths: tuple[int, ...]):
    model = Calls(Model(), call)
    tape = Tape(model, OPERATIONS)
    tape.expect(len(lengths))
    losses = model(torch.randn(len(lengths), STEPS, WIDTH), torch.tensor(lengths))
    found = signature_of(list(walk(losses)), len(losses))
    tape.close()
    return found


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_is_unpacked_as_it_was_packed_needs_no_check(call, lengths):
    found = _signature(call, lengths)
    assert not found.may_choose_rows
    assert found == _signature(call, (3, 5, 2, 4))


@pytest.mark.parametrize("call", DOUBTFUL.values(), ids=DOUBTFUL)
@pytest.mark.parametrize("lengths", [(5, 4, 3, 2), (2, 5, 1, 4)])
def test_everything_else_is_checked_every_time(call, lengths):
    """… even if a batch came in order."""
    assert _signature(call, lengths).may_choose_rows


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_what_comes_out_may_be_changed_in_place(enforce_sorted, assert_taped_exactly):
    def call(model: Model, inputs: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            model.before(inputs), lengths, batch_first=True, enforce_sorted=enforce_sorted
        )
        outputs, (states, _) = model.one(packed)
        padded = pad_packed_sequence(outputs, batch_first=True)[0]
        padded *= 2
        states += 1
        return padded.sin().sum((1, 2)) + states.sin().sum((0, 2))

    model, inputs = Model(), (torch.randn(3, STEPS, WIDTH), torch.tensor([5, 4, 2]))
    assert_taped_exactly(model, lambda model: call(model, *inputs))


@pytest.mark.parametrize("place", [None, [1, 0, 2]])
def test_packing_is_on_the_device_of_its_rows(place):
    device = torch.device("meta")
    place = None if place is None else torch.tensor(place, device=device)
    packing = Packing(torch.tensor([3, 2, 2, 1]), place, device)
    padded = torch.randn(4, 3, 2, device=device)
    found = [packing.present, packing.last, packing.reversed(padded), packing.at_end(padded)]
    assert {values.device for values in found} == {device}


@pytest.mark.parametrize("call", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("lengths", [*LENGTHS, (3,)])
def test_each_example_has_its_own_gradient(assert_taped_exactly, kind, call, lengths):
    model = Model(kind)
    if kind is nn.GRU and call is PLAIN["last state"]:
        call = lambda m, x, n: m.one(m.pack(x, n))[1].sin().sum((0, 2))  # noqa: E731
    calls = Calls(model, call)
    inputs = torch.randn(len(lengths), STEPS, WIDTH), torch.tensor(lengths)
    assert_taped_exactly(calls, lambda calls: calls(*inputs))


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_packing_is_torchs_own_and_undoes_itself(sort, batch_first):
    padded = torch.randn(4, STEPS, WIDTH, requires_grad=True)
    lengths = torch.tensor([5, 3, 3, 1] if sort else [3, 1, 5, 3])
    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=sort)
    packing = Packing(packed.batch_sizes, packed.unsorted_indices)
    assert packing.last.tolist() == (lengths - 1).tolist()
    own = UnpackRows.apply(packed.data, packing)
    expected = pad_packed_sequence(packed, padding_value=0.0)[0]
    torch.testing.assert_close(own, expected, rtol=0, atol=0)
    torch.testing.assert_close(PackRows.apply(own, packing), packed.data, rtol=0, atol=0)
    in_order = PackedSequence(packed.data, packed.batch_sizes)
    spread = SpreadRows.apply(packed.data, packing, batch_first, 7.0, STEPS + 2)
    expected = pad_packed_sequence(
        in_order, batch_first=batch_first, padding_value=7.0, total_length=STEPS + 2
    )[0]
    torch.testing.assert_close(spread, expected, rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_go_back_through_packing(batch_first):
    packing = Packing(torch.tensor([3, 2, 2, 1]), torch.tensor([2, 0, 1]))
    rows, padded = torch.randn(8, 2, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    torch.autograd.gradcheck(lambda rows: UnpackRows.apply(rows, packing), rows)
    torch.autograd.gradcheck(lambda padded: PackRows.apply(padded, packing), padded)
    torch.autograd.gradcheck(
        lambda rows: SpreadRows.apply(rows, packing, batch_first, 0.5, 6), rows
    )


def test_sequences_are_reversed_and_ended_each_at_its_own_end():
    packing = Packing(torch.tensor([2, 1]), torch.tensor([1, 0]))  # lengths 1 and 2
    padded = torch.arange(4.0).view(2, 2, 1)  # example 0: 0, 2; example 1: 1, 3
    assert packing.reversed(padded)[..., 0].tolist() == [[0, 3], [2, 1]]
    assert packing.at_end(padded)[..., 0].tolist() == [0, 3]
