"""Gradient rules: how weights act in each of torch's operations. One file per layer family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients.operations import Operations
from dpnlu.gradients.rules import (
    attention,
    cells,
    convolution,
    einsum,
    embedding,
    experts,
    indexing,
    linear,
    matmul,
    normalization,
    recurrent,
)
from dpnlu.gradients.rules.generic import vectorized

_BROADCASTING = frozenset(
    {
        torch.add,
        torch.sub,
        torch.mul,
        torch.div,
        torch.where,
        torch.matmul,
        Tensor.add,
        Tensor.add_,
        Tensor.sub,
        Tensor.sub_,
        Tensor.mul,
        Tensor.mul_,
        Tensor.div,
        Tensor.matmul,
        Tensor.where,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.__sub__,
        Tensor.__rsub__,
        Tensor.__mul__,
        Tensor.__rmul__,
        Tensor.__matmul__,
        Tensor.__truediv__,
        Tensor.__iadd__,
        Tensor.__imul__,
        F.scaled_dot_product_attention,
    }
)

_ROW_WISE = frozenset(
    {
        torch.bmm,
        Tensor.bmm,
        torch.baddbmm,
        torch.cat,
        torch.concat,
        torch.concatenate,
        torch.stack,
        torch.hstack,
    }
)

OPERATIONS = Operations(
    rules={**linear.RULES, **embedding.RULES, **normalization.RULES, **convolution.RULES},
    rewrites={
        **attention.REWRITES,
        **recurrent.REWRITES,
        **cells.REWRITES,
        **matmul.REWRITES,
        **einsum.REWRITES,
        **indexing.REWRITES,
        **experts.REWRITES,
    },
    rearrangements=recurrent.REARRANGEMENTS,
    broadcasting=_BROADCASTING,
    row_wise=_ROW_WISE,
    fallback=vectorized,
)
