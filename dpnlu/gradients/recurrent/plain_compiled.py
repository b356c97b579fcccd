"""A layer of plain recurrent cells, of float32 weights on a CPU, by the compiled scan over time:
h' = tanh(W_i x + b_i + W_h h + b_h), or its positive part in place of tanh."""

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
class PackedPlain:
    """The weights as the compiled scan uses them, those of each direction side by side.

    Attributes:
        rectifies: by max(0, x) instead of tanh.
        into: inputs -> what is added to W_h h.
        back: δ -> gradient of the inputs.
        ahead, to_state: the recurrent weights as `Scan.plain_ahead` and `Scan.plain_back` read
            them.
    """

    scan: Scan
    rectifies: bool
    into: Multiplier
    back: Multiplier
    ahead: Tensor
    to_state: Tensor

    @classmethod
    def of(
        cls, scan: Scan, weights: Sequence[tuple[Tensor, ...]], rows: int, *, rectifies: bool
    ) -> PackedPlain:
        with torch.no_grad():
            into, recurrent = (torch.stack([w[kind] for w in weights]) for kind in (0, 1))
            bias = torch.stack([w[2] + w[3] for w in weights]) if len(weights[0]) == 4 else None
            return cls(
                scan,
                rectifies,
                Multiplier.of(into, bias, rows),
                Multiplier.of(into.mT, None, rows),
                scan.packed_back(recurrent.mT),
                scan.packed_back(recurrent),
            )


class CompiledPlain(torch.autograd.Function):
    """(tap, inputs, hidden, reverse, packed, *weights) -> hidden states, and those before each step
    (D, T, B, H).

    `tap` has the shape (D, T, B, H) and no influence; its gradient is δ, that of what goes through
    the non-linearity.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tap: Tensor,
        inputs: Tensor,
        hidden: Tensor,
        reverse: Reverse,
        packed: PackedPlain,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inside = products_of(packed.into, inputs, reverse, like=tap)
        states = begun(hidden, tap.shape[1], tap)
        packed.scan.plain_ahead(inside, states, packed.ahead, rectifies=packed.rectifies)
        before = states[:, :-1]
        remember(ctx, reverse, packed, inputs, (tap, *weights))
        ctx.save_for_backward(inputs, states)
        ctx.mark_non_differentiable(before)
        return joined(states[:, 1:], reverse).to(inputs.dtype), before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, states = ctx.saved_tensors
        packed = ctx.prepared
        d_hidden = apart(gradients[0], len(states), ctx.reverse, states)
        delta, hidden = packed.scan.plain_back(
            states, d_hidden, packed.to_state, rectifies=packed.rectifies
        )
        d_inputs = None
        if ctx.needs_input_grad[1]:
            d_inputs = gradient_of_inputs(ctx, product(packed.back, delta))
        tap, *sums = weight_sums(ctx, (delta,), inputs, states[:, :-1])
        return tap, d_inputs, hidden, None, None, *sums
