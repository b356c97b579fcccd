"""Rows looked up in a table: `nn.Embedding`, `nn.EmbeddingBag`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.layout import Layout, by_example, full_precision
from dpnlu.gradients.operations import LayerRule, first_alone
from dpnlu.gradients.records import GradientRule
from dpnlu.gradients.rows import (
    Bags,
    Rows,
)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> GradientRule:
    """y_t = W[id_t]: the table's gradient is Σ_t e_{id_t} b_tᵀ; the padding row gets none."""
    _check_options(max_norm, scale_grad_by_freq, sparse)
    ids = _without_padding(input, padding_idx, len(weight))

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        values = by_example(gradient, layout)
        rows = layout.apart(ids, fill=-1).reshape(values.shape[:2])
        yield weight, Rows(rows, values, tuple(weight.shape))

    return rule


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> GradientRule:
    """y = Σ_t c_t W[id_t], or the mean or largest of these rows: the table's gradient is
    Σ_t e_{id_t} (c_t b)ᵀ, or only those entries of b that row t gave.
    """
    _check_options(max_norm, scale_grad_by_freq, sparse)
    ids = _without_padding(input, padding_idx, len(weight))
    scales = None if per_sample_weights is None else per_sample_weights.detach()
    if offsets is not None:
        starts = offsets[:-1] if include_last_offset else offsets
        place = _places_in_bags(starts, len(ids))
        ids, scales = _bags(ids, place, -1), scales if scales is None else _bags(scales, place, 0)
    table = weight.detach() if mode == "max" else None

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        gradient, shape = full_precision(gradient), tuple(weight.shape)
        is_one_each = layout.owners is None and len(gradient) == layout.batch
        if table is None and is_one_each:
            yield (
                weight,
                Bags(ids, _row_weights(ids, scales, mode, gradient.dtype), gradient, shape),
            )
            return
        if table is not None:
            rows = table[ids].masked_fill((ids < 0)[:, :, None], -torch.inf)
            values = torch.zeros_like(rows, dtype=gradient.dtype)
            values.scatter_(1, rows.argmax(1, keepdim=True), gradient[:, None])
        else:
            values = _row_weights(ids, scales, mode, gradient.dtype)[:, :, None] * gradient[:, None]
        apart = layout.apart(values).flatten(1, 2)
        yield weight, Rows(layout.apart(ids, fill=-1).flatten(1), apart, shape)

    return rule


def _row_weights(ids: Tensor, scales: Tensor | None, mode: str, dtype: torch.dtype) -> Tensor:
    """(n, T) the weight of each row in its bag."""
    if scales is not None:
        return scales.to(dtype)
    kept = (ids >= 0).to(dtype)
    return kept / kept.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else kept


def _places_in_bags(starts: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """For `count` ids in a row: the bag of each, its place in the bag, and the number of bags."""
    every = torch.arange(count, device=starts.device)
    bags = torch.searchsorted(starts.contiguous(), every, right=True) - 1
    return bags, every - starts[bags], len(starts)


def _bags(values: Tensor, place: tuple[Tensor, Tensor, int], fill: int) -> Tensor:
    """(count,) -> (bags, size of the largest), the rest filled."""
    bags, inner, count = place
    largest = int(inner.max()) + 1 if len(inner) else 0
    found = values.new_full((count, largest), fill)
    found[bags, inner] = values
    return found


def _check_options(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise UnsupportedLayerError(
            "expected an embedding without max_norm, scale_grad_by_freq and sparse, which change "
            "weights or gradients depending on the whole batch; switch them off."
        )


def _without_padding(ids: Tensor, padding_idx: int | None, rows: int) -> Tensor:
    """The ids into a table of so many rows, with -1 for padding, whose row gets no gradient."""
    ids = ids.detach()
    return ids if padding_idx is None else ids.masked_fill(ids == padding_idx % rows, -1)


RULES = {
    F.embedding: LayerRule(embedding),
    F.embedding_bag: LayerRule(embedding_bag, dims=first_alone),
}
