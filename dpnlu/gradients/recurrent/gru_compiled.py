"""A GRU layer of float32 weights on a CPU by the compiled scan over time.

With x and h the input and the state before a step,

    r = σ(W_ir x + b_ir + W_hr h + b_hr)      z likewise
    n = tanh(W_in x + b_in + r p)             p = W_hn h + b_hn
    h' = n + z (h - n)

so that the products with the inputs and those with the states have gradients that differ at n, by
the factor r.
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
class PackedGRU:
    """The weights as the compiled scan uses them, those of each direction side by side.

    Attributes:
        into: inputs -> gates before their non-linearities, without W_h h and b_hn.
        back: the gradient of the products with the inputs -> that of the inputs.
        ahead, to_state: the recurrent weights as `Scan.gru_ahead` and `Scan.gru_back` read them.
        bias: (D, H) b_hn; None without biases.
    """

    scan: Scan
    into: Multiplier
    back: Multiplier
    ahead: Tensor
    to_state: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, scan: Scan, weights: Sequence[tuple[Tensor, ...]], rows: int) -> PackedGRU:
        with torch.no_grad():
            into, recurrent = (torch.stack([w[kind] for w in weights]) for kind in (0, 1))
            bias = of_new = None
            if len(weights[0]) == 4:
                units = recurrent.shape[2]
                of_state = torch.stack([w[3] for w in weights])
                of_new = of_state[:, 2 * units :].clone()
                of_state[:, 2 * units :] = 0
                bias = torch.stack([w[2] for w in weights]) + of_state
            return cls(
                scan,
                Multiplier.of(into, bias, rows),
                Multiplier.of(into.mT, None, rows),
                scan.packed_ahead(recurrent),
                scan.packed_back(recurrent),
                of_new,
            )


class CompiledGRU(torch.autograd.Function):
    """(taps of the products with the inputs and with the states, inputs, hidden, reverse, packed,
    *weights) -> hidden states, and those before each step (D, T, B, H).

    The taps have the gates' shape and no influence; their gradients are those of the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tap_inputs: Tensor,
        tap_states: Tensor,
        inputs: Tensor,
        hidden: Tensor,
        reverse: Reverse,
        packed: PackedGRU,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gates = products_of(packed.into, inputs, reverse, like=tap_inputs)
        states = begun(hidden, tap_inputs.shape[1], tap_inputs)
        products = torch.empty_like(states[:, 1:], memory_format=torch.contiguous_format)
        packed.scan.gru_ahead(gates, states, products, packed.bias, packed.ahead)
        before = states[:, :-1]
        remember(ctx, reverse, packed, inputs, (tap_inputs, tap_states, *weights))
        ctx.save_for_backward(inputs, states, gates, products)
        ctx.mark_non_differentiable(before)
        return joined(states[:, 1:], reverse).to(inputs.dtype), before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, states, gates, products = ctx.saved_tensors
        packed = ctx.prepared
        d_hidden = apart(gradients[0], len(gates), ctx.reverse, gates)
        *deltas, hidden = packed.scan.gru_back(gates, states, products, d_hidden, packed.to_state)
        d_inputs = None
        if ctx.needs_input_grad[2]:
            d_inputs = gradient_of_inputs(ctx, product(packed.back, deltas[0]))
        of_inputs, of_states, *sums = weight_sums(ctx, tuple(deltas), inputs, states[:, :-1])
        return of_inputs, of_states, d_inputs, hidden, None, None, *sums
