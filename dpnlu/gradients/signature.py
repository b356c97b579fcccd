"""The graph signature of a forward pass: what was done with the examples, in which order.

Which rows of a tensor belong to which example is found by counting: of n·B rows, the first n belong
to the first example. Whether this holds is checked against automatic differentiation. If it holds
for one batch, it holds for every other batch with the same signature, unless rows were chosen by
their values: picked out by a mask, sorted, packed. Then each batch must be checked, with one
exception: rows that were packed, and are unpacked in the same way, are back in their places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dpnlu.gradients.nodes import OF_A_PARAMETER

# Nodes that choose rows along `_saved_dim`. Those of the other sets choose along dimension 0, and
# perhaps others.
_CHOOSE_ALONG = frozenset(
    "Gather IndexSelect IndexAdd IndexCopy IndexFill IndexReduce Scatter ScatterAdd ScatterReduce "
    "Sort Topk".split()
)
_CHOOSE = frozenset("MaskedSelect MaskedScatter Take Put SegmentReduce".split())
_INDEX = frozenset({"Index", "IndexPut"})
# torch's packing, and ours; see `dpnlu.gradients.packing`.
_PACK_PADDED, _SPREAD, _SORT = "PackPaddedSequence", "SpreadRows", "SortStates"
_PACK = frozenset({_PACK_PADDED, "PackRows"})
_UNPACK = frozenset({"UnpackRows", _SPREAD})
# Nodes that cut or rotate dimension 0, and the attributes that say where: part of the signature.
_CUT = {
    "Slice": ("_saved_start", "_saved_end", "_saved_step"),
    "Select": ("_saved_index",),
    "Split": ("_saved_split_size",),
    "SplitWithSizes": ("_saved_split_sizes",),
    "Roll": ("_saved_dims", "_saved_shifts"),
    "AsStrided": ("_saved_storage_offset",),
}
# Other attributes that are part of the signature: dimensions, and numbers written in the program.
_DIMENSIONS = ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1", "_saved_keepdim")
_NUMBERS = {
    "Add": ("_saved_alpha",),
    "Addcmul": ("_saved_value",),
    "Div": ("_saved_other",),
    "Lerp": ("_saved_weight",),
    "Mul": ("_saved_other", "_saved_self"),
    "Pow": ("_saved_exponent",),
    "Rsub": ("_saved_alpha",),
    "Sub": ("_saved_alpha",),
}


@dataclass(frozen=True)
class Signature:
    """Equal for forward passes that did the same operations in the same order.

    Attributes:
        steps: the autograd graph, from the losses on. Each node by its name, where it cuts the
            batch, the dimensions along which it acts, and whether the numbers that it holds are 0,
            1 or others; each edge by the node and the number of the output that it leads to.
        chooses_rows: rows were chosen by their values, in ways that `steps` does not show.
        is_doubtful: rows may have been chosen, as a dimension has as many entries as there are
            examples. A batch of another size can show that they were not.
    """

    steps: tuple[str, ...]
    chooses_rows: bool
    is_doubtful: bool = field(default=False, compare=False)

    @property
    def may_choose_rows(self) -> bool:
        """Whether rows were, or perhaps were, chosen by their values."""
        return self.chooses_rows or self.is_doubtful


class Edge(NamedTuple):
    """An edge of the autograd graph of some losses.

    Attributes:
        node: made the value.
        name: of the node.
        output: number of the output of `node` that the value is.
        user: the node that used the value; None: the value is the losses.
        is_new: whether this is the first edge that leads to `node`.
    """

    node: Node
    name: str
    output: int
    user: Node | None
    is_new: bool


def walk(losses: Tensor) -> Iterator[Edge]:
    """Follow `losses` (B,) back through the autograd graph, always in the same order."""
    known: set[Node] = set()
    first = losses.grad_fn
    waiting: list[tuple[Node, int, Node | None]] = [] if first is None else [(first, 0, None)]
    while waiting:
        node, output, user = waiting.pop()
        is_new = node not in known
        yield Edge(node, node.name(), output, user, is_new)
        if is_new:
            known.add(node)
            for earlier, place in node.next_functions:
                if earlier is not None:
                    waiting.append((earlier, place, node))


def signature_of(
    edges: Sequence[Edge],
    batch: int,
    is_batch_independent: Callable[[Node], bool] = lambda node: node.name() == OF_A_PARAMETER,
    *,
    may_unpack: bool = True,
) -> Signature:
    """The signature of a graph.

    Args:
        batch: number of examples.
        is_batch_independent: whether the output of a node is known to be batch-independent.
        may_unpack: whether to look at tensors that nodes keep. Under activation checkpointing
            that would compute them again. If not, nodes that may choose rows count as choosing.
    """
    places: dict[Node, int] = {}
    steps: list[str] = []
    chooses = False, False
    for edge in edges:
        node = edge.node
        traits = _traits(type(node), edge.name)
        if (
            traits.may_choose
            and not chooses[0]
            and not _is_on_independent(node, is_batch_independent)
        ):
            found = _chooses_rows(node, batch) if may_unpack else (True, False)
            if any(found) and not (may_unpack and _keeps_places(node, edge.user)):
                chooses = chooses[0] or found[0], chooses[1] or found[1]
        if edge.is_new:
            places[node] = len(places)
            described = _described(node, edge.name, traits, batch, may_unpack)
            steps.append(f"{edge.output} of {described}")
        else:
            steps.append(f"{edge.output} of {places[node]}")
    return Signature(tuple(steps), *chooses)


@dataclass(frozen=True)
class _Traits:
    """What all nodes of a kind have in common.

    Attributes:
        may_choose: whether they may choose rows.
        cuts, dimensions, numbers: attributes that are part of the signature.
        has_dimension: whether they act along one.
    """

    may_choose: bool
    cuts: tuple[str, ...]
    dimensions: tuple[str, ...]
    numbers: tuple[str, ...]
    has_dimension: bool


@functools.cache
def _traits(of_node: Any, name: str) -> _Traits:
    """Those of nodes of this type and name."""
    kind = _kind_of(name)
    return _Traits(
        may_choose=kind in _MAY_CHOOSE,
        cuts=_CUT.get(kind, ()),
        dimensions=tuple(held for held in _DIMENSIONS if hasattr(of_node, held)),
        numbers=_NUMBERS.get(kind, ()),
        has_dimension=hasattr(of_node, "_saved_dim"),
    )


def _described(node: Any, name: str, traits: _Traits, batch: int, may_unpack: bool) -> str:
    if traits.cuts and not (traits.has_dimension and not any(_acts_on_examples(node, batch))):
        name = f"{name} {[getattr(node, place) for place in traits.cuts]}"
    if traits.dimensions:
        name = f"{name} {[getattr(node, held) for held in traits.dimensions]}"
    if traits.numbers and may_unpack:
        name = f"{name} {[_number(getattr(node, held, None)) for held in traits.numbers]}"
    return name


def _number(held: Any) -> str:
    """Whether a number that is written in the program is 0, 1 or another; "" for tensors."""
    if isinstance(held, Tensor):
        is_number = held.dim() == 0 and held.device.type == "cpu" and not held.requires_grad
        # While a program is traced tensors have no values; numbers are part of the program.
        is_traced = torch._C._len_torch_dispatch_stack() > 0
        held = held.item() if is_number and not is_traced else None
    if isinstance(held, (int, float)):
        return "01"[int(held)] if held in (0, 1) else "other"
    return ""


def _kind(node: Node) -> str:
    return _kind_of(node.name())


def _kind_of(name: str) -> str:
    return name.partition("Backward")[0]


def _dimension(node: Any) -> int:
    """The dimension along which the node acts, counted from the first.

    Torch keeps a negative one as it was given, in 64 bits without a sign.
    """
    dimension = int(node._saved_dim)
    if dimension < 2**63:
        return dimension
    return dimension - 2**64 + len(_sizes(node))


def _sizes(node: Any) -> tuple[int, ...]:
    """The shape that the node acts on. Nodes that do not keep it keep the tensor, or return the
    same shape."""
    if hasattr(node, "_saved_self_sym_sizes"):
        return tuple(node._saved_self_sym_sizes)
    kept = getattr(node, "_saved_self", None)
    return tuple((node._input_metadata[0] if kept is None else kept).shape)


def _acts_on_examples(node: Any, batch: int) -> tuple[bool, bool]:
    """Whether the dimension along which the node acts holds examples, and whether it may do so."""
    dimension = _dimension(node)
    return dimension == 0, _may_hold_examples(dimension, _sizes(node)[dimension], batch)


def _may_hold_examples(dimension: int, size: int, batch: int) -> bool:
    """Whether a dimension may hold examples. In recurrent networks and their outputs, dimension 1
    does; later ones do so only if a model moved the examples there."""
    return batch > 1 and (size % batch == 0 if dimension <= 1 else size == batch)


_MAY_CHOOSE = _CHOOSE_ALONG | _CHOOSE | _INDEX | _PACK | _UNPACK | frozenset({_SORT, "Embedding"})


def _is_on_independent(node: Node, is_batch_independent: Callable[[Node], bool]) -> bool:
    """Whether a node acts on batch-independent tensors alone, so that it chooses no examples."""
    return all(
        is_batch_independent(earlier) for earlier, _ in node.next_functions if earlier is not None
    )


def _chooses_rows(node: Any, batch: int) -> tuple[bool, bool]:
    """Whether the node put other examples, or another number of rows, into the dimension that holds
    them, and whether it may have done so."""
    kind = _kind(node)
    if kind in _CHOOSE_ALONG:
        return _acts_on_examples(node, batch)
    if kind in _INDEX:
        first, *others = node._saved_indices
        if first is not None:
            return not _is_every_row(first, node), False
        return False, any(
            index is not None and _may_hold_examples(dimension, size, batch)
            for dimension, (index, size) in enumerate(
                zip(others, _sizes(node)[1:], strict=False), start=1
            )
        )
    return True, False


def _keeps_places(node: Any, user: Any) -> bool:
    """Whether `node` moved rows for packing or unpacking, and `user` is part of moving all of them
    back."""
    kind = _kind(node)
    if kind == "IndexSelect":  # the order of packing is checked at the unpacking node
        return (user is not None and _kind(user) == _PACK_PADDED) or _restores(node)
    if kind == _SORT:
        return _is_restored(node, user)
    if kind in _PACK:  # checked at the unpacking node as well
        return user is not None and _kind(user) in _UNPACK
    if kind == _SPREAD and not _is_restored(node, user):
        return False
    return kind in _UNPACK and _unpacks_what_was_packed(node)


def _is_restored(node: Any, user: Any) -> bool:
    """Whether `user` brings the output of `node` from packed order into the batch's own."""
    return bool(node.packing.place is None or _restores(user))


def _restores(node: Any) -> bool:
    """Whether the node brings sequences or states from packed order into the batch's own."""
    if node is None or _kind(node) != "IndexSelect":
        return False
    taken: Any = node.next_functions[0][0]
    if taken is None or _kind(taken) not in (_SPREAD, _SORT):
        return False
    by_example = _kind(taken) == _SPREAD and taken.batch_first
    if _dimension(node) != (0 if by_example else 1):
        return False
    return bool(taken.packing.is_undone_by(node._saved_index))


def _unpacks_what_was_packed(node: Any) -> bool:
    """Whether the rows are unpacked right after packing, into the sequences that they were."""
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
    if _dimension(sorting) != (0 if packed._saved_batch_first else 1):
        return False
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
