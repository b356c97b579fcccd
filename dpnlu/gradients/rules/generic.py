"""Operations without a rule of their own: vectorised automatic differentiation of the operation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.operations import replaced
from dpnlu.gradients.records import GradientRule

_REMEDY = (
    "Expected the examples in dimension 0, each apart from the others: use a layer that is "
    "supported, or engine='per_example'."
)


def vectorized(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batched: list[Tensor],
    learned: list[Tensor],
) -> GradientRule:
    """Per-example gradients of `func` by `vmap`: each example is computed again as a batch of one.

    Args:
        batched: those of its arguments that are batched.
        learned: those that are batch-independent and require gradients.
    """
    received = [tensor.detach() for tensor in batched]
    detached = [tensor.detach() for tensor in learned]
    keys = [id(tensor) for tensor in (*batched, *learned)]

    def one_example(examples: list[Tensor], gradient: Tensor) -> list[Tensor]:
        def output(*weights: Tensor) -> Tensor:
            values = (*(tensor.unsqueeze(0) for tensor in examples), *weights)
            stand_ins = dict(zip(keys, values, strict=True))
            new_args, new_kwargs = replaced((args, kwargs), stand_ins)
            result: Tensor = func(*new_args, **new_kwargs)
            return result

        back = torch.func.vjp(output, *detached)[1]
        return list(back(gradient.unsqueeze(0)))

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        rows = gradient.shape[:1]
        if not rows or any(tensor.shape[:1] != rows for tensor in received):
            raise UnsupportedLayerError(f"{name} is applied to {_shapes(received)}. {_REMEDY}")
        warnings.warn(
            f"No rule for {name}: its per-example gradients are written out one by one (exact, but "
            "slow and large).",
            stacklevel=2,
        )
        try:
            found = torch.func.vmap(one_example)(received, gradient)
        except RuntimeError as error:
            raise UnsupportedLayerError(f"{name} cannot be vectorised: {error} {_REMEDY}") from None
        for tensor, values in zip(learned, found, strict=True):
            yield tensor, Dense(layout.apart(values).sum(1))

    name = getattr(func, "__name__", func)
    return rule


def _shapes(tensors: list[Tensor]) -> str:
    return "inputs of shapes " + ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
