"""Where the examples lie in what an operation returns.

Usually along dimension 0, one after the other. A time-first layer has them along dimension 1; who
computes two views of a batch at once may have them side by side; rows that were picked by a mask,
sorted or routed lie as their values had it.

Shapes: B examples, k entries of each along the dimension that holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How B examples share the entries of one dimension.

    Attributes:
        batch: B.
        dim: the dimension, counted from the first.
        in_turn: one entry of each example, then the next of each; else all of an example's entries,
            then those of the next.
        owners: instead, whose each entry is, (n,), -1 where it is nobody's.
    """

    batch: int
    dim: int = 0
    in_turn: bool = False
    owners: Tensor | None = None

    def apart(self, values: Tensor, dim: int | None = None, *, fill: int = 0) -> Tensor:
        """Values with examples along `dim` (None: as the layout says) -> (B, k, …), the other
        dimensions in order; `fill` where an example has fewer than k entries."""
        values = values.movedim(self.dim if dim is None else dim, 0)
        if self.owners is not None:
            return self._gathered(values, self.owners, fill)
        if not self.batch:
            return values[None].expand(0, *values.shape)
        entries = values.shape[0] // self.batch
        if self.in_turn:
            return torch.unflatten(values, 0, (entries, self.batch)).transpose(0, 1)
        return torch.unflatten(values, 0, (self.batch, entries))

    def owner(self, entries: int) -> Tensor:
        """(entries,) whose each entry is."""
        if self.owners is not None:
            return self.owners
        every = torch.arange(entries)
        return every % self.batch if self.in_turn else every // max(1, entries // self.batch)

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
    """Layouts that a result of this shape may have, the usual one first."""
    for dim in dims:
        if batch and dim < len(shape) and shape[dim] % batch == 0:
            yield Layout(batch, dim)
            if shape[dim] > batch > 1:
                yield Layout(batch, dim, in_turn=True)


def by_example(values: Tensor, layout: Layout, dim: int | None = None) -> Tensor:
    """Values (…, d) -> (B, T, d), in full precision: rows of each example.

    Args:
        dim: that holds the examples; None: as the layout says.
    """
    apart = layout.apart(full_precision(values), dim)
    positions = apart.shape[1:-1].numel()
    return apart.reshape(layout.batch, positions, apart.shape[-1])


def added_up(values: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    """Values whose last dimensions are `shape` -> (B, *shape), the rows of each example added."""
    apart = layout.apart(full_precision(values))
    inner = apart.dim() - len(shape)
    return apart.reshape(layout.batch, apart.shape[1:inner].numel(), *shape).sum(1)


def full_precision(values: Tensor) -> Tensor:
    """Half-precision values as float32, in which norms and sums are taken."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
