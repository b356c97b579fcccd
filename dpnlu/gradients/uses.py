"""Several uses of one parameter, as of tied weights or a layer that is called twice.

The gradients of the uses add up; their squared norms do not, as that of a sum has cross terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients, SquaredNorms
from dpnlu.gradients.grams import GramCache
from dpnlu.gradients.rounding import growth, inner_products, squared_terms
from dpnlu.gradients.rows import (
    Bags,
    Rows,
)

# Number of entries of gradients that are computed at once.
_ENTRIES = 2**22


def combine(uses: Sequence[Gradients]) -> list[Gradients]:
    """Merge several uses of one parameter into at most one of each form and shape, with the same
    sum."""
    if len(uses) < 2:
        return list(uses)
    outer = [use for use in uses if isinstance(use, OuterProducts)]
    bags = [use for use in uses if isinstance(use, Bags)]
    rows = [use for use in uses if isinstance(use, Rows)]
    dense = [use for use in uses if isinstance(use, Dense)]
    parts: list[Gradients] = []
    for transposed in (False, True):
        alike = [use for use in outer if use.transposed is transposed]
        if alike:
            parts.append(
                OuterProducts(
                    _joined([use.left for use in alike]),
                    _joined([use.right for use in alike]),
                    transposed,
                )
            )
    if len(bags) == 1 and not rows:
        parts += bags
    else:
        rows += [use.rows() for use in bags]
    for shape in dict.fromkeys(use.shape for use in rows):
        of_this = [use for use in rows if use.shape == shape]
        parts.append(
            Rows(
                _joined([use.ids for use in of_this]),
                _joined([use.values for use in of_this]),
                shape,
            )
        )
    if dense:
        parts.append(Dense(torch.stack([use.values for use in dense]).sum(0)))
    return parts


def squared_norms(parts: Sequence[Gradients], grams: GramCache) -> SquaredNorms:
    """Squared norms of the sum of `parts`, cross terms included; see the guarantee of
    `dpnlu.gradients.forms`."""
    total = parts[0].squared_norms(grams)
    for index, part in enumerate(parts[1:], start=1):
        total += part.squared_norms(grams)
        for earlier in parts[:index]:
            total += _cross_terms(earlier, part)
    return SquaredNorms(total.values.clamp(min=0), total.slack) if len(parts) > 1 else total


def norms_written_out(parts: Sequence[Gradients], examples: Tensor) -> SquaredNorms:
    """The same for the examples with these numbers (n,), from the gradients themselves: slow, but
    with little slack even where terms almost cancel."""
    size = max(1, _ENTRIES // max(1, parts[0].entries))
    found = [
        _written_out([part.of(some) for part in parts]) for some in torch.split(examples, size)
    ]
    return SquaredNorms(
        torch.cat([norms.values for norms in found]), torch.cat([norms.slack for norms in found])
    )


def _written_out(parts: Sequence[Gradients]) -> SquaredNorms:
    if len(parts) == 1:
        return parts[0].norms_written_out()
    total = parts[0].dense().flatten(1)
    for part in parts[1:]:
        total = total + part.dense().reshape(total.shape)
    norms = Dense(total).norms_written_out()
    # Each part's own sum, that of the parts, and later sums of all terms.
    terms = [2 * part.terms + 2 * len(parts) for part in parts]
    moved = sum(
        growth(count, total.dtype) * part.sizes() for count, part in zip(terms, parts, strict=True)
    )
    return SquaredNorms(norms.values, norms.slack + (2 * norms.values.sqrt() + moved) * moved)


def _cross_terms(one: Gradients, other: Gradients) -> SquaredNorms:
    """Twice the inner products of the two gradients of each example."""
    values, terms = _inner_products(one, other)
    sizes = one.sizes() * other.sizes()
    # The parts' own sums come later: 2 (T + S) for each.
    relative = growth(terms + 4 * (one.terms + other.terms) + 4, values.dtype)
    return SquaredNorms(2 * values, 2 * relative * sizes)


def _inner_products(one: Gradients, other: Gradients) -> tuple[Tensor, int]:
    """(B,) inner products, and the number of terms that these sums count as."""
    if isinstance(one, OuterProducts) and isinstance(other, Rows) and _is_tied(one, other):
        return _tied_inner_products(one, other), one.left.shape[2]
    left, right = one.dense().flatten(1), other.dense().flatten(1)
    return inner_products(left, right), squared_terms(left.shape[1])


def _is_tied(head: OuterProducts, table: Rows) -> bool:
    """Whether the table's rows are those of the head's matrix."""
    return not head.transposed and table.values.shape[2] == head.left.shape[2]


def _tied_inner_products(head: OuterProducts, table: Rows) -> Tensor:
    """For an embedding tied to an output layer (Ding et al. 2024): ⟨Σ_s b_s a_sᵀ, Σ_t e_t v_tᵀ⟩ is
    Σ_st b_s[id_t] (a_s · v_t), which needs no more of b than the entries of ids that occur."""
    kept = table.ids >= 0
    index = table.ids.clamp(min=0)[:, None, :].expand(-1, head.right.shape[1], -1)
    looked_up = head.right.gather(2, index) * kept[:, None, :]
    return (looked_up * torch.bmm(head.left, table.values.mT)).sum(2).sum(1)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
