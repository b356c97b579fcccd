"""Where the examples lie in the output of an operation.

Usually they lie along dimension 0, one after the other. In a time-first layer they lie along
dimension 1; in a model that computes two views of a batch at once, each example may have rows in
both halves; rows that were picked by a mask, sorted or routed lie in an order that depends on their
values.

Shapes: B examples, k entries of each along the dimension that holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which entries of one dimension belong to which of B examples.

    Attributes:
        batch: B.
        dim: the dimension, >= 0.
        interleaved: one entry of each example comes after the other, then the next entry of each;
            if not, all entries of one example come before those of the next.
        owners: if given, says it instead: the example of each entry, (n,), -1 for none.
    """

    batch: int
    dim: int = 0
    interleaved: bool = False
    owners: Tensor | None = None

    def apart(self, values: Tensor, dim: int | None = None, *, fill: int = 0) -> Tensor:
        """Values with the examples along one dimension -> (B, k, …), the others in order.

        Args:
            dim: that holds the examples; None: the layout's.
            fill: stands where an example has fewer than k entries.
        """
        dim = self.dim if dim is None else dim
        values = values.movedim(dim, 0) if dim else values
        if self.owners is not None:
            return self._gathered(values, self.owners, fill)
        if not self.batch:
            return values[None].expand(0, *values.shape)
        entries = values.shape[0] // self.batch
        if self.interleaved:
            return torch.unflatten(values, 0, (entries, self.batch)).transpose(0, 1)
        return torch.unflatten(values, 0, (self.batch, entries))

    @property
    def is_in_order(self) -> bool:
        """Whether all entries of one example come before those of the next."""
        return self.owners is None and not self.interleaved and self.batch > 0

    def owner(self, entries: int) -> Tensor:
        """(entries,) the example of each entry."""
        if self.owners is not None:
            return self.owners
        every = torch.arange(entries)
        return every % self.batch if self.interleaved else every // max(1, entries // self.batch)

    def _gathered(self, values: Tensor, owners: Tensor, fill: int) -> Tensor:
        counts = torch.bincount(owners + 1, minlength=self.batch + 1)
        order = owners.argsort(stable=True)[int(counts[0]) :]
        starts = counts[1:].cumsum(0) - counts[1:]
        place = torch.arange(len(order), device=order.device) - starts[owners[order]]
        shape = (self.batch, int(counts[1:].max()), *values.shape[1:])
        apart = values.new_full(shape, fill)
        apart[owners[order], place] = values[order]
        return apart


def candidates(shape: torch.Size, dims: Sequence[int], batch: int) -> Iterator[Layout]:
    """The layouts that an output of this shape may have, the usual one first."""
    for dim in dims:
        if batch and dim < len(shape) and shape[dim] % batch == 0:
            yield Layout(batch, dim)
            if shape[dim] > batch > 1:
                yield Layout(batch, dim, interleaved=True)


def by_example(values: Tensor, layout: Layout, dim: int | None = None) -> Tensor:
    """Values (…, d) -> the rows of each example, (B, T, d), in full precision.

    Args:
        dim: that holds the examples; None: the layout's.
    """
    values = full_precision(values)
    first = layout.dim if dim is None else dim
    if layout.is_in_order and first == 0 and values.dim() > 1:  # the usual case, in one operation
        positions = values.shape[0] // layout.batch * values.shape[1:-1].numel()
        return values.reshape(layout.batch, positions, values.shape[-1])
    apart = layout.apart(values, dim)
    positions = apart.shape[1:-1].numel()
    return apart.reshape(layout.batch, positions, apart.shape[-1])


def added_up(values: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Values whose last dimensions are `shape` -> sums over each example's rows, (B, *shape)."""
    values = full_precision(values)
    outer = values.dim() - len(shape)
    if layout.is_in_order and layout.dim == 0 and outer > 0:
        positions = values.shape[0] // layout.batch * values.shape[1:outer].numel()
        return values.reshape(layout.batch, positions, *shape).sum(1)
    apart = layout.apart(values)
    inner = apart.dim() - len(shape)
    return apart.reshape(layout.batch, apart.shape[1:inner].numel(), *shape).sum(1)


def full_precision(values: Tensor) -> Tensor:
    """Half-precision values as float32, in which norms and sums are computed."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
