"""Per-example gradients of one tensor, in the form in which back-propagation delivers them.

A linear layer delivers its weight's gradient as two factors, an embedding as rows, everything
small as plain tensors. Each form gives squared norms and weighted sums without being written out
where that is dearer. All sums and norms are kept in float32 or better.

Guarantee: the squared norm of an example's gradient, as the factors define it, is at most
`values + slack` of what `squared_norms` returns, whatever the rounding; and still is if rounding in
a sum of the gradient's own terms is added to it. The slack is a small share of (Σ_t ‖a_t‖‖b_t‖)²,
the norms that the terms would have if none cancelled another: it is small unless they all but
cancel. For the Gram matrices A, B of the factors, entry by entry (γ of `dpnlu.gradients.rounding`),

    |fl(A_st) - a_s·a_t| <= γ(d) ‖a_s‖‖a_t‖,    and so for B with γ(p),
    |fl(Σ_st A_st B_st) - ‖G‖²| <= γ(d + p + 2T + 2) (Σ_t ‖a_t‖‖b_t‖)².

Shapes: B examples, T positions, d inputs, p outputs, V rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpnlu.gradients.kernels import add_product_
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms, underflow

# Up to this many positions, comparing all pairs of ids beats sorting them.
_PAIRWISE_POSITIONS = 128


@dataclass(frozen=True)
class SquaredNorms:
    """Squared norms as computed, and how much larger they may truly be.

    Attributes:
        values: (B,).
        slack: (B,), >= 0.
    """

    values: Tensor
    slack: Tensor

    def __add__(self, other: SquaredNorms) -> SquaredNorms:
        return SquaredNorms(self.values + other.values, self.slack + other.slack)


class Gradients(Protocol):
    """The gradients (B, *shape) of B examples with respect to one tensor of that shape.

    Attributes:
        terms: how many terms an entry of a gradient is the sum of, at most.
        entries: how many entries a gradient has.
    """

    @property
    def terms(self) -> int: ...

    @property
    def entries(self) -> int: ...

    def squared_norms(self, grams: GramCache) -> SquaredNorms:
        """Of each example's gradient, in the cheapest way."""

    def norms_written_out(self) -> SquaredNorms:
        """The same from gradients whose terms are added up, where slack is least."""

    def sizes(self) -> Tensor:
        """(B,) sums of the norms of a gradient's terms: an upper bound of its norm."""

    def dense(self) -> Tensor:
        """The gradients themselves, (B, *shape)."""

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        """out += sum over i of coefficients[i] * gradient i; `out` is contiguous, and what has
        coefficient 0 is finite."""

    def finite_rows(self, finite: Tensor) -> Gradients:
        """The same with everything of the examples outside `finite`, (B,) bool, set to zero."""

    def of(self, examples: Tensor) -> Gradients:
        """The gradients of some examples, given by number, (n,)."""


