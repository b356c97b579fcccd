"""Sums of the gradients of groups of examples, in the form in which those were found.

What is a sum over the positions of an example becomes one over the positions of all examples of the
group, one after the other: nothing is multiplied out. Where groups have unlike numbers of examples,
the smaller ones are filled up with zeros.

Shapes: B examples with T positions, in G groups of up to k examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.rows import Bags, Rows


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


def together(use: Gradients, layout: Layout) -> Gradients:
    """The gradients (B, …) of examples -> those of their groups, (G, …).

    Raises:
        TypeError: another form of gradients.
    """
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
