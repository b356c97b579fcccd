"""An LSTM layer of float32 weights on a CPU by the compiled scan over time.

All inputs are multiplied at once; what goes from step to step is in `scan.c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpnlu.gradients.kernels import Multiplier
from dpnlu.gradients.lstm.native import Scan
from dpnlu.gradients.lstm.passes import (
    Reverse,
    apart,
    gradient_of_inputs,
    joined,
    remember,
    weight_sums,
)


@dataclass(frozen=True)
class Packed:
    """The weights as the compiled scan uses them, those of each direction side by side.

    Attributes:
        into: inputs -> gates before their non-linearities, without what comes from the state.
        back: δ -> gradient of the inputs.
        ahead, to_state: the recurrent weights as `Scan.pack` leaves them.
    """

    scan: Scan
    into: Multiplier
    back: Multiplier
    ahead: Tensor
    to_state: Tensor

    @classmethod
    def of(cls, scan: Scan, weights: Sequence[tuple[Tensor, ...]], rows: int) -> Packed:
        with torch.no_grad():
            into, recurrent = (torch.stack([w[kind] for w in weights]) for kind in (0, 1))
            bias = torch.stack([w[2] + w[3] for w in weights]) if len(weights[0]) == 4 else None
            return cls(
                scan,
                Multiplier.of(into, bias, rows),
                Multiplier.of(into.mT, None, rows),
                *scan.pack(recurrent),
            )


class CompiledLayer(torch.autograd.Function):
    """As `dpnlu.gradients.lstm.steps.Layer`."""

    @staticmethod
    def forward(
        ctx: Any,
        tap: Tensor,
        inputs: Tensor,
        hidden: Tensor,
        cell: Tensor,
        reverse: Reverse,
        packed: Packed,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        directions, steps, batch, _ = tap.shape
        read = [inputs, reverse(inputs)][:directions]
        rows = torch.stack([one.to(tap.dtype) for one in read]).flatten(1, 2)
        gates = tap.new_empty(tap.shape)
        packed.into(rows, out=gates.view(directions, steps * batch, -1))
        states, contents = _begun(hidden, steps, tap), _begun(cell, steps, tap)
        packed.scan.ahead(gates, states, contents, packed.ahead)
        before = states[:, :-1]
        remember(ctx, reverse, packed, inputs, (tap, *weights))
        ctx.save_for_backward(inputs, before, gates, contents)
        ctx.mark_non_differentiable(before)
        outputs, cells = (
            joined(whole[:, 1:], reverse).to(inputs.dtype) for whole in (states, contents)
        )
        return outputs, cells, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, before, gates, cells = ctx.saved_tensors
        packed, directions = ctx.prepared, len(gates)
        d_hidden, d_cells = (
            apart(gradient, directions, ctx.reverse, gates) for gradient in gradients[:2]
        )
        delta, hidden, cell = packed.scan.back(gates, cells, (d_hidden, d_cells), packed.to_state)
        d_inputs = None
        if ctx.needs_input_grad[1]:
            d_read = gates.new_empty(*gates.shape[:3], packed.back.outputs)
            packed.back(delta.flatten(1, 2), out=d_read.flatten(1, 2))
            d_inputs = gradient_of_inputs(ctx, d_read)
        tap, *sums = weight_sums(ctx, delta, inputs, before)
        return tap, d_inputs, hidden, cell, None, None, *sums


def _begun(first: Tensor, steps: int, like: Tensor) -> Tensor:
    """(D, T + 1, B, H) with the state before the first step (D, B, H) in its place."""
    whole = like.new_empty(len(first), steps + 1, *first.shape[1:])
    whole[:, 0] = first
    return whole
