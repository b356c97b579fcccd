"""Normalisation over the features of one position: `nn.LayerNorm`, `nn.RMSNorm`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients import Dense, Gradients
from dpnlu.layout import Layout, added_up, full_precision
from dpnlu.operations import Rule
from dpnlu.trace import Finish


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Finish:
    """y = w x̂ + b: the weight's gradient is Σ_t b_t x̂_t, the bias's Σ_t b_t."""
    received = input.detach()

    def finish(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        gradient = full_precision(gradient)
        if weight is not None and weight.requires_grad:
            standardized = F.layer_norm(full_precision(received), normalized_shape, eps=eps)
            yield weight, Dense(added_up(standardized.mul_(gradient), layout, weight.shape))
        if bias is not None and bias.requires_grad:
            yield bias, Dense(added_up(gradient, layout, bias.shape))

    return finish


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Finish:
    """y = w x / rms(x): the weight's gradient is Σ_t b_t x_t / rms(x_t)."""
    received = input.detach()

    def finish(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        if weight is not None and weight.requires_grad:
            scaled = F.rms_norm(full_precision(received), normalized_shape, eps=eps)
            products = scaled.mul_(full_precision(gradient))
            yield weight, Dense(added_up(products, layout, weight.shape))

    return finish


RULES = {F.layer_norm: Rule(layer_norm), F.rms_norm: Rule(rms_norm), torch.rms_norm: Rule(rms_norm)}
