"""The course of a forward pass: what was done with the examples, in the order it was done.

The place of an example in memory is known by counting: of n·B rows, the first n are the first
example's. Whether that is so is checked against automatic differentiation. What holds for one batch
holds for another that took the same course, unless rows were chosen by their values: picked out by
a mask, sorted, packed. Of these, nothing but a check of the batch itself can tell, except that what
was packed and is unpacked in the same way has lost no row its place.
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
_CHOOSE = frozenset("MaskedSelect MaskedScatter Take Put SegmentReduce".split())
_INDEX = frozenset({"Index", "IndexPut"})
# torch's packing, and ours; see `dpnlu.packing`.
_PACK_PADDED, _SPREAD = "PackPaddedSequence", "SpreadRows"
_PACK = frozenset({_PACK_PADDED, "PackRows"})
_UNPACK = frozenset({"UnpackRows", _SPREAD})
_OF_A_PARAMETER = "torch::autograd::AccumulateGrad"
# Nodes that cut or turn dimension 0 at places that a course must agree in, and what holds them.
_CUT = {
    "Slice": ("_saved_start", "_saved_end", "_saved_step"),
    "Select": ("_saved_index",),
    "Split": ("_saved_split_size",),
    "SplitWithSizes": ("_saved_split_sizes",),
    "Roll": ("_saved_dims", "_saved_shifts"),
    "AsStrided": ("_saved_storage_offset",),
}


@dataclass(frozen=True)
class Course:
    """Equal for forward passes that did the same things in the same order.

    Attributes:
        steps: the autograd graph, from the losses on: its nodes by name and by where they cut the
            batch, and which output of which node each of them used.
        chooses_rows: rows were chosen by their values, which equal names do not tell.
    """

    steps: tuple[str, ...]
    chooses_rows: bool


def course_of(losses: Tensor) -> Course:
    """Follow `losses` (B,) back through the autograd graph."""
    places: dict[Node, int] = {}
    waiting: list[tuple[Node | None, int, Node | None]] = [(losses.grad_fn, 0, None)]
    steps: list[str] = []
    chooses_rows = False
    while waiting:
        node, output, user = waiting.pop()
        if node is None:
            continue
        chooses_rows = chooses_rows or (_chooses_rows(node) and not _keeps_places(node, user))
        if node in places:
            steps.append(f"{output} of {places[node]}")
            continue
        places[node] = len(places)
        steps.append(f"{output} of {_described(node)}")
        waiting.extend((earlier, output, node) for earlier, output in node.next_functions)
    return Course(tuple(steps), chooses_rows)


def _described(node: Any) -> str:
    name: str = node.name()
    places = _CUT.get(_kind(node), ())
    if not places or (hasattr(node, "_saved_dim") and _dimension(node) != 0):
        return name
    return f"{name} {[getattr(node, place) for place in places]}"


def _kind(node: Node) -> str:
    kind: str = node.name().partition("Backward")[0]
    return kind


def _dimension(node: Any) -> int:
    """The dimension along which the node acts, counted from the first.

    Torch keeps a negative one as it was given, in 64 bits without a sign.
    """
    dimension = int(node._saved_dim)
    if dimension < 2**63:
        return dimension
    # Most nodes keep the number of dimensions; those that do not have noted their input's.
    sizes = getattr(node, "_saved_self_sym_sizes", node._input_metadata[0].shape)
    return dimension - 2**64 + len(sizes)


def _chooses_rows(node: Any) -> bool:
    """Whether the node may have put other examples, or other numbers of rows, into dimension 0."""
    kind = _kind(node)
    if kind in _CHOOSE_ALONG:
        return _dimension(node) == 0
    if kind in _INDEX:
        first: Tensor | None = node._saved_indices[0]
        return first is not None and not _is_every_row(first, node)
    if kind == "Embedding":  # of a table that is no parameter, perhaps made from the examples
        return bool(node.next_functions[0][0].name() != _OF_A_PARAMETER)
    return kind in _CHOOSE or kind in _PACK or kind in _UNPACK


def _keeps_places(node: Any, user: Any) -> bool:
    """Whether rows that `node` moved for packing or unpacking are all moved back, on the way from
    it to `user` or before."""
    kind = _kind(node)
    if kind == "IndexSelect":
        return (user is not None and _kind(user) == _PACK_PADDED) or _restores(node)
    if kind in _PACK:
        return user is not None and _kind(user) in _UNPACK
    if kind in _UNPACK:
        return _unpacks_what_was_packed(node) and (
            kind != _SPREAD or node.packing.place is None or _restores(user)
        )
    return False


def _restores(node: Any) -> bool:
    """Whether the node puts sequences in packed order, spread out, into the batch's own."""
    if node is None or _kind(node) != "IndexSelect":
        return False
    spread: Any = node.next_functions[0][0]
    if spread is None or _kind(spread) != _SPREAD:
        return False
    if _dimension(node) != (0 if spread.batch_first else 1):
        return False
    return bool(spread.packing.is_undone_by(node._saved_index))


def _unpacks_what_was_packed(node: Any) -> bool:
    """Whether the rows come as they were packed, and are taken for the sequences they are."""
    packed: Any = node.next_functions[0][0]
    if packed is None or _kind(packed) not in _PACK:
        return False
    if _kind(packed) != _PACK_PADDED:
        return bool(packed.packing.equals(node.packing))
    if not torch.equal(packed._saved_result1, node.packing.counts):
        return False
    sorting: Any = packed.next_functions[0][0]
    if sorting is None or _kind(sorting) != "IndexSelect":
        return node.packing.place is None
    return bool(node.packing.is_order(sorting._saved_index))


def _is_every_row(index: Tensor, node: Any) -> bool:
    """Whether an index into dimension 0 takes each row once, in order."""
    if index.dtype is torch.bool or index.dim() == 0:
        return False
    rows = index.shape[0]
    if node.name().startswith("IndexBackward") and rows != node._saved_self_sym_sizes[0]:
        return False
    inner = (1,) * (index.dim() - 1)
    return bool((index == torch.arange(rows, device=index.device).view(-1, *inner)).all())
