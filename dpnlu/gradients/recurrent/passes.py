"""What every kernel of a recurrent layer needs beside its scan over time.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units. Steps of the second direction
are counted as it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpnlu.gradients.kernels import Multiplier

Reverse = Callable[[Tensor], Tensor]
"""Brings (T, B, …) into the order in which the second direction reads it; its own inverse."""


def remember(
    ctx: Any, reverse: Reverse, prepared: Any, inputs: Tensor, of_gates: Sequence[Tensor]
) -> None:
    """Keep for the way back what is no result of the layer."""
    ctx.reverse, ctx.prepared, ctx.kind = reverse, prepared, inputs.dtype
    ctx.edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in of_gates]
    ctx.set_materialize_grads(False)


def weight_sums(
    ctx: Any, deltas: tuple[Tensor, ...], inputs: Tensor, before: Tensor
) -> list[Tensor | None]:
    """The gradients of the taps and of the weights; None what this pass does not use.

    Args:
        deltas: of each tap; the first is that of the products with the inputs, the last that of
            those with the states.
    """
    wanted = [_is_wanted(edge) for edge in ctx.edges]
    of_taps, of_weights = wanted[: len(deltas)], wanted[len(deltas) :]
    found = [delta if want else None for delta, want in zip(deltas, of_taps, strict=True)]
    for place, want in enumerate(_in_groups(of_weights, len(before))):
        rows = [delta[place].flatten(0, 1) for delta in (deltas[0], deltas[-1])]
        read = (ctx.reverse(inputs) if place else inputs).to(before.dtype)
        found += [
            right.mT @ left.flatten(0, 1) if is_wanted else None
            for right, left, is_wanted in zip(rows, (read, before[place]), want[:2], strict=True)
        ]
        found += [
            right.sum(0) if is_wanted else None
            for right, is_wanted in zip(rows, want[2:], strict=False)
        ]
    return found


def gradient_of_inputs(ctx: Any, d_read: Tensor) -> Tensor:
    """The gradient of the inputs, from that of what each direction read (D, T, B, I)."""
    one, *others = d_read
    d_inputs: Tensor = one + ctx.reverse(others[0]) if others else one.contiguous()
    return d_inputs.to(dtype=ctx.kind)


def begun(first: Tensor, steps: int, like: Tensor) -> Tensor:
    """(D, T + 1, B, H) with the state before the first step (D, B, H) in its place."""
    whole = like.new_empty(len(first), steps + 1, *first.shape[1:])
    whole[:, 0] = first
    return whole


def products_of(multiply: Multiplier, inputs: Tensor, reverse: Reverse, *, like: Tensor) -> Tensor:
    """(T, B, I) -> (D, T, B, G H), what each direction makes of what it reads, of the type and
    shape of `like`."""
    read = [inputs, reverse(inputs)][: len(like)]
    rows = torch.stack([one.to(like.dtype) for one in read])
    return product(multiply, rows)


def product(multiply: Multiplier, rows: Tensor) -> Tensor:
    """(D, T, B, n) -> (D, T, B, m)."""
    found = rows.new_empty(*rows.shape[:3], multiply.outputs)
    multiply(rows.flatten(1, 2), out=found.flatten(1, 2))
    return found


def joined(states: Tensor, reverse: Reverse) -> Tensor:
    """(D, T, B, H) -> (T, B, D H), in the order of the input."""
    if len(states) == 1:
        return states[0]
    return torch.cat((states[0], reverse(states[1])), dim=2)


def apart(
    gradient: Tensor | None, directions: int, reverse: Reverse, like: Tensor
) -> Tensor | None:
    """The inverse of `joined`."""
    if gradient is None:
        return None
    gradient = gradient.to(like.dtype)
    if directions == 1:
        return gradient[None]
    one, other = gradient.chunk(2, dim=2)
    return torch.stack((one, reverse(other)))


def _in_groups(values: list[bool], count: int) -> list[list[bool]]:
    size = len(values) // count
    return [values[start : start + size] for start in range(0, len(values), size)]


def _is_wanted(edge: GradientEdge | None) -> bool:
    """Whether the running backward pass will use the gradient that arrives at `edge`."""
    return edge is not None and bool(torch._C._will_engine_execute_node(edge.node))
