"""Recurrent networks: `nn.LSTM`, `nn.GRU`, `nn.RNN`, in every configuration torch has.

torch hands a whole network to one operation. Here it is run layer by layer: LSTM layers by a kernel
of their own, other cells direction by direction and step by step out of recorded linear maps, which
is exact and slower. Between layers everything is ordinary autograd.

Inside, sequences are time-major, (T, B, …), and padded. A packed sequence is unpacked first; its
second direction reads each sequence back from its own end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from dpnlu.gradients.layout import Layout
from dpnlu.gradients.packing import Packing, PackRows, SortStates, SpreadRows, UnpackRows
from dpnlu.gradients.rules.linear import linear
from dpnlu.gradients.rules.lstm import Turn, lstm_layer
from dpnlu.gradients.tape import Tape

States = tuple[Tensor, ...]
Weights = tuple[Tensor, ...]
# (tape, inputs (T, B, I), states before (D, B, H), weights of each direction, how the second
# direction turns its input) -> states (T, B, D H).
Layer = Callable[[Tape, Tensor, States, Sequence[Weights], Turn], States]
# (tape, the input's share of a step (B, G), states, weights) -> the states after it.
Cell = Callable[[Tape, Tensor, States, Weights], States]


@dataclass(frozen=True)
class _Network:
    """A call of torch's recurrent operations, sorted out.

    Attributes:
        inputs: (T, B, I).
        states: what to start from, (layers · directions, B, H) each.
        weights: per layer and direction.
        packing: None if the input was padded.
    """

    inputs: Tensor
    states: States
    weights: list[Weights]
    directions: int
    dropout: float
    packing: Packing | None
    batch_first: bool

    @classmethod
    def of(cls, tape: Tape, args: tuple[Any, ...]) -> _Network:
        packed = isinstance(args[3], (list, tuple))
        hx, flat = args[2:4] if packed else args[1:3]
        _, layers, dropout, train, bidirectional, *rest = args[4:] if packed else args[3:]
        packing = _packing(tape, args[0], args[1]) if packed else None
        if packing is not None:
            inputs = UnpackRows.apply(args[0], packing)  # type: ignore[no-untyped-call]
            hx = _given_state(tape, hx)
        else:
            inputs = args[0].transpose(0, 1) if rest[0] else args[0]
        states = _entered(tape, hx if isinstance(hx, tuple) else (hx,))
        directions = 2 if bidirectional else 1
        each = len(flat) // (layers * directions)
        return cls(
            inputs,
            states,
            [tuple(flat[start : start + each]) for start in range(0, len(flat), each)],
            directions,
            dropout if train else 0.0,
            packing,
            bool(rest and rest[0]),
        )

    def run(self, tape: Tape, layer: Layer) -> tuple[Tensor, ...]:
        """(output, last states …) as torch returns them."""
        inputs, last = self.inputs, []
        turn = _flipped if self.packing is None else self.packing.reversed
        for first in range(0, len(self.weights), self.directions):
            if first and self.dropout:
                inputs = F.dropout(inputs, self.dropout)
            of_layer = slice(first, first + self.directions)
            before = tuple(state[of_layer] for state in self.states)
            states = layer(tape, inputs, before, self.weights[of_layer], turn)
            inputs = states[0]
            for place in range(self.directions):
                last.append(self._last(states, place))
        return self._returned(inputs, [torch.stack(states) for states in zip(*last, strict=True)])

    def _last(self, states: States, place: int) -> States:
        """Of one direction, the states after the last step that each sequence has."""
        of_one = [state.chunk(self.directions, dim=2)[place] for state in states]
        if place == 1:
            return tuple(state[0] for state in of_one)
        if self.packing is None:
            return tuple(state[-1] for state in of_one)
        return tuple(self.packing.at_end(state) for state in of_one)

    def _returned(self, outputs: Tensor, last: list[Tensor]) -> tuple[Tensor, ...]:
        if self.packing is not None:
            rows = PackRows.apply(outputs, self.packing)  # type: ignore[no-untyped-call]
            sort = SortStates.apply
            return rows, *(sort(states, self.packing) for states in last)  # type: ignore[no-untyped-call]
        return (outputs.transpose(0, 1) if self.batch_first else outputs), *last


def _packing(tape: Tape, rows: Tensor, counts: Tensor) -> Packing:
    """From torch's count of sequences at each step; their order is in the module's input."""
    sequence = next((arg for arg in tape.module_inputs if isinstance(arg, PackedSequence)), None)
    place = None if sequence is None else sequence.unsorted_indices
    return Packing(counts, place, rows.device)


def _pad_packed(
    tape: Tape,
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> Any:
    """What a network packed, padded again; the caller puts the sequences into the batch's order."""
    packing = getattr(data.grad_fn, "packing", None)
    if not isinstance(packing, Packing) or not torch.equal(packing.counts, batch_sizes):
        return NotImplemented
    padded = SpreadRows.apply(  # type: ignore[no-untyped-call]
        data, packing, batch_first, padding_value, total_length
    )
    return padded, packing.present.sum(0).cpu()