class GramCache:
    """Gram matrices of the tensors met last: query, key and value share one input; the embeddings
    of words, positions and types one gradient."""

    def __init__(self) -> None:
        self._last: list[tuple[Tensor, Tensor]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, T) inner products of the rows of each example."""
        for known, gram in self._last:
            if _is_same(known, rows):
                return gram
        gram = torch.bmm(rows, rows.mT)
        self._last = [*self._last[-3:], (rows, gram)]
        return gram


@dataclass(frozen=True)
class OuterProducts:
    """Gradient i is the (p, d) matrix Σ_t right[i, t] left[i, t]ᵀ, whatever shape that is kept in.

    Attributes:
        left: (B, T, d) what the layer received.
        right: (B, T, p) gradient with respect to what it returned.
        transposed: the tensor is stored as (d, p).
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
        """By whichever way takes fewer multiplications."""
        if self.terms == 1:
            values = (_squared_lengths(self.left) * _squared_lengths(self.right))[:, 0]
            share = growth(self._widths + 8, values.dtype)
            return SquaredNorms(values, self.sizes().square() * share)
        return self.norms_by_gram(grams) if self.takes_gram else self.norms_written_out()

    @property
    def takes_gram(self) -> bool:
        """Whether Gram matrices, 2T² (d + p), take fewer multiplications than gradients, 2T d p."""
        _, positions, d = self.left.shape
        p = self.right.shape[2]
        return positions * (d + p) <= d * p

    def norms_by_gram(self, grams: GramCache) -> SquaredNorms:
        """‖Σ b aᵀ‖² = Σ_st (a_s·a_t)(b_s·b_t) (Li et al. 2022)."""
        lefts, rights = grams(self.left), grams(self.right)
        # Rounding may leave a vanishing norm slightly negative.
        values = (lefts * rights).sum(2).sum(1).clamp_(min=0)
        lengths = _lengths(_diagonal(lefts)) * _lengths(_diagonal(rights))
        # 2T for the sum here, and 2T for that of the gradient's own terms.
        share = growth(self._widths + 4 * self.terms + 4, values.dtype)
        return SquaredNorms(values, lengths.sum(1).square() * share)

    def norms_written_out(self) -> SquaredNorms:
        return _of_written_out(squared_sums(self.dense()), squared_terms(self.entries), self)

    @property
    def _widths(self) -> int:
        return self.left.shape[2] + self.right.shape[2]

    def sizes(self) -> Tensor:
        lengths = _lengths(_squared_lengths(self.left)) * _lengths(_squared_lengths(self.right))
        return lengths.sum(1)

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
        return OuterProducts(
            _zeroed(self.left, finite), _zeroed(self.right, finite), self.transposed
        )

    def of(self, examples: Tensor) -> OuterProducts:
        return OuterProducts(self.left[examples], self.right[examples], self.transposed)


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
        sizes = self._added(_lengths(_diagonal(products)))
        share = growth(self.values.shape[2] + 4 * self.terms + 4, values.dtype)
        return SquaredNorms(values, sizes.square() * share)

    def norms_written_out(self) -> SquaredNorms:
        sums, example, batch = self._merged()
        squares = sums.new_zeros(batch).index_add_(0, example, squared_sums(sums))
        return _of_written_out(squares, squared_terms(sums.shape[1]) + self.terms, self)

    def sizes(self) -> Tensor:
        return self._added(_lengths(_squared_lengths(self.values)))

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
        return Rows(self.ids, _zeroed(self.values, finite), self.shape)

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
        values = self._squared_counts() * _squared_lengths(self.right)
        # Shares are rounded when they scale b, and their sums are those of the gradient's terms.
        share = growth(self.right.shape[1] + 4 * self.terms + 8, values.dtype)
        return SquaredNorms(values, self.sizes().square() * share)

    def norms_written_out(self) -> SquaredNorms:
        return self.rows().norms_written_out()

    def sizes(self) -> Tensor:
        shares = torch.where(self.ids >= 0, self.shares, 0.0).abs().sum(1)
        return shares * _lengths(_squared_lengths(self.right))

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
        shares, right = _zeroed(self.shares, finite), _zeroed(self.right, finite)
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


@dataclass(frozen=True)
class Dense:
    """Gradients written out, for tensors small enough.

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
        share = growth(squared_terms(self.entries), values.dtype)
        return SquaredNorms(values, values * share)

    def sizes(self) -> Tensor:
        return _lengths(squared_sums(self.values))

    def dense(self) -> Tensor:
        return self.values

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        rows = self.values.reshape(len(self.values), self.entries).to(out.dtype)
        out.view(-1).addmv_(rows.mT, coefficients.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Dense:
        return Dense(_zeroed(self.values, finite))

    def of(self, examples: Tensor) -> Dense:
        return Dense(self.values[examples])


def _of_written_out(squares: Tensor, terms: int, use: Gradients) -> SquaredNorms:
    """The squared norms of gradients that were written out: (B,) sums of squares over `terms`
    terms. Rounding, then and in later sums, moves a gradient by at most γ(2T) Σ_t ‖a_t‖‖b_t‖."""
    moved = growth(2 * use.terms, squares.dtype) * use.sizes()
    share = growth(terms, squares.dtype)
    return SquaredNorms(squares, squares * share + (2 * squares.sqrt() + moved) * moved)


def _diagonal(grams: Tensor) -> Tensor:
    """(B, T, T) -> (B, T), as a view that can be compiled."""
    return grams.flatten(1)[:, :: grams.shape[1] + 1]


def _squared_lengths(rows: Tensor) -> Tensor:
    """(…, d) -> (…)."""
    squares: Tensor = torch.linalg.vecdot(rows, rows)
    return squares


def _lengths(squares: Tensor) -> Tensor:
    """Roots of sums of squares, raised by what may have vanished in underflow."""
    return (squares + underflow(squares.dtype)).sqrt()


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in the same memory."""
    return one is other or (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata  # there in traces too
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _as_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, T, ·) as (B·T, ·), in the order of memory that spares copying the wider one."""
    widest = right if right.shape[2] >= left.shape[2] else left
    if not widest.is_contiguous() and widest.transpose(0, 1).is_contiguous():
        left, right = left.transpose(0, 1), right.transpose(0, 1)
    return left.reshape(-1, left.shape[2]), right.reshape(-1, right.shape[2])


def _zeroed(values: Tensor, finite: Tensor) -> Tensor:
    """The rows outside `finite` replaced, not multiplied: 0 · ∞ is not 0."""
    mask = finite.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
