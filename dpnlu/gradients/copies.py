"""Copies of a batch-independent tensor, and the way back from their gradients to its own.

Shapes: B examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpnlu.gradients.layout import Layout
from dpnlu.gradients.records import EntryRule


@dataclass(frozen=True)
class Copies:
    """Copies of a batch-independent tensor, made by torch's `expand` or `repeat`.

    Whether there is one for each example is known only where they enter the batch: there may be as
    many positions as examples.
    """

    source: Tensor
    copies: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape with as many dimensions as the copies'."""
        return (1,) * (self.copies.dim() - self.source.dim()) + tuple(self.source.shape)

    def are_one_for_each(self, batch: int) -> bool:
        """Whether the rows are `batch` copies of the source, one after the other."""
        first, *inner = zip(self.shape, self.copies.shape, strict=True)
        return first[0] in (1, first[1] // batch) and all(
            known in (1, size) for known, size in inner
        )

    def per_example(self, gradient: Tensor, layout: Layout) -> Tensor:
        """The gradient of the copies -> per-example gradients of the source, (B, *shape)."""
        apart = layout.apart(gradient).sum_to_size(layout.batch, *self.shape)
        return apart.reshape(layout.batch, *self.source.shape)


def own_rows(gradient: Tensor, layout: Layout) -> Tensor:
    """The gradient (…, R, …) of a tensor whose R rows belong to examples -> per-example gradients
    (B, …, R, …), zero in the rows of other examples."""
    rows = gradient.movedim(layout.dim, 0)
    apart = gradient.new_zeros(layout.batch, *rows.shape)
    every = torch.arange(len(rows), device=gradient.device)
    apart[layout.owner(len(rows)).to(gradient.device), every] = rows
    return apart.movedim(1, 1 + layout.dim)


def of_expanded(shape: tuple[int, ...], target: torch.Size) -> EntryRule:
    """The rule for a tensor of shape `target` that was viewed as `shape` and then expanded.

    Along the dimension that holds the examples, `shape` has either size 1, and every example has a
    copy, or the size of the whole, and every example has rows of its own.
    """

    def per_example(gradient: Tensor, layout: Layout) -> Tensor:
        if shape[layout.dim] != 1:
            apart = own_rows(gradient, layout)
        else:
            apart = layout.apart(gradient).sum(1).unsqueeze(1 + layout.dim)
        return apart.sum_to_size(layout.batch, *shape).reshape(layout.batch, *target)

    return per_example
