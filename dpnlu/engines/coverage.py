"""Whether the tape saw every use of a trainable parameter.

Every node of the graph of automatic differentiation that uses one must come from an operation that
the tape saw. No number is looked at, so that this is asked of every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.nodes import OF_A_PARAMETER
from dpnlu.gradients.signature import Edge
from dpnlu.gradients.trace import Trace


def check_seen(
    edges: Sequence[Edge],
    trace: Trace,
    computed_weights: Sequence[Tensor],
    names: Mapping[Tensor, str],
) -> None:
    """Every use of a trainable parameter, and of what was computed from some alone, was seen.

    Args:
        computed_weights: batch-independent tensors that were computed from parameters.
        names: of the trainable parameters.

    Raises:
        UnsupportedLayerError: one was not.
    """
    made = {tensor.grad_fn for tensor in computed_weights}
    unseen: list[tuple[Edge, str]] = []
    for edge in edges:
        if edge.name == "CheckpointFunctionBackward":
            raise UnsupportedLayerError(_REENTRANT)
        if edge.name == OF_A_PARAMETER:
            used = names.get(edge.node.variable)  # type: ignore[attr-defined]
        else:
            used = _computed_from(edge.node, names) if edge.node in made else None
        if used is not None and not _is_seen(edge.user, trace):
            unseen.append((edge, used))
    if unseen:
        _check_users(edges, unseen, trace)


def _check_users(edges: Sequence[Edge], unseen: Sequence[tuple[Edge, str]], trace: Trace) -> None:
    """What used parameters unseen must be a cast that autocast kept for later, and seen itself."""
    casts = {edge.user: used for edge, used in unseen if _is_cast(edge.user)}
    unseen = [(edge, used) for edge, used in unseen if edge.user not in casts]
    unseen += [(e, casts[e.node]) for e in edges if e.node in casts and not _is_seen(e.user, trace)]
    if not unseen:
        return
    edge, used = unseen[0]
    where = "" if edge.user is None else f" (by {edge.user.name()})"
    raise UnsupportedLayerError(
        f"Expected every use of a trainable parameter where it can be recorded, but {used} is used "
        f"elsewhere{where}: let private.stepper call the function that computes the losses, call "
        "modules instead of their forward, take torch.compile and torch.jit off, or freeze it by "
        "requires_grad_(False)."
    )


def _computed_from(node: Node, names: Mapping[Tensor, str]) -> str:
    """Says what a batch-independent tensor was computed from."""
    known, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        name = names.get(getattr(node, "variable", _NOBODY))
        if name is not None:
            return f"a tensor computed from {name}"
        new = {earlier for earlier, _ in node.next_functions if earlier is not None} - known
        known |= new
        waiting.extend(new)
    return "a tensor computed from parameters"


# Stands for the parameter of nodes that are of none.
_NOBODY = torch.empty(0)


def _is_cast(node: Node | None) -> bool:
    return node is not None and node.name() == "ToCopyBackward0"


_REENTRANT = (
    "Expected activation checkpointing by torch.utils.checkpoint with use_reentrant=False, got the "
    "reentrant kind, which hides its operations: pass use_reentrant=False."
)


def _is_seen(node: Node | None, trace: Trace) -> bool:
    return node is not None and node in trace.seen
