"""Gradients of tables: rows that were looked up, one by one or as bags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpnlu.gradients.forms import (
    GramCache,
    SquaredNorms,
    diagonal,
    lengths,
    of_written_out,
    squared_lengths,
    zeroed,
)
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms

# Up to this many positions, comparing all pairs of ids beats sorting them.
_PAIRWISE_POSITIONS = 128


@dataclass(frozen=True)
class Rows:
    """Gradient i is a (V, d) table that is zero but for rows: Σ_t e_{ids[i, t]} values[i, t]ᵀ.

    Attributes:
        ids: (B, T) row numbers; a negative one is left out (padding).
        values: (B, T, d) gradients with respect to the looked-up rows.
        shape: (V, d) of the table, or (V, …) with the rest flattened into d.
    """

    ids: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def terms(self) -> int:
        return self.ids.shape[1]

    @property
    def entries(self) -> int:
        return self.shape[0] * self.values.shape[2]

    def squared_norms(self, grams: GramCache) -> SquaredNorms:
        if not self._is_pairwise:
            return self.norms_written_out()
        same = (self.ids[:, :, None] == self.ids[:, None, :]) & (self.ids >= 0)[:, None, :]
        products = grams(self.values)
        values = (products * same).sum(2).sum(1).clamp_(min=0)
        sizes = self._added(lengths(diagonal(products)))
        share = growth(self.values.shape[2] + 4 * self.terms + 4, values.dtype)
        return SquaredNorms(values, sizes.square() * share)

    def norms_written_out(self) -> SquaredNorms:
        sums, example, batch = self._merged()
        squares = sums.new_zeros(batch).index_add_(0, example, squared_sums(sums))
        return of_written_out(squares, squared_terms(sums.shape[1]) + self.terms, self)

    def sizes(self) -> Tensor:
        return self._added(lengths(squared_lengths(self.values)))

    def _added(self, lengths: Tensor) -> Tensor:
        """(B, T) -> (B,), without what is left out."""
        return torch.where(self.ids >= 0, lengths, 0.0).sum(1)

    def dense(self) -> Tensor:
        batch, rows = self.ids.shape[0], self.shape[0]
        table = self.values.new_zeros(batch * rows, self.values.shape[2])
        example = torch.arange(batch, device=self.ids.device)[:, None]
        kept = self.ids >= 0
        table.index_add_(0, (self.ids + rows * example)[kept], self.values[kept])
        return table.view(batch, *self.shape)

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        kept, ids = self.ids >= 0, self.ids.flatten()
        rows = (self.values * torch.where(kept, coefficients[:, None], 0.0)[:, :, None]).flatten(
            0, 1
        )
        if self._is_pairwise:  # norms had a look at what is left out: it is finite
            ids = ids.clamp(min=0)
        else:
            ids, rows = ids[kept.flatten()], rows[kept.flatten()]
        out.view(self.shape[0], -1).index_add_(0, ids, rows.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Rows:
        return Rows(self.ids, zeroed(self.values, finite), self.shape)

    def of(self, examples: Tensor) -> Rows:
        return Rows(self.ids[examples], self.values[examples], self.shape)

    @property
    def _is_pairwise(self) -> bool:
        """Whether all pairs of ids are compared: in few positions, and where no value can be looked
        at, as the tensors have none."""
        return self.ids.shape[1] <= _PAIRWISE_POSITIONS or isinstance(self.ids, FakeTensor)

    def _merged(self) -> tuple[Tensor, Tensor, int]:
        """Rows of equal example and id added up: values (n, d), their examples (n,), and B."""
        batch, rows = self.ids.shape[0], self.shape[0]
        example = torch.arange(batch, device=self.ids.device)[:, None]
        kept = self.ids >= 0
        keys, place = torch.unique((self.ids + rows * example)[kept], return_inverse=True)
        sums = self.values.new_zeros(len(keys), self.values.shape[2])
        return sums.index_add_(0, place, self.values[kept]), keys // rows, batch


@dataclass(frozen=True)
class Bags:
    """Gradient i is a (V, d) table in which one row went into many: Σ_t shares[i, t] e_{ids[i, t]}
    rightᵀ[i], as of a bag of words.

    Attributes:
        ids: (B, T) row numbers; a negative one is left out (padding).
        shares: (B, T) how much of each row was taken.
        right: (B, d) gradient with respect to their sum.
        shape: (V, d) of the table.
    """

    ids: Tensor
    shares: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def terms(self) -> int:
        return self.ids.shape[1]

    @property
    def entries(self) -> int:
        return self.shape[0] * self.right.shape[1]

    def squared_norms(self, grams: GramCache) -> SquaredNorms:
        """‖G‖² = ‖b‖² Σ_v (Σ_{t: id_t = v} c_t)²."""
        values = self._squared_counts() * squared_lengths(self.right)
        # Shares are rounded when they scale b, and their sums are those of the gradient's terms.
        share = growth(self.right.shape[1] + 4 * self.terms + 8, values.dtype)
        return SquaredNorms(values, self.sizes().square() * share)

    def norms_written_out(self) -> SquaredNorms:
        return self.rows().norms_written_out()

    def sizes(self) -> Tensor:
        shares = torch.where(self.ids >= 0, self.shares, 0.0).abs().sum(1)
        return shares * lengths(squared_lengths(self.right))

    def dense(self) -> Tensor:
        return self.rows().dense()

    def rows(self) -> Rows:
        """The same with a row of its own for each id."""
        return Rows(self.ids, self.shares[:, :, None] * self.right[:, None], self.shape)

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        # What a bag leaves out has share 0.
        ids, shares = self.ids.clamp(min=0), torch.where(self.ids >= 0, self.shares, 0.0)
        right = self.right * coefficients[:, None]
        rows = (shares[:, :, None] * right[:, None]).flatten(0, 1)
        out.index_add_(0, ids.flatten(), rows.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Bags:
        shares, right = zeroed(self.shares, finite), zeroed(self.right, finite)
        return Bags(self.ids, shares, right, self.shape)

    def of(self, examples: Tensor) -> Bags:
        return Bags(self.ids[examples], self.shares[examples], self.right[examples], self.shape)

    def _squared_counts(self) -> Tensor:
        """(B,) sums over the table's rows of the squares of what was taken of each."""
        kept = self.ids >= 0
        if isinstance(self.ids, FakeTensor):  # it has no values to be sorted
            same = (
                (self.ids[:, :, None] == self.ids[:, None, :]) & kept[:, None, :] & kept[:, :, None]
            )
            return (same * self.shares[:, :, None] * self.shares[:, None, :]).sum((1, 2))
        batch, rows = self.ids.shape[0], self.shape[0]
        example = torch.arange(batch, device=self.ids.device)[:, None]
        keys, place = torch.unique((self.ids + rows * example)[kept], return_inverse=True)
        counts = self.shares.new_zeros(len(keys)).index_add_(0, place, self.shares[kept])
        return self.shares.new_zeros(batch).index_add_(0, keys // rows, counts.square())
