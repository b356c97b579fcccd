"""An LSTM layer by torch's operations, step by step, for every device and type.

On a CPU the rest of a step costs as much as it has small operations, and tanh costs several times
what the logistic function σ does. So both directions take a step in one operation, the second on
the reversed input. And with tanh(x) = 2σ(2x) - 1, the state kept as C = 2c and -h, and the
factors 2 and -1 put into the weights, a step forward is

    s = σ(W [x, -h] + b)        C ← f C + 4 i s_g - 2 i        -h = o - 2 o σ(C)

where s holds the gates i, f, o and s_g of g = 2 s_g - 1. Going back, with dC = dc / 2, needs five
factors, which are computed for all steps at once (C' is the cell state before),

    δ_i = dC · 2 g i(1 - i)    δ_f = dC · C' f(1 - f)    δ_g = dC · 8 i s_g(1 - s_g)
    δ_o = dh · tanh(c) o(1 - o)    dC += dh/2 · o(1 - tanh²(c))

so that a step back is a product and five small operations.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units; gates in torch's order i, f,
g, o. Steps of the second direction are counted as it takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpnlu.gradients.kernels import Multiplier
from dpnlu.gradients.recurrent.passes import (
    Reverse,
    apart,
    gradient_of_inputs,
    joined,
    remember,
    weight_sums,
)


@dataclass(frozen=True)
class Prepared:
    """The weights as the steps use them, those of each direction side by side.

    Attributes:
        ahead: [x, -h] -> gates before their non-linearities, those of g doubled.
        back: δ -> gradient of [x, h].
        back_to_state: δ -> gradient of h alone.
    """

    ahead: Multiplier
    back: Multiplier
    back_to_state: Multiplier

    @classmethod
    def of(cls, weights: Sequence[tuple[Tensor, ...]], rows: int) -> Prepared:
        with torch.no_grad():
            into, recurrent = (torch.stack([w[kind] for w in weights]) for kind in (0, 1))
            units = recurrent.shape[2]
            joined = torch.cat((into, -recurrent), dim=2)
            joined[:, 2 * units : 3 * units] *= 2
            bias = None
            if len(weights[0]) == 4:
                bias = torch.stack([w[2] + w[3] for w in weights])
                bias[:, 2 * units : 3 * units] *= 2
            return cls(
                Multiplier.of(joined, bias, rows),
                Multiplier.of(torch.cat((into, recurrent), dim=2).mT, None, rows),
                Multiplier.of(recurrent.mT, None, rows),
            )


class Layer(torch.autograd.Function):
    """(tap, inputs, hidden, cell, reverse, prepared, *weights) -> hidden states, cell states, and
    hidden states before each step (D, T, B, H).

    `tap` has the gates' shape and no influence; its gradient is δ. Gradients that the backward pass
    does not need, such as the sums of weight gradients when only δ is wanted, are not computed.
    Everything is computed in the weights' type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tap: Tensor,
        inputs: Tensor,
        hidden: Tensor,
        cell: Tensor,
        reverse: Reverse,
        prepared: Prepared,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        directions, steps, batch, _ = tap.shape
        size, units = inputs.shape[2], hidden.shape[2]
        # One slot more than steps, for the state after the last.
        slots = tap.new_empty(directions, steps + 1, batch, size + units)
        slots[0, :-1, :, :size] = inputs
        if directions == 2:
            slots[1, :-1, :, :size] = reverse(inputs)
        slots[:, 0, :, size:] = -hidden
        doubled, squashed, gates = _scan(prepared.ahead, slots, 2 * cell.to(slots.dtype))
        states = slots[..., size:].neg()
        before, after = states[:, :-1], states[:, 1:]
        factors = _factors(gates, doubled[:, :-1], after, squashed)
        remember(ctx, reverse, prepared, inputs, (tap, *weights))
        ctx.save_for_backward(inputs, before, *factors)
        ctx.mark_non_differentiable(before)
        outputs, cells = (joined(values, reverse) for values in (after, doubled[:, 1:] / 2))
        return outputs.to(inputs.dtype), cells.to(inputs.dtype), before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, before, *factors = ctx.saved_tensors
        directions, onward = len(before), ctx.needs_input_grad[1]
        delta, d_read, hidden, cell = _scan_back(
            ctx.prepared.back if onward else ctx.prepared.back_to_state,
            tuple(apart(gradient, directions, ctx.reverse, before) for gradient in gradients[:2]),
            tuple(factors),
        )
        tap, *sums = weight_sums(ctx, (delta,), inputs, before)
        d_inputs = gradient_of_inputs(ctx, d_read) if onward else None
        return tap, d_inputs, hidden, cell, None, None, *sums


