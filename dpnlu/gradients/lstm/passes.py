"""What every kernel of an LSTM layer needs beside its scan over time.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units. Steps of the second direction
are counted as it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Reverse = Callable[[Tensor], Tensor]
"""Brings (T, B, …) into the order in which the second direction reads it; its own inverse."""


def remember(
    ctx: Any, reverse: Reverse, prepared: Any, inputs: Tensor, of_gates: Sequence[Tensor]
) -> None:
    """Keep for the way back what is no result of the layer."""
    ctx.reverse, ctx.prepared, ctx.kind = reverse, prepared, inputs.dtype
    ctx.edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in of_gates]
    ctx.set_materialize_grads(False)


def weight_sums(ctx: Any, delta: Tensor, inputs: Tensor, before: Tensor) -> list[Tensor | None]:
    """δ for the tap, and the gradients of the weights; None what this pass does not use."""
    tap, *wanted = (_is_wanted(edge) for edge in ctx.edges)
    found: list[Tensor | None] = [delta if tap else None]
    for place, want in enumerate(_in_groups(wanted, len(delta))):
        rows = delta[place].flatten(0, 1)
        read = (ctx.reverse(inputs) if place else inputs).to(rows.dtype)
        found += [
            rows.mT @ left.flatten(0, 1) if is_wanted else None
            for left, is_wanted in zip((read, before[place]), want[:2], strict=True)
        ]
        found += [rows.sum(0) if is_wanted else None for is_wanted in want[2:]]
    return found


def gradient_of_inputs(ctx: Any, d_read: Tensor) -> Tensor:
    """The gradient of the inputs, from that of what each direction read (D, T, B, I)."""
    one, *others = d_read
    d_inputs: Tensor = one + ctx.reverse(others[0]) if others else one.contiguous()
    return d_inputs.to(dtype=ctx.kind)


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
