"""Sums of the gradients of groups of examples, in the form in which those were found.

What is a sum over the positions of an example becomes one over the positions of all examples of the
group, one after the other. Where groups have unlike numbers of examples, the smaller ones are
filled up with zeros. Nothing is multiplied out but what then takes little more memory: a matrix
whose factors have many positions is computed once for the norm and the sum, and not twice.

Shapes: B examples with T positions, in G groups of up to k examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.rows import Bags, Rows

# Gradients are written out that take at most so many times the memory of their factors.
_ROOM = 1.5


def grouping(groups: Tensor) -> Layout:
    """How the examples lie in groups, as a layout in which a group is one example.

    Args:
        groups: (B,) the group of each example, numbers 0 … G - 1 that all occur.
    """
    counts = torch.bincount(groups)
    size, count = int(counts.max()), len(counts)
    in_order = torch.arange(count, device=groups.device).repeat_interleave(size)
    if len(groups) == len(in_order) and bool((groups == in_order).all()):
        return Layout(count)
    return Layout(count, owners=groups)


def together(uses: Sequence[Gradients], layout: Layout) -> list[Gradients]:
    """The gradients (B, …) of examples -> those of their groups, (G, …).

    Args:
        uses: of one parameter, whose gradients add up. The norm of a sum of several takes their
            factors, so that only a single one is ever multiplied out.

    Raises:
        TypeError: another form of gradients.
    """
    found = [_together(use, layout) for use in uses]
    single = found[0] if len(found) == 1 else None
    if isinstance(single, OuterProducts):
        room = _ROOM * single.terms * (single.left.shape[2] + single.right.shape[2])
        return [Dense(single.dense())] if single.entries <= room else found
    return found


def _together(use: Gradients, layout: Layout) -> Gradients:
    if isinstance(use, Bags):  # bags of one group have gradients of their own
        use = use.rows()
    if isinstance(use, OuterProducts):
        left, right = (_joined(factor, layout) for factor in (use.left, use.right))
        return OuterProducts(left, right, use.transposed)
    if isinstance(use, Rows):
        return Rows(_joined(use.ids, layout, fill=-1), _joined(use.values, layout), use.shape)
    if isinstance(use, Dense):
        owners = layout.owner(len(use.values)).to(use.values.device)
        sums = use.values.new_zeros(layout.batch, *use.values.shape[1:])
        return Dense(sums.index_add_(0, owners, use.values))
    raise TypeError(f"Expected gradients in a known form, got {type(use).__name__}.")


def _joined(values: Tensor, layout: Layout, *, fill: int = 0) -> Tensor:
    """(B, T, …) -> (G, k T, …)."""
    return layout.apart(values, fill=fill).flatten(1, 2)