def _scan(multiply: Multiplier, slots: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run over time from the cell state C = `cell`. Slot t holds [x, -h] of step t, with only the
    first -h there yet; each step leaves its -h in the next slot.

    Returns:
        C before the first and after every step (D, T + 1, B, H), σ(C) after every step
        (D, T, B, H), gates (D, T, B, 4H) with s_g in place of g.
    """
    units = cell.shape[2]
    entering, leaving = slots[:, :-1], slots[:, 1:, :, -units:]
    gates = slots.new_empty(*entering.shape[:3], 4 * units)
    # Products are faster into a whole than into a slice of `gates`, where σ goes anyway.
    product = gates.new_empty(len(gates), gates.shape[2], 4 * units)
    cells = slots.new_empty(*slots.shape[:3], units)
    cells[:, 0] = cell
    squashed = torch.empty_like(leaving)
    before, after = cells[:, :-1], cells[:, 1:]
    views = (entering, gates, *gates.chunk(4, dim=3), before, after, squashed, leaving)
    for x_h, gate, i, f, s_g, o, old, new, s_c, minus_h in _steps(views):
        torch.sigmoid(multiply(x_h, out=product), out=gate)
        torch.mul(f, old, out=new).addcmul_(i, s_g, value=4).sub_(i, alpha=2)
        torch.addcmul(o, o, torch.sigmoid(new, out=s_c), value=-2, out=minus_h)
    return cells, squashed, gates


def _factors(
    gates: Tensor, earlier: Tensor, outputs: Tensor, squashed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of δ, in the memory of the gates; of dh/2 in dC; of dC a step earlier."""
    i, f, s_g, o = gates.chunk(4, dim=3)
    kept = f.clone()
    # o(1 - tanh²(c)) = o - h tanh(c) = o - h(2σ(C) - 1)
    through = (o + outputs).addcmul_(outputs, squashed, value=-2)
    torch.addcmul(outputs, outputs, o, value=-1, out=o)  # tanh(c) o(1 - o) = h - h o
    g = s_g.mul(4).sub_(2)
    by_logistic = torch.ops.aten.sigmoid_backward.grad_input  # (x, s) -> x s(1 - s)
    by_logistic(i, s_g, grad_input=s_g).mul_(8)
    by_logistic(g, i, grad_input=i)
    by_logistic(earlier, f, grad_input=f)
    return gates, through, kept


def _scan_back(
    multiply: Multiplier, gradients: tuple[Tensor | None, ...], factors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back through time.

    Args:
        multiply: δ -> what goes back, in the last H columns to the state before.

    Returns:
        δ (D, T, B, 4H); what the other columns, if any, send back to each step's input; the
        gradients of the hidden and the cell state started from (D, B, H).
    """
    gates, through, kept = factors
    delta, units = torch.empty_like(gates), kept.shape[3]
    # Step by step, so that each product is contiguous: a whole is written faster than a slice.
    sent = gates.new_empty(gates.shape[1], len(gates), gates.shape[2], multiply.outputs)
    to_state = torch.zeros_like(kept[:, 0])
    d_hidden, d_cells = gradients
    none = kept.new_zeros(1).expand_as(kept)
    views = (
        none if d_hidden is None else d_hidden,
        none if d_cells is None else d_cells,
        through,
        kept,
        *_cell_and_output(gates),
        *_cell_and_output(delta),
        delta,
        sent.transpose(0, 1),
    )
    dc = torch.zeros_like(kept[:, 0])  # dC
    for dh, d_cell, into_c, out_of_c, k_ifg, k_o, d_ifg, d_o, d_gates, back in reversed(
        _steps(views)
    ):
        dh = dh + to_state
        if d_cells is not None:
            dc.add_(d_cell, alpha=0.5)
        dc.addcmul_(dh, into_c, value=0.5)
        torch.mul(k_ifg, dc[:, :, None], out=d_ifg)
        torch.mul(k_o, dh, out=d_o)
        dc.mul_(out_of_c)
        to_state = multiply(d_gates, out=back)[..., -units:]
    return delta, sent.transpose(0, 1)[..., :-units], to_state.clone(), dc.mul_(2)


def _cell_and_output(gates: Tensor) -> tuple[Tensor, Tensor]:
    """(…, 4H) -> the three gates behind the cell (…, 3, H), the output gate (…, H)."""
    by_gate = gates.view(*gates.shape[:3], 4, -1)
    return by_gate[..., :3, :], by_gate[..., 3, :]


def _steps(views: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
    """Of every view, (D, T, …), the entry of each step."""
    return list(zip(*(view.unbind(1) for view in views), strict=True))
