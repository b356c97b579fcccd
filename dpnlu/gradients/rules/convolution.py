"""Convolutions, as products with a weight matrix: `nn.Conv1d`, `nn.Conv2d`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import (
    Dense,
    Gradients,
)
from dpnlu.gradients.layout import Layout, by_example, full_precision
from dpnlu.gradients.operations import LayerRule
from dpnlu.gradients.records import GradientRule

Sizes = int | Sequence[int]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> GradientRule:
    """y_t = W x_[t…t+k] + b: a linear map of every window of the input."""
    received = input.detach()
    dims = weight.dim() - 2

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        right = by_example(gradient.flatten(2).mT, layout)
        if weight.requires_grad:
            kernel = tuple(weight.shape[2:])
            windows = _windows(
                full_precision(received),
                kernel=kernel,
                stride=_sizes(stride, dims),
                padding=_padding(padding, kernel, _sizes(dilation, dims)),
                dilation=_sizes(dilation, dims),
            )
            yield weight, _products(by_example(windows, layout), right, groups)
        if bias is not None and bias.requires_grad:
            yield bias, Dense(right.sum(1))

    return rule


def _products(left: Tensor, right: Tensor, groups: int) -> Gradients:
    """The weight's gradient (p, d / groups, …): each group of channels has its own block."""
    if groups == 1:
        return OuterProducts(left, right)
    blocks = (torch.unflatten(values, 2, (groups, -1)) for values in (right, left))
    return Dense(torch.einsum("btgo,btgi->bgoi", *blocks).flatten(1, 2))


def _windows(
    values: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """(N, channels, …) -> (N, positions, channels · kernel): the inputs of each output position.

    What `F.unfold` does, of one dimension as of two; several times as fast on a CPU.
    """
    padded = F.pad(values, [side for sides in reversed(padding) for side in sides])
    reaches = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    outputs = [
        (length - reach - 1) // step + 1
        for length, reach, step in zip(padded.shape[2:], reaches, stride, strict=True)
    ]
    windows = padded.new_empty(*padded.shape[:2], *kernel, *outputs)
    for place in itertools.product(*(range(size) for size in kernel)):
        into, read = windows, padded
        for dim, at in enumerate(place):
            start, reach = dilation[dim] * at, stride[dim] * (outputs[dim] - 1) + 1
            into = into.select(2, at)
            read = read.narrow(2 + dim, start, reach).movedim(2 + dim, 0)[:: stride[dim]]
            read = read.movedim(0, 2 + dim)
        into.copy_(read)
    return windows.flatten(1, 1 + len(kernel)).flatten(2).mT


def _sizes(value: Sizes, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims // len(value))


def _padding(
    value: Sizes | str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """(before, after) in each dimension; with "same", the odd one comes after, as in torch."""
    if value == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(value, str):  # "valid"
        return ((0, 0),) * len(kernel)
    return tuple((size, size) for size in _sizes(value, len(kernel)))


_RULE = LayerRule(convolution, dims=lambda dims: range(1))
RULES = {torch.conv1d: _RULE, torch.conv2d: _RULE}
