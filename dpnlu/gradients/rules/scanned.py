"""A GRU layer or one of plain cells by the compiled scan over time, and the uses of its weights.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.recurrent.gru_compiled import CompiledGRU, PackedGRU
from dpnlu.gradients.recurrent.native import scan_for
from dpnlu.gradients.recurrent.passes import Reverse
from dpnlu.gradients.recurrent.plain_compiled import CompiledPlain, PackedPlain
from dpnlu.gradients.rules.layer_uses import (
    INPUTS,
    STATES,
    States,
    Weights,
    all_of,
    read_by,
    tap_for,
    uses_of,
)


def gru_layer(
    recorder: Recorder,
    inputs: Tensor,
    states: States,
    weights: Sequence[Weights],
    reverse: Reverse,
) -> States | None:
    """Run a GRU layer and record the uses of its weights; see `lstm_layer`.

    Returns:
        None where there is no compiled scan for such weights.
    """
    every = all_of(weights)
    scan = scan_for(*every)
    if scan is None:
        return None
    rows = inputs.shape[0] * inputs.shape[1]
    packed = recorder.memory.prepared(every, lambda: PackedGRU.of(scan, weights, rows), PackedGRU)
    taps = [tap_for(inputs, weights) for _ in (INPUTS, STATES)]
    used = [weight.view_as(weight) for weight in every]
    layer: Any = CompiledGRU
    hidden, before = layer.apply(*taps, inputs, *states, reverse, packed, *used)
    recorder.record(taps[0], uses_of(weights, {INPUTS: read_by(inputs, reverse)}), dims=(2,))
    recorder.record(taps[1], uses_of(weights, {STATES: before.__getitem__}), dims=(2,))
    return (hidden,)


def plain_layer(
    recorder: Recorder,
    inputs: Tensor,
    states: States,
    weights: Sequence[Weights],
    reverse: Reverse,
    *,
    rectifies: bool,
) -> States | None:
    """The same of a layer of plain cells, by max(0, x) or tanh."""
    every = all_of(weights)
    scan = scan_for(*every)
    if scan is None:
        return None
    rows = inputs.shape[0] * inputs.shape[1]
    packed = recorder.memory.prepared(
        every,
        lambda: PackedPlain.of(scan, weights, rows, rectifies=rectifies),
        PackedPlain,
        rectifies,
    )
    tap, used = tap_for(inputs, weights), [weight.view_as(weight) for weight in every]
    layer: Any = CompiledPlain
    hidden, before = layer.apply(tap, inputs, *states, reverse, packed, *used)
    lefts = {INPUTS: read_by(inputs, reverse), STATES: before.__getitem__}
    recorder.record(tap, uses_of(weights, lefts), dims=(2,))
    return (hidden,)
