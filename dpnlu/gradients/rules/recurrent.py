"""Recurrent networks: `nn.LSTM`, `nn.GRU`, `nn.RNN`, in every configuration torch has.

torch runs a whole network as one operation. Here it is run layer by layer: LSTM layers by kernels
of their own, others by a compiled scan or, where that is not to be had, direction by direction and
step by step as recorded linear maps, which is exact and slower. Between layers everything is
ordinary autograd.

Inside, sequences are time-major, (T, B, …), and padded. A packed sequence is unpacked first; its
second direction reads each sequence from that sequence's own end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from dpnlu.gradients.layout import Layout
from dpnlu.gradients.packing import Packing, PackRows, SortStates, SpreadRows, UnpackRows
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.recurrent.passes import Reverse
from dpnlu.gradients.rules.layer_uses import States, Weights
from dpnlu.gradients.rules.linear import linear
from dpnlu.gradients.rules.lstm import lstm_layer
from dpnlu.gradients.rules.scanned import gru_layer, plain_layer

# (recorder, inputs (T, B, I), states before (D, B, H), weights of each direction, how to reverse
# sequences for the second one) -> states (T, B, D H).
Layer = Callable[[Recorder, Tensor, States, Sequence[Weights], Reverse], States]
# The same, or None where it is not made for such weights.
Scanned = Callable[[Recorder, Tensor, States, Sequence[Weights], Reverse], States | None]
# (recorder, the input of a step times its weights (B, G), states, weights) -> the states after it.
Cell = Callable[[Recorder, Tensor, States, Weights], States]


@dataclass(frozen=True)
class _Network:
    """The arguments of one of torch's recurrent operations, in one form for all of them.

    Attributes:
        inputs: (T, B, I).
        states: the initial ones, (layers · directions, B, H) each.
        weights: per layer and direction.
        directions: 1 or 2.
        dropout: probability of dropout between layers.
        packing: None if the input was padded.
        batch_first: whether a padded input and the output have the examples in dimension 0.
    """

    inputs: Tensor
    states: States
    weights: list[Weights]
    directions: int
    dropout: float
    packing: Packing | None
    batch_first: bool

    @classmethod
    def of(cls, recorder: Recorder, args: tuple[Any, ...]) -> _Network:
        packed = isinstance(args[3], (list, tuple))
        hx, flat = args[2:4] if packed else args[1:3]
        _, layers, dropout, train, bidirectional, *rest = args[4:] if packed else args[3:]
        packing = _packing(recorder, args[0], args[1]) if packed else None
        if packing is not None:
            inputs = UnpackRows.apply(args[0], packing)  # type: ignore[no-untyped-call]
            hx = _given_state(recorder, hx)
        else:
            inputs = args[0].transpose(0, 1) if rest[0] else args[0]
        states = _entered(recorder, hx if isinstance(hx, tuple) else (hx,))
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

    def run(self, recorder: Recorder, layer: Layer) -> tuple[Tensor, ...]:
        """(output, last states …) as torch returns them."""
        inputs, last = self.inputs, []
        reverse = _flipped if self.packing is None else self.packing.reversed
        for first in range(0, len(self.weights), self.directions):
            if first and self.dropout:
                inputs = F.dropout(inputs, self.dropout)
            of_layer = slice(first, first + self.directions)
            before = tuple(state[of_layer] for state in self.states)
            states = layer(recorder, inputs, before, self.weights[of_layer], reverse)
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


def _packing(recorder: Recorder, rows: Tensor, counts: Tensor) -> Packing:
    """The packing, from the number of sequences at each step and their order, which is in the
    module's input."""
    sequence = next(
        (arg for arg in recorder.module_inputs if isinstance(arg, PackedSequence)), None
    )
    place = None if sequence is None else sequence.unsorted_indices
    return Packing(counts, place, rows.device)


