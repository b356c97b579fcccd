"""Products with a matrix or vector of weights, written by hand: `x @ W`, `W @ x`, `x @ v`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.layout import Layout, by_example
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.records import GradientRule


def matmul(recorder: Recorder, left: Tensor, right: Tensor) -> Any:
    """A product with weights on one side; NotImplemented if these are a batch of matrices."""
    if recorder.is_batch_independent(right) and right.dim() <= 2:
        rule = _weights_right(left, right)
    elif recorder.is_batch_independent(left) and left.dim() == 2:
        rule = _weights_left(left, right)
    else:
        return NotImplemented
    output = torch.matmul(left, right)
    if output.requires_grad:
        recorder.record(output, rule, dims=range(max(1, output.dim() - (right.dim() == 2))))
    return output


def _weights_right(left: Tensor, weight: Tensor) -> GradientRule:
    """y = x W, with W (d, p) or (d,): the weight's gradient is Σ_t a_t b_tᵀ."""
    received, is_vector = left.detach(), weight.dim() == 1
    if left.dim() == 1:
        raise UnsupportedLayerError(
            "expected the examples in dimension 0 of what weights are multiplied with, got one "
            "vector; give it one row for each example."
        )

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        arrived = gradient.unsqueeze(-1) if is_vector else gradient
        pair = by_example(received, layout), by_example(arrived, layout)
        yield weight, OuterProducts(*pair, transposed=True)

    return rule


def _weights_left(weight: Tensor, right: Tensor) -> GradientRule:
    """y = W x, with x (B, …, d, p): as xᵀ Wᵀ."""
    if right.dim() < 3:
        raise UnsupportedLayerError(
            f"expected the examples in dimension 0 of what weights are multiplied with, got shape "
            f"{tuple(right.shape)} on the right of W @ x; write x @ W.T instead."
        )
    received = right.detach().mT

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        yield weight, OuterProducts(by_example(received, layout), by_example(gradient.mT, layout))

    return rule


def _reflected(recorder: Recorder, right: Tensor, left: Tensor) -> Any:
    return matmul(recorder, left, right)


REWRITES = {
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.mv: matmul,
    Tensor.matmul: matmul,
    Tensor.mm: matmul,
    Tensor.mv: matmul,
    Tensor.__matmul__: matmul,
    Tensor.__rmatmul__: _reflected,
}
