"""Gradients of weight matrices: sums of outer products, kept as their factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpnlu.gradients.forms import (
    GramPair,
    SquaredNorms,
    lengths,
    norms_by_grams,
    of_written_out,
    squared_lengths,
    zeroed,
)
from dpnlu.gradients.grams import GramCache, computed_entries
from dpnlu.gradients.kernels import add_product_
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms, underflow


@dataclass(frozen=True)
class OuterProducts:
    """Gradient i is the (p, d) matrix Σ_t right[i, t] left[i, t]ᵀ; the parameter may have another
    shape with the same entries.

    Attributes:
        left: (B, T, d) input of the layer.
        right: (B, T, p) gradient of its output.
        transposed: the parameter is stored as (d, p).
    """

    left: Tensor
    right: Tensor
    transposed: bool = False

    @property
    def terms(self) -> int:
        return self.left.shape[1]

    @property
    def entries(self) -> int:
        return self.left.shape[2] * self.right.shape[2]

    def squared_norms(self, grams: GramCache) -> SquaredNorms:
        """Squared norm of each example's gradient, in the way that takes fewer multiplications."""
        if self.terms == 1:
            lefts, rights = (squared_lengths(rows[:, 0]) for rows in (self.left, self.right))
            lost, relative = underflow(lefts.dtype), growth(self._widths + 8, lefts.dtype)
            return SquaredNorms(lefts * rights, (lefts + lost) * (rights + lost).mul_(relative))
        return self.norms_by_gram(grams) if self.takes_gram else self.norms_written_out()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return self.right.dtype

    @property
    def takes_gram(self) -> bool:
        """Whether Gram matrices, T² (d + p) or less, take fewer multiplications than gradients,
        T d p, and there is more than one term."""
        _, positions, d = self.left.shape
        p = self.right.shape[2]
        return positions != 1 and computed_entries(positions) * (d + p) <= positions * d * p

    def norms_by_gram(self, grams: GramCache) -> SquaredNorms:
        """‖Σ b aᵀ‖² = Σ_st (a_s·a_t)(b_s·b_t) (Li et al. 2022)."""
        return norms_by_grams([self.gram_pair(grams)]).of(0)

    def gram_pair(self, grams: GramCache) -> GramPair:
        """The Gram matrices that the norms can be taken from."""
        # 2T for the sum of products, and 2T for a sum of the gradient's own terms.
        relative = growth(self._widths + 4 * self.terms + 4, self.left.dtype)
        return GramPair(grams(self.left), grams(self.right), relative)

    def norms_written_out(self) -> SquaredNorms:
        return of_written_out(squared_sums(self.dense()), squared_terms(self.entries), self)

    @property
    def _widths(self) -> int:
        return self.left.shape[2] + self.right.shape[2]

    def sizes(self) -> Tensor:
        sizes = lengths(squared_lengths(self.left)) * lengths(squared_lengths(self.right))
        return sizes.sum(1)

    def dense(self) -> Tensor:
        if self.transposed:
            return torch.bmm(self.left.mT, self.right)
        return torch.bmm(self.right.mT, self.left)

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        weights = coefficients[:, None, None]
        if self.left.shape[2] < self.right.shape[2]:  # scale the narrower factor
            left, right = _as_rows(self.left * weights, self.right)
        else:
            left, right = _as_rows(self.left, self.right * weights)
        if self.transposed:
            left, right = right, left
        if out.dtype != left.dtype:
            left, right = left.to(out.dtype), right.to(out.dtype)
        add_product_(out.view(right.shape[1], left.shape[1]), right.mT, left)

    def finite_rows(self, finite: Tensor) -> OuterProducts:
        return OuterProducts(zeroed(self.left, finite), zeroed(self.right, finite), self.transposed)

    def of(self, examples: Tensor) -> OuterProducts:
        return OuterProducts(self.left[examples], self.right[examples], self.transposed)


def _as_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, T, ·) as (B·T, ·), in the order that needs no copy of the wider one."""
    widest = right if right.shape[2] >= left.shape[2] else left
    if not widest.is_contiguous() and widest.transpose(0, 1).is_contiguous():
        left, right = left.transpose(0, 1), right.transpose(0, 1)
    return left.reshape(-1, left.shape[2]), right.reshape(-1, right.shape[2])
