"""Gradients by plain automatic differentiation, and their norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.rounding import growth, squared_sums, squared_terms


def gradient_of(loss: Tensor, parameters: list[nn.Parameter], *, keep_graph: bool) -> list[Tensor]:
    """The gradient of a scalar, zero where it does not depend on a parameter."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=keep_graph)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def norm_of(gradients: list[Tensor]) -> Tensor:
    """() L2 norm over several tensors together, rounded up."""
    squares = torch.stack([squared_sums(full[None]).sum() for full in map(_full, gradients)])
    terms = len(gradients) + max(squared_terms(gradient.numel()) for gradient in gradients)
    return (squares.sum() * (1 + growth(terms, squares.dtype))).sqrt()


_HALF = (torch.float16, torch.bfloat16)


def _full(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype in _HALF else gradient


@contextmanager
def nothing_accumulated(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Refuse backward passes that leave gradients at parameters, where nothing clips them.

    Raises:
        UnsupportedLayerError: one does.
    """
    before = {parameter for parameter in parameters if parameter.grad is not None}
    yield
    if any(parameter.grad is not None for parameter in parameters if parameter not in before):
        for parameter in set(parameters) - before:
            parameter.grad = None
        raise UnsupportedLayerError(
            "Expected gradients that automatic differentiation returns, got some that the model's "
            "own autograd function adds to parameters by calling backward() inside (reversible "
            "layers do): switch to layers without it, or freeze their parameters."
        )
