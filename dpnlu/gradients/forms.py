"""Per-example gradients of one tensor, in the form in which back-propagation delivers them.

A linear layer delivers its weight's gradient as two factors, an embedding as rows, everything
small as plain tensors. Each form gives squared norms and weighted sums, and computes the gradients
themselves only where that is cheaper. All sums and norms are kept in float32 or better.

Guarantee: the squared norm of an example's gradient, as the factors define it, is at most
`values + slack` of what `squared_norms` returns, whatever the rounding; and it still is after
rounding in a sum of the gradient's own terms. The slack is a small fraction of (Σ_t ‖a_t‖‖b_t‖)²,
the squared norm that the gradient could have at most: it matters only where terms almost cancel.
For the Gram matrices A, B of the factors, entry by entry (γ of `dpnlu.gradients.rounding`),

    |fl(A_st) - a_s·a_t| <= γ(d) ‖a_s‖‖a_t‖,    and so for B with γ(p),
    |fl(Σ_st A_st B_st) - ‖G‖²| <= γ(d + p + 2T + 2) (Σ_t ‖a_t‖‖b_t‖)².

Shapes: B examples, T positions, d inputs, p outputs, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpnlu.gradients.grams import Gram, GramCache, diagonal
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms, underflow


@dataclass(frozen=True)
class SquaredNorms:
    """Squared norms as computed, and by how much the true ones may exceed them.

    Attributes:
        values: (B,), or (K, B) those of K tensors.
        slack: the same, >= 0.
    """

    values: Tensor
    slack: Tensor

    def __add__(self, other: SquaredNorms) -> SquaredNorms:
        return SquaredNorms(self.values + other.values, self.slack + other.slack)

    def of(self, place: int) -> SquaredNorms:
        """(K, B) -> (B,): those of one tensor."""
        return SquaredNorms(self.values[place], self.slack[place])


class Gradients(Protocol):
    """The gradients (B, *shape) of B examples with respect to one tensor of that shape.

    Attributes:
        terms: number of terms that an entry of a gradient is the sum of, at most.
        entries: number of entries of a gradient.
    """

    @property
    def terms(self) -> int: ...

    @property
    def entries(self) -> int: ...

    def squared_norms(self, grams: GramCache) -> SquaredNorms:
        """Squared norm of each example's gradient, in the cheapest way."""

    def norms_written_out(self) -> SquaredNorms:
        """The same, computed from the gradients themselves, which has the least slack."""

    def sizes(self) -> Tensor:
        """(B,) sums of the norms of a gradient's terms: an upper bound of its norm."""

    def dense(self) -> Tensor:
        """The gradients themselves, (B, *shape)."""

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        """out += sum over i of coefficients[i] * gradient i.

        Args:
            coefficients: (B,). Gradients with coefficient 0 must be finite, too.
            out: (*shape), contiguous.
        """

    def finite_rows(self, finite: Tensor) -> Gradients:
        """The same with the gradients of all examples outside `finite`, (B,) bool, set to zero."""

    def of(self, examples: Tensor) -> Gradients:
        """The gradients of the examples with these numbers, (n,)."""


@dataclass(frozen=True)
class Dense:
    """The gradients themselves, for small tensors.

    Attributes:
        values: (B, *shape).
    """

    values: Tensor

    @property
    def terms(self) -> int:
        return 0

    @property
    def entries(self) -> int:
        return self.values.shape[1:].numel()

    def squared_norms(self, grams: GramCache) -> SquaredNorms:
        return self.norms_written_out()

    def norms_written_out(self) -> SquaredNorms:
        values = squared_sums(self.values)
        relative = growth(squared_terms(self.entries), values.dtype)
        return SquaredNorms(values, values * relative)

    def sizes(self) -> Tensor:
        return lengths(squared_sums(self.values))

    def dense(self) -> Tensor:
        return self.values

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        rows = self.values.reshape(len(self.values), self.entries).to(out.dtype)
        out.view(-1).addmv_(rows.mT, coefficients.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Dense:
        return Dense(zeroed(self.values, finite))

    def of(self, examples: Tensor) -> Dense:
        return Dense(self.values[examples])


def of_written_out(squares: Tensor, terms: int, use: Gradients) -> SquaredNorms:
    """The squared norms of gradients that were computed from `use`.

    Rounding in them and in later sums moves a gradient by at most γ(2T) Σ_t ‖a_t‖‖b_t‖.

    Args:
        squares: (B,) sums of the squares of their entries.
        terms: number of terms that these sums count as.
    """
    moved = growth(2 * use.terms, squares.dtype) * use.sizes()
    relative = growth(terms, squares.dtype)
    return SquaredNorms(squares, squares * relative + (2 * squares.sqrt() + moved) * moved)


def squared_lengths(rows: Tensor) -> Tensor:
    """Squared norms of rows: (…, d) -> (…)."""
    squares: Tensor = torch.linalg.vecdot(rows, rows)
    return squares


def lengths(squares: Tensor) -> Tensor:
    """Norms from squared norms, raised by what underflow may have lost."""
    return (squares + underflow(squares.dtype)).sqrt()


def zeroed(values: Tensor, finite: Tensor) -> Tensor:
    """The rows outside `finite` set to zero; not by multiplication, as 0 · ∞ is not 0."""
    mask = finite.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


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