def _pad_packed(
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> Any:
    """Pad what a network packed, in packed order; the caller brings the sequences into the
    batch's order."""
    packing = getattr(data.grad_fn, "packing", None)
    if not isinstance(packing, Packing) or not torch.equal(packing.counts, batch_sizes):
        return NotImplemented
    padded = SpreadRows.apply(  # type: ignore[no-untyped-call]
        data, packing, batch_first, padding_value, total_length
    )
    return padded, packing.present.sum(0).cpu()


def _given_state(recorder: Recorder, packed: Any) -> Any:
    """The initial state in the batch's own order, as the module received it before packing it.

    Without one the module starts from zeros, whose order does not matter.
    """
    given = [value for value in recorder.module_inputs if value is not None]
    states = [value for value in given if not isinstance(value, PackedSequence)]
    by_module = len(states) < len(given)  # else another module packed, and called the operation
    return states[0] if states and by_module else packed


def _entered(recorder: Recorder, states: States) -> States:
    """Have learned initial states enter the batch: dimension 1 holds the examples."""
    return tuple(
        _stand_in(recorder, state)
        if state.requires_grad and recorder.is_batch_independent(state)
        else state
        for state in states
    )


def _stand_in(recorder: Recorder, state: Tensor) -> Tensor:
    stand_in = state.view_as(state)

    def per_example(gradient: Tensor, layout: Layout) -> Tensor:
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        apart = gradient.new_zeros(layout.batch, *gradient.shape)
        apart[layout.owner(len(columns)).to(columns), :, columns] = gradient.transpose(0, 1)
        return apart

    recorder.enter(state, stand_in, per_example, dims=(1,))
    return stand_in


def _lstm(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    network = _Network.of(recorder, args)
    projected = len(network.weights[0]) % 2 == 1
    return network.run(recorder, _stepwise(_projected_lstm_cell) if projected else lstm_layer)


def _gru(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    return _Network.of(recorder, args).run(recorder, _scanned(gru_layer, gru_cell))


def _rnn_tanh(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    layer = _scanned(partial(plain_layer, rectifies=False), elman_cell(torch.tanh))
    return _Network.of(recorder, args).run(recorder, layer)


def _rnn_relu(recorder: Recorder, *args: Any) -> tuple[Tensor, ...]:
    layer = _scanned(partial(plain_layer, rectifies=True), elman_cell(torch.relu))
    return _Network.of(recorder, args).run(recorder, layer)


def _scanned(scanned: Scanned, cell: Cell) -> Layer:
    """A layer by its compiled scan; where there is none, by its cell."""
    stepwise = _stepwise(cell)

    def run(
        recorder: Recorder,
        inputs: Tensor,
        before: States,
        weights: Sequence[Weights],
        reverse: Reverse,
    ) -> States:
        found = scanned(recorder, inputs, before, weights, reverse)
        return stepwise(recorder, inputs, before, weights, reverse) if found is None else found

    return run


def _stepwise(cell: Cell) -> Layer:
    """A layer that applies a cell to one step after the other, direction by direction."""

    def run(
        recorder: Recorder,
        inputs: Tensor,
        before: States,
        weights: Sequence[Weights],
        reverse: Reverse,
    ) -> States:
        found = []
        for place, of_one in enumerate(weights):
            states = tuple(state[place] for state in before)
            read = reverse(inputs) if place else inputs
            after = _stepped(recorder, cell, read, states, of_one)
            found.append([reverse(values) if place else values for values in after])
        return tuple(torch.cat(values, dim=2) for values in zip(*found, strict=True))

    return run


def _stepped(
    recorder: Recorder, cell: Cell, inputs: Tensor, states: States, weights: Weights
) -> States:
    """One direction: inputs (T, B, I), states before (B, H) -> states (T, B, H)."""
    projected = recorded_linear(recorder, inputs.transpose(0, 1), weights[0], _bias(weights, 2))
    seen = []
    for step in projected.unbind(1):
        states = cell(recorder, step, states, weights)
        seen.append(states)
    return tuple(torch.stack(values) for values in zip(*seen, strict=True))


def _flipped(sequences: Tensor) -> Tensor:
    """(T, B, …) from its end."""
    return sequences.flip(0)


def elman_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    """One step of a plain recurrent network."""

    def cell(recorder: Recorder, projected: Tensor, states: States, weights: Weights) -> States:
        return (
            activation(
                projected + recorded_linear(recorder, states[0], weights[1], _bias(weights, 3))
            ),
        )

    return cell


def gru_cell(recorder: Recorder, projected: Tensor, states: States, weights: Weights) -> States:
    """One step of a GRU."""
    (h,) = states
    recurrent = recorded_linear(recorder, h, weights[1], _bias(weights, 3))
    reset_i, update_i, new_i = projected.chunk(3, dim=1)
    reset_h, update_h, new_h = recurrent.chunk(3, dim=1)
    update = torch.sigmoid(update_i + update_h)
    new = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    return (new + update * (h - new),)


def lstm_cell(recorder: Recorder, projected: Tensor, states: States, weights: Weights) -> States:
    """One step of an LSTM."""
    h, c = states
    i, f, g, o = (projected + recorded_linear(recorder, h, weights[1], _bias(weights, 3))).chunk(
        4, dim=1
    )
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _projected_lstm_cell(
    recorder: Recorder, projected: Tensor, states: States, weights: Weights
) -> States:
    h, c = lstm_cell(recorder, projected, states, weights[:-1])
    return recorded_linear(recorder, h, weights[-1], None), c


def recorded_linear(
    recorder: Recorder, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`F.linear`, recorded."""
    output = F.linear(inputs, weight, bias)
    if output.requires_grad:
        recorder.record(output, linear(inputs, weight, bias))
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
