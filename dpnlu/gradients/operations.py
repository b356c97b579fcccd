"""What the tape is told about torch's operations, and what it finds out about them by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.gradients.trace import Finish


def all_but_last(dims: int) -> range:
    """Dimensions that may hold the examples where the last holds features."""
    return range(max(1, dims - 1))


def first_alone(dims: int) -> range:
    """Where all others hold channels and positions."""
    return range(1)


@dataclass(frozen=True)
class Rule:
    """How an operation that applies weights to a batched input is recorded.

    Attributes:
        finish: has the operation's signature; returns the `Finish` of its output.
        input: position of the batched argument.
        dims: the dimensions of its output, given by their number, that may hold the examples.
    """

    finish: Callable[..., Finish]
    input: int = 0
    dims: Callable[[int], range] = all_but_last


@dataclass(frozen=True)
class Operations:
    """What the tape knows about torch's operations, keyed by function.

    Attributes:
        rules: operations that apply weights to the examples.
        rewrites: computed anew, out of recorded pieces. A rewrite has the operation's signature,
            after the tape as first argument; it may return NotImplemented.
        rearrangements: likewise, of operations that no weights take part in.
        broadcasting: arguments are aligned by their last dimension, and one whose dimension 0 is
            missing or of size 1 may as well be expanded to that of the others.
        row_wise: keep the entries of dimension 0 apart, if all arguments have one.
        fallback: (function, args, kwargs, batched, learned) -> `Finish`, for all others.
    """

    rules: Mapping[Any, Rule]
    rewrites: Mapping[Any, Callable[..., Any]]
    rearrangements: Mapping[Any, Callable[..., Any]]
    broadcasting: frozenset[Any]
    row_wise: frozenset[Any]
    fallback: Callable[..., Finish]


# They say something about a tensor, and make none.
_PROPERTIES = (
    "shape dtype device ndim requires_grad is_leaf grad_fn layout is_cuda is_nested is_sparse "
    "is_quantized is_mps is_meta"
)
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
# Of their first argument they take the shape, type and device alone.
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
# Of all other arguments they take the shape, type and device alone.
TAKE_FIRST_VALUE = frozenset(
    {
        Tensor.to,
        Tensor.type_as,
        Tensor.expand_as,
        Tensor.view_as,
        Tensor.reshape_as,
    }
)
# They turn or keep the entries of a tensor; with dimension 0 left where it is, those of each row.
TURNS = frozenset(
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
# They copy a tensor, perhaps once for each example.
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
    """An index in which single ids, tensors without dimensions, are numbers: what it picks is one
    entry for all examples, whoever chose it."""
    if isinstance(index, tuple):
        return tuple(with_numbers(each) for each in index)
    if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        return int(index)
    return index


def values_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose values go into what an operation makes."""
    if func in TAKE_NO_VALUE:
        args = args[1:]
    elif func in TAKE_FIRST_VALUE:
        return tensors_in(args[:1])
    return tensors_in((args, kwargs) if kwargs else args)


@functools.cache
def writes_in_place(func: Any) -> bool:
    """Whether the first argument of an operation is changed by it."""
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
        if isinstance(branch, Tensor):  # most of them are; every operation passes here
            found.append(branch)
        elif isinstance(branch, (tuple, list, dict)):
            found += tensors_in(branch)
    return found


def tensors_held(value: Any, depth: int = 6) -> list[Tensor]:
    """The tensors that a value holds in containers and attributes of any kind, in their order."""
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
    """The same nesting with some tensors, known by id, exchanged."""
    if isinstance(tree, Tensor):
        return stand_ins.get(id(tree), tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(replaced(branch, stand_ins) for branch in tree)
    if isinstance(tree, dict):
        return {key: replaced(branch, stand_ins) for key, branch in tree.items()}
    return tree
