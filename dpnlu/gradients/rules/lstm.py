"""The uses of an LSTM layer's weights.

All weights of a direction have the same output gradient: δ, that of the gates before their
non-linearities. The layer records δ once, with what each weight was multiplied by. torch's own
kernels do not show δ; those of `dpnlu.gradients.recurrent` do.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units; gates in torch's order i, f,
g, o. Steps of the second direction are counted as it takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.recurrent.lstm_compiled import CompiledLayer, Packed
from dpnlu.gradients.recurrent.lstm_steps import Layer, Prepared
from dpnlu.gradients.recurrent.native import scan_for
from dpnlu.gradients.recurrent.passes import Reverse
from dpnlu.gradients.rules.layer_uses import (
    INPUTS,
    STATES,
    Weights,
    all_of,
    read_by,
    tap_for,
    uses_of,
)


def lstm_layer(
    recorder: Recorder,
    inputs: Tensor,
    state: tuple[Tensor, ...],
    weights: Sequence[Weights],
    reverse: Reverse,
) -> tuple[Tensor, Tensor]:
    """Run a layer and record the uses of its weights.

    Args:
        inputs: (T, B, I).
        state: initial hidden and cell state, (D, B, H) each.
        weights: of each direction W_ih (4H, I), W_hh (4H, H), and biases b_ih, b_hh (4H,) if there
            are any.
        reverse: brings (T, B, …) into the order in which the second direction reads it; it is its
            own inverse.

    Returns:
        hidden states and cell states, (T, B, D H) each, in the order of the input.
    """
    steps, batch, _ = inputs.shape
    tap, every = tap_for(inputs, weights), all_of(weights)
    scan = scan_for(*every)
    kind: Any = Layer if scan is None else CompiledLayer
    prepared = recorder.memory.prepared(
        every,
        lambda: (
            Prepared.of(weights, batch) if scan is None else Packed.of(scan, weights, steps * batch)
        ),
        kind,
    )
    used = [weight.view_as(weight) for weight in every]
    hidden, cells, before = kind.apply(tap, inputs, *state, reverse, prepared, *used)
    lefts = {INPUTS: read_by(inputs, reverse), STATES: before.__getitem__}
    recorder.record(tap, uses_of(weights, lefts), dims=(2,))
    return hidden, cells
