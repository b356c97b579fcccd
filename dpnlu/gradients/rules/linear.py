"""Products with a weight matrix: `nn.Linear`, GPT-2's `Conv1D`, the inner layers of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import (
    Dense,
    Gradients,
)
from dpnlu.gradients.layout import Layout, by_example
from dpnlu.gradients.operations import LayerRule
from dpnlu.gradients.records import GradientRule


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> GradientRule:
    """y = x Wᵀ + b: the weight's gradient is Σ_t b_t a_tᵀ, the bias's Σ_t b_t."""
    received = input.detach()

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        right = by_example(gradient, layout)
        if weight.requires_grad:
            yield weight, OuterProducts(by_example(received, layout), right)
        if bias is not None and bias.requires_grad:
            yield bias, Dense(right.sum(1))

    return rule


def addmm(bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> GradientRule:
    """y = b + x W, the weight stored as (d, p)."""
    if any(scale != 1 for scale in scales.values()):
        raise NotImplementedError("torch.addmm with alpha or beta")
    received = input.detach()

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        right = by_example(gradient, layout)
        if weight.requires_grad:
            yield weight, OuterProducts(by_example(received, layout), right, transposed=True)
        if bias.requires_grad:
            yield bias, Dense(right.sum(1))

    return rule


RULES = {F.linear: LayerRule(linear), torch.addmm: LayerRule(addmm, input=1)}
