"""Gram matrices of the factors of gradients.

A Gram matrix is symmetric. Of a large one only the upper triangle is computed, in strips: of some
rows those entries that lie beside them, from their own diagonal on.

Shapes: B examples, T positions; a strip of s rows has (B, s, t), t >= s.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
