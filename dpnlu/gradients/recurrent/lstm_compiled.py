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
from dpnlu.gradients.recurrent.native import Scan
from dpnlu.gradients.recurrent.passes import (
    Reverse,
    apart,
    begun,
    gradient_of_inputs,
    joined,
    product,
    products_of,
    remember,
    weight_sums,
)


@dataclass(frozen=True)
class Packed:
    """The weights as the compiled scan uses them, those of each direction side by side.

    Attributes:
        into: inputs -> gates before their non-linearities, without what comes from the state.
        back: δ -> gradient of the inputs.
        ahead, to_state: the recurrent weights as `Scan.lstm_ahead` and `Scan.lstm_back` read them.
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
                scan.packed_ahead(recurrent),
                scan.packed_back(recurrent),
            )


class CompiledLayer(torch.autograd.Function):
    """As `dpnlu.gradients.recurrent.lstm_steps.Layer`."""

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
        steps = tap.shape[1]
        gates = products_of(packed.into, inputs, reverse, like=tap)
        states, contents = begun(hidden, steps, tap), begun(cell, steps, tap)
        packed.scan.lstm_ahead(gates, states, contents, packed.ahead)
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
        delta, hidden, cell = packed.scan.lstm_back(
            gates, cells, (d_hidden, d_cells), packed.to_state
        )
        d_inputs = None
        if ctx.needs_input_grad[1]:
            d_inputs = gradient_of_inputs(ctx, product(packed.back, delta))
        tap, *sums = weight_sums(ctx, (delta,), inputs, before)
        return tap, d_inputs, hidden, cell, None, None, *sums
