"""Gradients of tables of which rows were looked up, one by one or in bags."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpnlu.gradients.forms import (
    GramPair,
    SquaredNorms,
    lengths,
    norms_by_grams,
    of_written_out,
    squared_lengths,
    zeroed,
)
from dpnlu.gradients.grams import GramCache, strips
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms

# Up to this many positions, comparing all pairs of ids is faster than sorting them.
_PAIRWISE_POSITIONS = 128


@dataclass(frozen=True)
class Rows:
    """Gradient i is a (V, d) table, zero in most rows: Σ_t e_{ids[i, t]} values[i, t]ᵀ.

    Attributes:
        ids: (B, T) row numbers; positions with a negative one do not count (padding).
        values: (B, T, d) gradients of the rows that were looked up.
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
        if not self.takes_gram:
            return self.norms_written_out()
        return norms_by_grams([self.gram_pair(grams)]).of(0)

    def gram_pair(self, grams: GramCache) -> GramPair:
        """Of the values, and of the unit vectors e, whose inner products say which ids are equal;
        those of padding are zero."""
        relative = growth(self.values.shape[2] + 4 * self.terms + 4, self.values.dtype)
        same = tuple(self._same(start, stop) for start, stop in strips(self.terms))
        return GramPair(same, grams(self.values), relative)

    def _same(self, start: int, stop: int) -> Tensor:
        """(B, s, t) 1 where these positions have the ids of those from the first of them on."""
        later = self.ids[:, None, start:]
        return ((self.ids[:, start:stop, None] == later) & (later >= 0)).to(self.values.dtype)

    def norms_written_out(self) -> SquaredNorms:
        sums, example, batch = self._merged()
        squares = sums.new_zeros(batch).index_add_(0, example, squared_sums(sums))
        return of_written_out(squares, squared_terms(sums.shape[1]) + self.terms, self)

    def sizes(self) -> Tensor:
        return self._added(lengths(squared_lengths(self.values)))

    def _added(self, lengths: Tensor) -> Tensor:
        """(B, T) -> (B,) sums, without padding."""
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
        rows = (self.values * (kept * coefficients[:, None])[:, :, None]).flatten(0, 1)
        if self.takes_gram:  # norms included the values of padding: they are finite
            ids = ids.clamp(min=0)
        else:
            ids, rows = ids[kept.flatten()], rows[kept.flatten()]
        out.view(self.shape[0], -1).index_add_(0, ids, rows.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Rows:
        return Rows(self.ids, zeroed(self.values, finite), self.shape)

    def of(self, examples: Tensor) -> Rows:
        return Rows(self.ids[examples], self.values[examples], self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        return self.values.dtype

    @property
    def takes_gram(self) -> bool:
        """Whether norms are taken from the Gram matrices of all pairs of positions."""
        return _is_pairwise(self.ids)

    def _merged(self) -> tuple[Tensor, Tensor, int]:
        """Sums of the values with equal example and id (n, d), their examples (n,), and B."""
        batch, rows = self.ids.shape[0], self.shape[0]
        example = torch.arange(batch, device=self.ids.device)[:, None]
        kept = self.ids >= 0
        keys, place = torch.unique((self.ids + rows * example)[kept], return_inverse=True)
        sums = self.values.new_zeros(len(keys), self.values.shape[2])
        return sums.index_add_(0, place, self.values[kept]), keys // rows, batch


@dataclass(frozen=True)
class Bags:
    """Gradient i is the (V, d) table Σ_t row_weights[i, t] e_{ids[i, t]} right[i]ᵀ: a weighted sum
    of rows was looked up, as of a bag of words.

    Attributes:
        ids: (B, T) row numbers; positions with a negative one do not count (padding).
        row_weights: (B, T) weight of each row in the sum.
        right: (B, d) gradient of the sum.
        shape: (V, d) of the table.
    """

    ids: Tensor
    row_weights: Tensor
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
        row_weights, squares = self._kept_weights(), squared_lengths(self.right)
        values = self._squared_counts(row_weights) * squares
        # Weights are rounded when they scale b, and their sums are those of the gradient's terms.
        relative = growth(self.right.shape[1] + 4 * self.terms + 8, values.dtype)
        sizes = row_weights.abs().sum(1) * lengths(squares)
        return SquaredNorms(values, sizes.square_() * relative)

    def norms_written_out(self) -> SquaredNorms:
        return self.rows().norms_written_out()

    def sizes(self) -> Tensor:
        return self._kept_weights().abs().sum(1) * lengths(squared_lengths(self.right))

    def dense(self) -> Tensor:
        return self.rows().dense()

    def rows(self) -> Rows:
        """The same gradients, with the gradient of each row written out."""
        return Rows(self.ids, self.row_weights[:, :, None] * self.right[:, None], self.shape)

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        right = self.right * coefficients[:, None]
        rows = (self._kept_weights()[:, :, None] * right[:, None]).flatten(0, 1)
        out.index_add_(0, self.ids.clamp(min=0).flatten(), rows.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Bags:
        row_weights, right = zeroed(self.row_weights, finite), zeroed(self.right, finite)
        return Bags(self.ids, row_weights, right, self.shape)

    def of(self, examples: Tensor) -> Bags:
        return Bags(
            self.ids[examples], self.row_weights[examples], self.right[examples], self.shape
        )

    def _kept_weights(self) -> Tensor:
        """(B, T) the weights, 0 for padding."""
        return torch.where(self.ids >= 0, self.row_weights, 0.0)

    def _squared_counts(self, row_weights: Tensor) -> Tensor:
        """(B,) sums over the table's rows of the squared sum of each row's weights; padding has
        weight 0."""
        if _is_pairwise(self.ids):
            same = (self.ids[:, :, None] == self.ids[:, None, :]).to(row_weights.dtype)
            sums = torch.bmm(same, row_weights[:, :, None])[:, :, 0]  # of the row that t took
            return (sums * row_weights).sum(1).clamp_(min=0)
        kept = self.ids >= 0
        batch, rows = self.ids.shape[0], self.shape[0]
        example = torch.arange(batch, device=self.ids.device)[:, None]
        keys, place = torch.unique((self.ids + rows * example)[kept], return_inverse=True)
        counts = row_weights.new_zeros(len(keys)).index_add_(0, place, row_weights[kept])
        return row_weights.new_zeros(batch).index_add_(0, keys // rows, counts.square())


def _is_pairwise(ids: Tensor) -> bool:
    """Whether to compare all pairs of ids (B, T): for few positions, and for fake tensors, which
    have no values to sort."""
    return ids.shape[1] <= _PAIRWISE_POSITIONS or isinstance(ids, FakeTensor)
