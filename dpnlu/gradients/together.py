"""Norms and weighted sums of the gradients of all parameters, of many of them at once.

A model has hundreds of parameters, and what there is to compute of each is little: on a fast device
starting an operation takes longer than the operation. Most parameters have a single use, in one of
two forms. Those whose norms come from Gram matrices of the same size are taken together, and so are
those that are written out and small.

Shapes: B examples, T positions, K tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients, SquaredNorms, norms_by_grams
from dpnlu.gradients.grams import GramCache
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms, underflow
from dpnlu.gradients.rows import Rows
from dpnlu.gradients.uses import squared_norms

T = TypeVar("T")

# Gradients of up to so many entries per example are put side by side.
_SMALL = 2**14
# Numbers that are put side by side: on a CPU, so many that they stay near the processor.
_NEAR, _FAR = 2**18, 2**22


def norms_of_all(parts: Sequence[Sequence[Gradients]], like: Tensor) -> SquaredNorms:
    """(B,) squared norms of the gradients of all parameters together.

    Args:
        parts: the uses of each parameter, whose gradients add up; at least one of each.
        like: (B,), of the type that norms are returned in where there are none.
    """
    by_gram: dict[tuple[int, torch.dtype], list[OuterProducts | Rows]] = {}
    small: list[Dense] = []
    found: list[SquaredNorms] = []
    grams = GramCache()
    for uses in parts:
        use = uses[0]
        if len(uses) == 1 and isinstance(use, (OuterProducts, Rows)) and use.takes_gram:
            by_gram.setdefault((use.terms, use.dtype), []).append(use)
        elif len(uses) == 1 and isinstance(use, Dense) and use.entries <= _SMALL:
            small.append(use)
        else:
            found.append(squared_norms(uses, grams))
    for alike in by_gram.values():
        for some in _pieces(alike, lambda use: len(like) * use.terms**2, like):
            found.append(norms_by_grams([use.gram_pair(grams) for use in some]))
    for few in _pieces(small, lambda use: use.values.numel(), like):
        found.append(_norms_side_by_side(few))
    return added(found, like)


def added(found: Sequence[SquaredNorms], like: Tensor) -> SquaredNorms:
    """(B,) squared norms of several tensors together, from those (B,) or (K, B) of each.

    Args:
        like: (B,), of the type that is returned where there are none.
    """
    if not found:
        return SquaredNorms(torch.zeros_like(like), torch.zeros_like(like))
    values, slack = (
        torch.cat([rows.reshape(-1, len(like)) for rows in each])
        for each in zip(*((norms.values, norms.slack) for norms in found), strict=True)
    )
    total, dtype = values.sum(0), values.dtype
    # This sum is rounded too; what underflow leaves is far below any bound that makes sense.
    lost = (growth(len(values) + 8, dtype) * total).add_(16 * underflow(dtype))
    return SquaredNorms(total, lost.add_(slack.sum(0)))


def add_weighted_sums(pairs: Sequence[tuple[Gradients, Tensor]], coefficients: Tensor) -> None:
    """out += Σ_i coefficients[i] · gradient i, for pairs of gradients and out; see
    `Gradients.add_weighted_sum`."""
    small: list[tuple[Dense, Tensor]] = []
    for use, out in pairs:
        if isinstance(use, Dense) and use.entries <= _SMALL and use.values.dtype == out.dtype:
            small.append((use, out))
        else:
            use.add_weighted_sum(coefficients, out)
    for few in _pieces(small, lambda pair: pair[0].values.numel(), coefficients):
        rows = _side_by_side([use for use, _ in few])
        sums = coefficients.to(rows.dtype) @ rows
        pieces = torch.split(sums, [use.entries for use, _ in few])
        torch._foreach_add_([out.view(-1) for _, out in few], list(pieces))


def _norms_side_by_side(uses: Sequence[Dense]) -> SquaredNorms:
    """(B,) squared norms of the gradients of several tensors together."""
    rows = _side_by_side(uses)
    values = squared_sums(rows)
    return SquaredNorms(values, values * growth(squared_terms(rows.shape[1]), values.dtype))


def _side_by_side(uses: Sequence[Dense]) -> Tensor:
    """(B, n) all entries of each example's gradients."""
    rows = [use.values.reshape(len(use.values), use.entries) for use in uses]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _pieces(items: Sequence[T], size: Callable[[T], int], like: Tensor) -> Iterator[list[T]]:
    """The items, as many at once as are worth putting side by side where `like` is."""
    most = _NEAR if like.device.type == "cpu" else _FAR
    piece: list[T] = []
    total = 0
    for item in items:
        if piece and total + size(item) > most:
            yield piece
            piece, total = [], 0
        piece.append(item)
        total += size(item)
    if piece:
        yield piece
