"""What the tape needs to know of torch's operations.

What it is told, `Operations`, is filled in by `dpnlu.gradients.rules`: how weights act in each
operation. What it knows by itself are sets of operations that concern values, shapes and copies,
and functions that find the tensors in their arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.gradients.records import GradientRule


def all_but_last(dims: int) -> range:
    """Dimensions that may hold the examples where the last holds features."""
    return range(max(1, dims - 1))


def first_alone(dims: int) -> range:
    """Dimensions that may hold the examples where all others hold channels and positions."""
    return range(1)


@dataclass(frozen=True)
class LayerRule:
    """How an operation that applies weights to a batched input is recorded.

    Attributes:
        gradient_rule: the operation's arguments -> the gradient rule of its output.
        input: position of the batched argument.
        dims: number of dimensions of the output -> those that may hold the examples.
    """

    gradient_rule: Callable[..., GradientRule]
    input: int = 0
    dims: Callable[[int], range] = all_but_last


@dataclass(frozen=True)
class Operations:
    """What the tape knows about torch's operations, keyed by function.

    Attributes:
        rules: operations that apply weights to the examples.
        rewrites: operations that are computed in another way, of pieces that are recorded. A
            rewrite takes the recorder and the operation's arguments; where it does not apply it
            returns NotImplemented.
        rearrangements: operations without weights that are computed in another way. They take the
            operation's arguments alone.
        broadcasting: operations that align their arguments by the last dimension and expand those
            whose dimension 0 is missing or of size 1.
        row_wise: operations that keep the entries of dimension 0 apart, if all arguments have it.
        fallback: (function, args, kwargs, batched arguments, arguments that are batch-independent
            and require gradients) -> gradient rule, for all other operations.
    """

    rules: Mapping[Any, LayerRule]
    rewrites: Mapping[Any, Callable[..., Any]]
    rearrangements: Mapping[Any, Callable[..., Any]]
    broadcasting: frozenset[Any]
    row_wise: frozenset[Any]
    fallback: Callable[..., GradientRule]


# Properties of a tensor whose reading computes no tensor.
_PROPERTIES = (
    "shape dtype device ndim requires_grad is_leaf grad_fn layout is_cuda is_nested is_sparse "
    "is_quantized is_mps is_meta"
)
# Operations that compute no tensor.
INSPECTIONS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.stride,
        Tensor.storage_offset,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.get_device,
        Tensor.__len__,
        torch.is_tensor,
        torch.is_floating_point,
        torch.numel,
    }
)
# Operations to which only shape, type and device of the first argument matter.
TAKE_NO_VALUE = frozenset(
    {
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.full_like,
        torch.rand_like,
        torch.randn_like,
        torch.randint_like,
        Tensor.new_zeros,
        Tensor.new_ones,
        Tensor.new_empty,
        Tensor.new_full,
        Tensor.new_tensor,
    }
)
# Operations to which only shape, type and device of all other arguments matter.
TAKE_FIRST_VALUE = frozenset(
    {
        Tensor.to,
        Tensor.type_as,
        Tensor.expand_as,
        Tensor.view_as,
        Tensor.reshape_as,
    }
)
# Operations that permute the entries of a tensor; where dimension 0 keeps its place, of each row.
PERMUTATIONS = frozenset(
    {
        Tensor.transpose,
        torch.transpose,
        *(getattr(Tensor, name).__get__ for name in ("mT",)),
        Tensor.permute,
        torch.permute,
        Tensor.contiguous,
        Tensor.to,
        Tensor.clone,
    }
)
# Operations that copy a tensor, perhaps once for each example.
COPIES = frozenset(
    {
        Tensor.expand,
        Tensor.expand_as,
        Tensor.repeat,
        Tensor.broadcast_to,
        torch.broadcast_to,
        Tensor.tile,
        torch.tile,
    }
)


def with_numbers(index: Any) -> Any:
    """The index with tensors without dimensions as Python numbers.

    Such a tensor picks the same entry for all examples, even if it was computed from the batch.
    """
    if isinstance(index, tuple):
        return tuple(with_numbers(each) for each in index)
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        return int(index)
    return index


def values_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose values the output of an operation depends on."""
    if func in TAKE_NO_VALUE:
        args = args[1:]
    elif func in TAKE_FIRST_VALUE:
        return tensors_in(args[:1])
    return tensors_in((args, kwargs) if kwargs else args)


@functools.cache
def writes_in_place(func: Any) -> bool:
    """Whether an operation changes its first argument."""
    name = getattr(func, "__name__", "")
    is_operator = name in ("__setitem__", "__set__", *(f"__i{kind}__" for kind in _IN_PLACE))
    return is_operator or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if not isinstance(tree, (tuple, list)):
        return []
    found = []
    for branch in tree:
        if isinstance(branch, Tensor):  # the usual case, in the path of every operation
            found.append(branch)
        elif isinstance(branch, (tuple, list, dict)):
            found += tensors_in(branch)
    return found


def tensors_held(value: Any, depth: int = 6) -> list[Tensor]:
    """The tensors that a value holds in containers and attributes of any kind, in order."""
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, nn.Module, type)):
        return []
    return [tensor for held in _held_by(value) for tensor in tensors_held(held, depth - 1)]


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list, set, frozenset)):
        return value
    if is_dataclass(value):
        return [getattr(value, field.name, None) for field in fields(value)]
    return list(getattr(value, "__dict__", {}).values())


def replaced(tree: Any, stand_ins: Mapping[int, Tensor | None]) -> Any:
    """The same nested structure with tensors replaced, by their id."""
    if isinstance(tree, Tensor):
        return stand_ins.get(id(tree), tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(replaced(branch, stand_ins) for branch in tree)
    if isinstance(tree, dict):
        return {key: replaced(branch, stand_ins) for key, branch in tree.items()}
    return tree