def _given_state(tape: Tape, packed: Any) -> Any:
    """The initial state in the batch's own order, as the module received it before packing it.

    Without one the module starts from zeros, whose order does not matter.
    """
    given = [value for value in tape.module_inputs if value is not None]
    states = [value for value in given if not isinstance(value, PackedSequence)]
    by_module = len(states) < len(given)  # and not by hand, in a module of another kind
    return states[0] if states and by_module else packed


def _entered(tape: Tape, states: States) -> States:
    """Initial states that are learned meet the batch here: dimension 1 holds the examples."""
    return tuple(
        _met(tape, state) if state.requires_grad and tape.is_free(state) else state
        for state in states
    )


def _met(tape: Tape, state: Tensor) -> Tensor:
    stand_in = state.view_as(state)

    def per_example(gradient: Tensor, layout: Layout) -> Tensor:
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        apart = gradient.new_zeros(layout.batch, *gradient.shape)
        apart[layout.owner(len(columns)).to(columns), :, columns] = gradient.transpose(0, 1)
        return apart

    tape.meet(state, stand_in, per_example, dims=(1,))
    return stand_in


def _lstm(tape: Tape, *args: Any) -> tuple[Tensor, ...]:
    network = _Network.of(tape, args)
    projected = len(network.weights[0]) % 2 == 1
    return network.run(tape, _stepwise(_projected_lstm_cell) if projected else lstm_layer)


def _gru(tape: Tape, *args: Any) -> tuple[Tensor, ...]:
    return _Network.of(tape, args).run(tape, _stepwise(gru_cell))


def _rnn_tanh(tape: Tape, *args: Any) -> tuple[Tensor, ...]:
    return _Network.of(tape, args).run(tape, _stepwise(elman_cell(torch.tanh)))


def _rnn_relu(tape: Tape, *args: Any) -> tuple[Tensor, ...]:
    return _Network.of(tape, args).run(tape, _stepwise(elman_cell(torch.relu)))


def _stepwise(cell: Cell) -> Layer:
    """A layer that applies a cell to one step after the other, direction by direction."""

    def run(
        tape: Tape, inputs: Tensor, before: States, weights: Sequence[Weights], turn: Turn
    ) -> States:
        found = []
        for place, of_one in enumerate(weights):
            states = tuple(state[place] for state in before)
            read = turn(inputs) if place else inputs
            after = _stepped(tape, cell, read, states, of_one)
            found.append([turn(values) if place else values for values in after])
        return tuple(torch.cat(values, dim=2) for values in zip(*found, strict=True))

    return run


def _stepped(tape: Tape, cell: Cell, inputs: Tensor, states: States, weights: Weights) -> States:
    """One direction: inputs (T, B, I), states before (B, H) -> states (T, B, H)."""
    share = recorded_linear(tape, inputs.transpose(0, 1), weights[0], _bias(weights, 2))
    seen = []
    for step in share.unbind(1):
        states = cell(tape, step, states, weights)
        seen.append(states)
    return tuple(torch.stack(values) for values in zip(*seen, strict=True))


def _flipped(sequences: Tensor) -> Tensor:
    """(T, B, …) from its end."""
    return sequences.flip(0)


def elman_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    """One step of a plain recurrent network."""

    def cell(tape: Tape, share: Tensor, states: States, weights: Weights) -> States:
        return (
            activation(share + recorded_linear(tape, states[0], weights[1], _bias(weights, 3))),
        )

    return cell


def gru_cell(tape: Tape, share: Tensor, states: States, weights: Weights) -> States:
    """One step of a GRU."""
    (h,) = states
    recurrent = recorded_linear(tape, h, weights[1], _bias(weights, 3))
    reset_i, update_i, new_i = share.chunk(3, dim=1)
    reset_h, update_h, new_h = recurrent.chunk(3, dim=1)
    update = torch.sigmoid(update_i + update_h)
    new = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    return (new + update * (h - new),)


def lstm_cell(tape: Tape, share: Tensor, states: States, weights: Weights) -> States:
    """One step of an LSTM."""
    h, c = states
    i, f, g, o = (share + recorded_linear(tape, h, weights[1], _bias(weights, 3))).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _projected_lstm_cell(tape: Tape, share: Tensor, states: States, weights: Weights) -> States:
    h, c = lstm_cell(tape, share, states, weights[:-1])
    return recorded_linear(tape, h, weights[-1], None), c


def recorded_linear(tape: Tape, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, recorded."""
    output = F.linear(inputs, weight, bias)
    if output.requires_grad:
        tape.record(output, linear(inputs, weight, bias))
    return output


def _bias(weights: Weights, index: int) -> Tensor | None:
    return weights[index] if len(weights) > 3 else None


REWRITES = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _rnn_tanh,
    torch.rnn_relu: _rnn_relu,
}

REARRANGEMENTS = {torch._pad_packed_sequence: _pad_packed}
