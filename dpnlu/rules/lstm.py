"""One direction of one LSTM layer, which leaves the gradient of its gates on the tape.

All weights of the layer see the same output gradient: δ, that of the gates before their
non-linearities. The layer records δ once, with what each weight was multiplied by. torch's own
kernels never show δ; this one makes the same products, and as many: one per step and way, of the
input and the hidden state side by side.

On a CPU the rest of a step is as dear as its few small operations are many, and tanh is several
times as dear as the logistic function σ. With tanh(x) = 2σ(2x) - 1, the state kept as C = 2c and
-h, and the factors 2 and -1 put into the weights, a step forward is

    s = σ(W [x, -h] + b)        C ← f C + 4 i s_g - 2 i        -h = o - 2 o σ(C)

where s holds the gates i, f, o and s_g of g = 2 s_g - 1. Going back needs five factors, which are
computed for all steps at once (c' is the cell state before),

    δ_i = dc · g i(1 - i)    δ_f = dc · c' f(1 - f)    δ_g = dc · i(1 - g²)
    δ_o = dh · tanh(c) o(1 - o)    dc += dh · o(1 - tanh²(c))

so that a step back is a product and five small operations.

Shapes: T steps, B sequences, I inputs, H hidden units; gates in torch's order i, f, g, o.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpnlu.gradients import Dense, Gradients, OuterProducts
from dpnlu.products import Multiplier
from dpnlu.rules.shapes import by_example
from dpnlu.tape import Tape


def lstm_direction(
    tape: Tape,
    inputs: Tensor,
    state: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    backwards: bool,
) -> tuple[Tensor, Tensor]:
    """Run the direction and record its weights.

    Args:
        inputs: (T, B, I).
        state: hidden and cell state to start from, (B, H) each.
        weights: W_ih (4H, I), W_hh (4H, H), and biases b_ih, b_hh (4H,) if there are any.
        backwards: start with the last step.

    Returns:
        hidden states (T, B, H) and cell states (T, B, H), in the order of the input.
    """
    steps, batch, _ = inputs.shape
    tap = inputs.new_zeros(()).requires_grad_().expand(steps, batch, weights[0].shape[0])
    prepared = tape.remembered(weights, lambda: _Prepared.of(weights, batch))
    used = [weight.view_as(weight) for weight in weights]
    hidden, cells, before = _Direction.apply(  # type: ignore[no-untyped-call]
        tap, inputs, *state, backwards, prepared, *used
    )
    received = inputs.detach()

    def finish(delta: Tensor, batch: int) -> Iterator[tuple[Tensor, Gradients]]:
        right = by_example(delta.transpose(0, 1), batch)
        for weight, left in zip(weights, (received, before), strict=False):
            if weight.requires_grad:
                yield weight, OuterProducts(by_example(left.transpose(0, 1), batch), right)
        for bias in weights[2:]:
            if bias.requires_grad:
                yield bias, Dense(right.sum(1))

    tape.record(tap, finish, rows=batch)
    return hidden, cells


@dataclass(frozen=True)
class _Prepared:
    """The weights as the steps use them.

    Attributes:
        ahead: [x, -h] -> gates before their non-linearities, those of g doubled.
        back: δ -> gradient of [x, h].
        back_to_state: δ -> gradient of h alone.
    """

    ahead: Multiplier
    back: Multiplier
    back_to_state: Multiplier

    @classmethod
    def of(cls, weights: tuple[Tensor, ...], rows: int) -> _Prepared:
        with torch.no_grad():
            units = weights[1].shape[1]
            joined = torch.cat((weights[0], -weights[1]), dim=1)
            joined[2 * units : 3 * units] *= 2
            bias = None
            if len(weights) == 4:
                bias = weights[2] + weights[3]
                bias[2 * units : 3 * units] *= 2
            return cls(
                Multiplier.of(joined, bias, rows),
                Multiplier.of(torch.cat(weights[:2], dim=1).mT, None, rows),
                Multiplier.of(weights[1].detach().mT, None, rows),
            )


class _Direction(torch.autograd.Function):
    """(tap, inputs, hidden, cell, backwards, prepared, *weights) -> hidden states, cell states,
    hidden states before each step.

    `tap` has the gates' shape and no influence; its gradient is δ. Gradients that nobody asked
    for, such as the weights' sums when only δ is wanted, are not computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tap: Tensor,
        inputs: Tensor,
        hidden: Tensor,
        cell: Tensor,
        backwards: bool,
        prepared: _Prepared,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, size = inputs.shape
        # One slot more than steps: the state after the last step has no step to enter.
        slots = inputs.new_empty(steps + 1, batch, size + hidden.shape[1])
        entering, leaving = (slots[1:], slots[:-1]) if backwards else (slots[:-1], slots[1:])
        entering[..., :size] = inputs
        first = entering[-1 if backwards else 0]
        torch.neg(hidden, out=first[:, size:])
        minus_h = leaving[..., size:]
        doubled, squashed, gates = _scan(prepared.ahead, entering, minus_h, 2 * cell, backwards)
        states = slots[..., size:].neg()
        before, after = (states[1:], states[:-1]) if backwards else (states[:-1], states[1:])
        earlier = (doubled[1:], 2 * cell[None]) if backwards else (2 * cell[None], doubled[:-1])
        factors = _factors(gates, torch.cat(earlier).div_(2), after, squashed)
        ctx.backwards, ctx.prepared = backwards, prepared
        ctx.edges = [
            get_gradient_edge(tensor) if tensor.requires_grad else None
            for tensor in (tap, *weights)
        ]
        ctx.save_for_backward(inputs, before, *factors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(before)
        return after, doubled / 2, before

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, before, *factors = ctx.saved_tensors
        onward = ctx.needs_input_grad[1]
        delta, found, cell = _scan_back(
            ctx.prepared.back if onward else ctx.prepared.back_to_state,
            gradients[:2],
            tuple(factors),
            ctx.backwards,
        )
        tap, *wanted = (_is_wanted(edge) for edge in ctx.edges)
        rows = delta.flatten(0, 1)
        sums: list[Tensor | None] = [
            rows.mT @ left.flatten(0, 1) if want else None
            for left, want in zip((inputs, before), wanted[:2], strict=True)
        ]
        sums += [rows.sum(0) if want else None for want in wanted[2:]]
        size, units = inputs.shape[2], before.shape[2]
        hidden = found[-1 if ctx.backwards else 0][:, -units:]
        d_inputs = torch.stack([step[:, :size] for step in found]) if onward else None
        return delta if tap else None, d_inputs, hidden, cell, None, None, *sums


def _scan(
    multiply: Multiplier, entering: Tensor, leaving: Tensor, cell: Tensor, backwards: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run over time, from [x, -h] (T, B, I + H) with only the first -h there; -h of each step goes
    to `leaving`, which is where the next one finds it.

    Returns:
        C and σ(C) (T, B, H), gates (T, B, 4H) with s_g in place of g.
    """
    steps, batch, units = leaving.shape
    gates = leaving.new_empty(steps, batch, 4 * units)
    cells, squashed = (leaving.new_empty(steps, batch, units) for _ in range(2))
    views = (entering, gates, *gates.chunk(4, dim=2), cells, squashed, leaving)
    for x_h, gate, i, f, s_g, o, new_cell, s_c, minus_h in _in_order(views, backwards):
        torch.sigmoid(multiply(x_h), out=gate)
        torch.mul(f, cell, out=new_cell).addcmul_(i, s_g, value=4).sub_(i, alpha=2)
        cell = new_cell
        torch.addcmul(o, o, torch.sigmoid(cell, out=s_c), value=-2, out=minus_h)
    return cells, squashed, gates


def _factors(
    gates: Tensor, earlier: Tensor, outputs: Tensor, squashed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of δ, in the memory of the gates; of dh in dc; of dc a step earlier."""
    i, f, s_g, o = gates.chunk(4, dim=2)
    kept = f.clone()
    # o(1 - tanh²(c)) = o - h tanh(c) = o - h(2σ(C) - 1)
    through = (o + outputs).addcmul_(outputs, squashed, value=-2)
    torch.addcmul(outputs, outputs, o, value=-1, out=o)  # tanh(c) o(1 - o) = h - h o
    g = s_g.mul(2).sub_(1)
    torch.addcmul(i, i, g.square(), value=-1, out=s_g)  # i(1 - g²)
    torch.ops.aten.sigmoid_backward.grad_input(g, i, grad_input=i)  # g i(1 - i)
    torch.ops.aten.sigmoid_backward.grad_input(earlier, f, grad_input=f)  # c' f(1 - f)
    return gates, through, kept


def _scan_back(
    multiply: Multiplier,
    gradients: tuple[Tensor | None, ...],
    factors: tuple[Tensor, ...],
    backwards: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Back through time.

    Returns:
        δ (T, B, 4H); of each step, what goes back to its input and the state before it, the
        latter in the last H columns; the gradient of the cell state started from (B, H).
    """
    gates, through, kept = factors
    delta, units = torch.empty_like(gates), kept.shape[2]
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
    )
    found: list[Tensor] = []
    dc = kept.new_zeros(kept.shape[1:])
    for dh, d_cell, into_c, out_of_c, k_ifg, k_o, d_ifg, d_o, d_gates in _in_order(
        views, not backwards
    ):
        if found:
            dh = dh + found[-1][:, -units:]
        if d_cells is not None:
            dc += d_cell
        dc.addcmul_(dh, into_c)
        torch.mul(k_ifg, dc[:, None], out=d_ifg)
        torch.mul(k_o, dh, out=d_o)
        dc.mul_(out_of_c)
        found.append(multiply(d_gates))
    return delta, found if backwards else found[::-1], dc


def _cell_and_output(gates: Tensor) -> tuple[Tensor, Tensor]:
    """(T, B, 4H) -> the three gates behind the cell (T, B, 3, H), the output gate (T, B, H)."""
    by_gate = gates.view(*gates.shape[:2], 4, -1)
    return by_gate[:, :, :3], by_gate[:, :, 3]


def _in_order(views: Iterable[Tensor], backwards: bool) -> list[tuple[Tensor, ...]]:
    """Step by step, the entry of every view; from the last step if `backwards`."""
    steps = list(zip(*(view.unbind(0) for view in views), strict=True))
    return steps[::-1] if backwards else steps


def _is_wanted(edge: GradientEdge | None) -> bool:
    """Whether the running backward pass will use the gradient that arrives at `edge`."""
    return edge is not None and bool(torch._C._will_engine_execute_node(edge.node))
