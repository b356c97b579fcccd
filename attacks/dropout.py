"""Dropout in an attack: the same units dropped for all examples.

What a model trained with dropout has made small is the mean of its loss over the masks, more than
the loss in evaluation mode. To compare examples by that mean, each mask is applied to all of them,
so that what it does to every example cancels (common random numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer of the model drops units in training."""
    return any(_drops(module) for module in model.modules())


@contextmanager
def common_dropout(model: nn.Module, *, generator: torch.Generator) -> Iterator[None]:
    """Have the `nn.Dropout` layers drop units, in evaluation mode too, the same for all examples.

    Each call of a layer draws a mask of its own. Dropout inside other layers, such as attention and
    recurrent ones, stays off.

    Args:
        model: takes examples of equal length, along dimension 0.
        generator: on the CPU; of the masks.
    """

    def drop(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        states: Tensor = args[0]
        kept = 1 - module.p  # type: ignore[operator]
        mask = torch.rand(1, *states.shape[1:], generator=generator) < kept
        return torch.where(mask.to(states.device), states / kept, 0.0)

    hooks = [m.register_forward_hook(drop) for m in model.modules() if _drops(m)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0
