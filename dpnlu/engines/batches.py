"""Batches of any kind, as the tensors they hold, and with some of their examples exchanged."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

# In how many ways examples are looked for in tensors that may hold them in several dimensions.
_WAYS = 8


@dataclass
class Places:
    """Where the tensors of batches hold the examples: in dimensions that had their number in every
    batch so far.

    Attributes:
        dims: of each tensor of a batch, in order.
        counts: numbers of examples that were seen.
    """

    dims: list[list[int]] = field(default_factory=list)
    counts: set[int] = field(default_factory=set)

    def learn(self, batch: Any, count: int) -> None:
        """See a batch of so many examples."""
        found = [
            [dim for dim, size in enumerate(leaf.shape) if size == count]
            for leaf in leaves_of(batch)
        ]
        if self.counts and len(self.dims) == len(found):
            found = [
                [dim for dim in now if dim in before]
                for now, before in zip(found, self.dims, strict=True)
            ]
        self.dims = found
        self.counts.add(count)

    @property
    def may_be_chance(self) -> bool:
        """Whether sizes may agree by chance: no batch of another number of examples was seen."""
        return len(self.counts) < 2

    def ways(self) -> Iterator[tuple[int | None, ...]]:
        """How the examples may lie in the tensors of a batch, the likeliest way first."""
        choices: list[list[int] | list[None]] = [dims or [None] for dims in self.dims]
        if any(self.dims):
            yield from itertools.islice(itertools.product(*choices), _WAYS)


def by_example(outputs: Any, count: int) -> list[Tensor]:
    """What `outputs` hold of each example: tensors (B, …)."""
    found = []
    for leaf in leaves_of(outputs):
        dim = next((dim for dim, size in enumerate(leaf.shape) if size == count), None)
        if dim is not None:
            found.append(leaf.detach().movedim(dim, 0))
    return found


def exchanged(batch: Any, source: Tensor, dims: Sequence[int | None]) -> Any:
    """The batch with example `source[i]` in place i.

    Args:
        dims: of each tensor, in the order of `leaves_of`, the dimension that holds the examples;
            None: none does.
    """
    remaining = iter(dims)

    def exchange(leaf: Tensor) -> Tensor:
        dim = next(remaining)
        if dim is None:
            return leaf
        return _laid_out_as(leaf, leaf.detach().index_select(dim, source.to(leaf.device)))

    return _mapped(batch, exchange)


def _laid_out_as(leaf: Tensor, values: Tensor) -> Tensor:
    """The values as they would lie in memory in place of `leaf`, so that the same kernels run."""
    if leaf.layout is not torch.strided or leaf.is_contiguous() or 0 in leaf.stride():
        return values
    place = torch.empty_strided(
        leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device, pin_memory=False
    )
    return place.copy_(values)


def detached(batch: Any) -> Any:
    """The batch with tensors that have no past, and are differentiated as they were."""
    return _mapped(batch, lambda leaf: leaf.detach().requires_grad_(leaf.requires_grad))


def leaves_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    _mapped(batch, note)
    return found


def _mapped(value: Any, function: Callable[[Tensor], Tensor], depth: int = 5) -> Any:
    """The same nesting of containers with every tensor replaced; packed sequences are unpacked
    for it."""
    if isinstance(value, Tensor):
        return function(value)
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, nn.Module, type)):
        return value
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        padded, lengths = function(padded), function(lengths)
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    if isinstance(value, Mapping):
        held = {key: _mapped(branch, function, depth - 1) for key, branch in value.items()}
        return _refilled(value, held)
    if isinstance(value, (tuple, list)):
        branches = [_mapped(branch, function, depth - 1) for branch in value]
        return type(value)(*branches) if hasattr(value, "_fields") else type(value)(branches)
    if callable(value) or not (hasattr(value, "__dict__") or is_dataclass(value)):
        return value
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))
    changed = copy.copy(value)
    for name in names:
        branch = _mapped(getattr(value, name), function, depth - 1)
        object.__setattr__(changed, name, branch)
    return changed


def _refilled(value: Mapping[Any, Any], held: dict[Any, Any]) -> Any:
    """A mapping of the same kind with other values."""
    if type(value) is dict or not isinstance(value, MutableMapping):
        return held
    changed = copy.copy(value)
    for key, branch in held.items():
        changed[key] = branch
    return changed
