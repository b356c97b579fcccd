"""Per-example gradients of one tensor, in the form in which back-propagation delivers them.

A linear layer delivers its weight's gradient as two factors, an embedding as rows, everything
small as plain tensors. Each form gives squared norms and weighted sums without being written out
where that is dearer. All sums and norms are kept in float32 or better.

Shapes: B examples, T positions, d inputs, p outputs, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpnlu.products import add_product_

# Up to this many positions, comparing all pairs of ids beats sorting them.
_PAIRWISE_POSITIONS = 128


class Gradients(Protocol):
    """The gradients (B, *shape) of B examples with respect to one tensor of that shape."""

    def squared_norms(self, grams: GramCache) -> Tensor:
        """(B,) squared L2 norms."""

    def dense(self) -> Tensor:
        """The gradients themselves, (B, *shape)."""

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        """out += sum over i of coefficients[i] * gradient i; `out` is contiguous, and what has
        coefficient 0 is finite."""

    def finite_rows(self, finite: Tensor) -> Gradients:
        """The same with everything of the examples outside `finite`, (B,) bool, set to zero."""


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

    def squared_norms(self, grams: GramCache) -> Tensor:
        """By whichever way takes fewer multiplications."""
        if self.left.shape[1] == 1:
            return _squared_sums(self.left) * _squared_sums(self.right)
        return self.norms_by_gram(grams) if self.takes_gram else self.norms_written_out()

    @property
    def takes_gram(self) -> bool:
        """Whether Gram matrices, 2T² (d + p), take fewer multiplications than gradients, 2T d p."""
        _, positions, d = self.left.shape
        p = self.right.shape[2]
        return positions * (d + p) <= d * p

    def norms_by_gram(self, grams: GramCache) -> Tensor:
        """‖Σ b aᵀ‖² = Σ_st (a_s·a_t)(b_s·b_t) (Li et al. 2022)."""
        products = grams(self.left) * grams(self.right)
        # Rounding may leave a vanishing norm slightly negative.
        return products.flatten(1).sum(1).clamp_(min=0)

    def norms_written_out(self) -> Tensor:
        """From the gradients themselves."""
        return _squared_sums(self.dense())

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

    def squared_norms(self, grams: GramCache) -> Tensor:
        if not self._is_pairwise:
            return _squared_sums_by_example(*self._merged())
        same = (self.ids[:, :, None] == self.ids[:, None, :]) & (self.ids >= 0)[:, None, :]
        return (grams(self.values) * same).flatten(1).sum(1).clamp_(min=0)

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
class Dense:
    """Gradients written out, for tensors small enough.

    Attributes:
        values: (B, *shape).
    """

    values: Tensor

    def squared_norms(self, grams: GramCache) -> Tensor:
        return _squared_sums(self.values)

    def dense(self) -> Tensor:
        return self.values

    def add_weighted_sum(self, coefficients: Tensor, out: Tensor) -> None:
        rows = _flat(self.values).to(out.dtype)
        out.view(-1).addmv_(rows.mT, coefficients.to(out.dtype))

    def finite_rows(self, finite: Tensor) -> Dense:
        return Dense(_zeroed(self.values, finite))


def combine(uses: Sequence[Gradients]) -> list[Gradients]:
    """Several uses of one tensor as at most one of each form and shape; their sum stays."""
    outer = [use for use in uses if isinstance(use, OuterProducts)]
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


def squared_norms(parts: Sequence[Gradients], grams: GramCache) -> Tensor:
    """(B,) squared norms of the sum of `parts`, cross terms included."""
    total = parts[0].squared_norms(grams)
    for index, part in enumerate(parts[1:], start=1):
        total = total + part.squared_norms(grams)
        for earlier in parts[:index]:
            total = total + 2 * _inner_products(earlier, part)
    return total.clamp(min=0) if len(parts) > 1 else total


def _inner_products(one: Gradients, other: Gradients) -> Tensor:
    """(B,) inner product of the two gradients of each example."""
    if isinstance(one, OuterProducts) and isinstance(other, Rows) and _is_tied(one, other):
        return _tied_inner_products(one, other)
    return (one.dense().flatten(1) * other.dense().flatten(1)).sum(1)


def _is_tied(head: OuterProducts, table: Rows) -> bool:
    """Whether the table's rows are those of the head's matrix."""
    return not head.transposed and table.values.shape[2] == head.left.shape[2]


def _tied_inner_products(head: OuterProducts, table: Rows) -> Tensor:
    """An embedding tied to an output layer (Ding et al. 2024): ⟨Σ_s b_s a_sᵀ, Σ_t e_t v_tᵀ⟩ is
    Σ_st b_s[id_t] (a_s · v_t), so only the looked-up entries of b are needed."""
    kept = table.ids >= 0
    index = table.ids.clamp(min=0)[:, None, :].expand(-1, head.right.shape[1], -1)
    looked_up = head.right.gather(2, index) * kept[:, None, :]
    return (looked_up * torch.bmm(head.left, table.values.mT)).flatten(1).sum(1)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers in the same memory."""
    return one is other or (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata  # there in traces too
        and one.storage_offset() == other.storage_offset()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


def _squared_sums(values: Tensor) -> Tensor:
    """(B, …) -> (B,) sums of squares."""
    flat = _flat(values)
    squares: Tensor = torch.linalg.vecdot(flat, flat)
    return squares


def _flat(values: Tensor) -> Tensor:
    """(B, …) -> (B, n), for any B."""
    return values.reshape(values.shape[0], values.shape[1:].numel())


def _squared_sums_by_example(values: Tensor, example: Tensor, batch: int) -> Tensor:
    return values.new_zeros(batch).index_add_(0, example, _squared_sums(values))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)


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
