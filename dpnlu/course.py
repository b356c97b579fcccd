"""The course of a forward pass: what was done with the examples, in the order it was done.

The place of an example in memory is known by counting: of n·B rows, the first n are the first
example's. Whether that is so is checked against automatic differentiation. What holds for one batch
holds for another that took the same course, unless rows were chosen by their values: picked out by
a mask, sorted, packed. Of these, nothing but a check of the batch itself can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

# Nodes that choose rows along `_saved_dim`; all others named here, along dimension 0 as well.
_CHOOSE_ALONG = frozenset(
    "Gather IndexSelect IndexAdd IndexCopy IndexFill IndexReduce Scatter ScatterAdd ScatterReduce "
    "Sort Topk".split()
)
_CHOOSE = frozenset("MaskedSelect MaskedScatter Take Put PackPaddedSequence SegmentReduce".split())
_INDEX = frozenset({"Index", "IndexPut"})
# Nodes that cut dimension 0 at places that a course must agree in, and what holds the places.
_CUT = {
    "Slice": ("_saved_start", "_saved_end", "_saved_step"),
    "Select": ("_saved_index",),
    "Split": ("_saved_split_size",),
    "SplitWithSizes": ("_saved_split_sizes",),
}


@dataclass(frozen=True)
class Course:
    """Equal for forward passes that did the same things in the same order.

    Attributes:
        steps: names of the nodes of the autograd graph, from the losses on, and where they cut the
            batch.
        chooses_rows: rows were chosen by their values, which equal names do not tell.
    """

    steps: tuple[str, ...]
    chooses_rows: bool


def course_of(losses: Tensor) -> Course:
    """Follow `losses` (B,) back through the autograd graph."""
    seen: set[Node] = set()
    waiting = [losses.grad_fn]
    steps: list[str] = []
    chooses_rows = False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        steps.append(_described(node))
        chooses_rows = chooses_rows or _chooses_rows(node)
        waiting.extend(following for following, _ in node.next_functions)
    return Course(tuple(steps), chooses_rows)


def _described(node: Any) -> str:
    name: str = node.name()
    places = _CUT.get(name.partition("Backward")[0], ())
    if not places or int(node._saved_dim) != 0:
        return name
    return f"{name} {[getattr(node, place) for place in places]}"


def _chooses_rows(node: Any) -> bool:
    """Whether the node may have put other examples, or other numbers of rows, into dimension 0."""
    kind = node.name().partition("Backward")[0]
    if kind in _CHOOSE_ALONG:
        return int(node._saved_dim) == 0 or len(node._input_metadata[0].shape) == 1
    if kind in _INDEX:
        first: Tensor | None = node._saved_indices[0]
        return first is not None and not _is_every_row(first, node)
    return kind in _CHOOSE


def _is_every_row(index: Tensor, node: Any) -> bool:
    """Whether an index into dimension 0 takes each row once, in order."""
    if index.dtype is torch.bool or index.dim() == 0:
        return False
    rows = index.shape[0]
    if node.name().startswith("IndexBackward") and rows != node._saved_self_sym_sizes[0]:
        return False
    inner = (1,) * (index.dim() - 1)
    return bool((index == torch.arange(rows, device=index.device).view(-1, *inner)).all())
