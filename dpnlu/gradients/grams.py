"""Gram matrices of the factors of gradients, and the norms that they give.

A Gram matrix is symmetric. Of a large one only the upper triangle is computed, in strips: of some
rows those entries that lie beside them, from their own diagonal on.

Shapes: B examples, T positions, K tensors; a strip of s rows has (B, s, t), t >= s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpnlu.gradients.forms import SquaredNorms, lengths

# Up to so many positions a matrix is one strip, the whole of it; of more it has so many.
_WHOLE, _STRIPS = 128, 4

Gram = tuple[Tensor, ...]
"""The strips (B, s, t) of the Gram matrices of B examples, in order."""


def strips(positions: int) -> list[tuple[int, int]]:
    """The rows of each strip, from the first to before the last."""
    if positions <= _WHOLE:
        return [(0, positions)]
    size = -(-positions // _STRIPS)
    return [(start, min(start + size, positions)) for start in range(0, positions, size)]


def computed_entries(positions: int) -> int:
    """How many entries of a matrix its strips have."""
    return sum((stop - start) * (positions - start) for start, stop in strips(positions))


@dataclass(frozen=True)
class GramPair:
    """Gram matrices of the two factors of some gradients, whose squared norms are the inner
    products of both.

    Attributes:
        left, right: of T positions.
        relative: how far rounding may take these, relative to the squared sums of the norms of a
            gradient's terms.
    """

    left: Gram
    right: Gram
    relative: float


def norms_by_grams(pairs: Sequence[GramPair]) -> SquaredNorms:
    """(K, B) squared norms of K pairs of the same shape, in as many operations as those of one."""
    found = [
        _of_strips([pair.left[number] for pair in pairs], [pair.right[number] for pair in pairs])
        for number in range(len(pairs[0].left))
    ]
    values, sizes = found[0]
    for more, longer in found[1:]:
        values, sizes = values + more, sizes + longer
    # Rounding may leave a vanishing norm slightly negative.
    values, slack = values.clamp_(min=0), sizes.square_()
    torch._foreach_mul_(slack.unbind(0), [pair.relative for pair in pairs])
    return SquaredNorms(values, slack)


def _of_strips(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What a strip adds to the inner products of K pairs, (K, B), and to the sums of the norms of
    the gradients' terms."""
    lefts, rights = _stacked(left), _stacked(right)
    own, products = lefts.shape[2], lefts * rights
    values = products[..., :own].sum(3).sum(2)
    if products.shape[3] > own:  # the triangle below the diagonal has the same entries
        values = values + 2 * products[..., own:].sum(3).sum(2)
    return values, (lengths(diagonal(lefts)) * lengths(diagonal(rights))).sum(2)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


class GramCache:
    """Gram matrices of the latest tensors, of which some come again: query, key and value have the
    same input; the embeddings of words, positions and types the same gradient."""

    def __init__(self) -> None:
        self._last: list[tuple[Tensor, Gram]] = []

    def __call__(self, rows: Tensor) -> Gram:
        """(B, T, d) -> the inner products of the rows of each example."""
        for known, gram in self._last:
            if _is_same(known, rows):
                return gram
        gram = tuple(
            torch.bmm(rows[:, start:stop], rows[:, start:].mT)
            for start, stop in strips(rows.shape[1])
        )
        self._last = [*self._last[-3:], (rows, gram)]
        return gram


def diagonal(strip: Tensor) -> Tensor:
    """(…, s, t) -> (…, s), as a view that torch can compile."""
    return strip.flatten(-2)[..., :: strip.shape[-1] + 1]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in the same memory."""
    return one is other or (
        one.untyped_storage()._cdata
        == other.untyped_storage()._cdata  # also defined while a program is traced
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )
