"""Rows looked up in a table: `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from dpnlu.errors import UnsupportedLayerError
from dpnlu.gradients import Gradients, Rows
from dpnlu.layout import Layout, by_example
from dpnlu.operations import Rule
from dpnlu.trace import Finish


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Finish:
    """y_t = W[id_t]: the table's gradient is Σ_t e_{id_t} b_tᵀ; the padding row gets none."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise UnsupportedLayerError(
            "expected an embedding without max_norm, scale_grad_by_freq and sparse, which change "
            "weights or gradients depending on the whole batch; switch them off."
        )
    ids = input.detach()
    if padding_idx is not None:
        ids = ids.masked_fill(ids == padding_idx % weight.shape[0], -1)

    def finish(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        values = by_example(gradient, layout)
        rows = layout.apart(ids, fill=-1).reshape(values.shape[:2])
        yield weight, Rows(rows, values, tuple(weight.shape))

    return finish


RULES = {F.embedding: Rule(embedding)}
