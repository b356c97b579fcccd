"""Layouts shared by the rules."""

from __future__ import annotations

import torch
from torch import Tensor

from dpnlu.tape import UnsupportedLayerError


def by_example(values: Tensor, batch: int) -> Tensor:
    """(B, …, d), or (B·k, d) flattened example after example -> (B, T, d), in full precision.

    Raises:
        UnsupportedLayerError: dimension 0 does not hold whole examples.
    """
    if (
        values.dim() == 0
        or (batch and values.shape[0] % batch)
        or not (batch or values.numel() == 0)
    ):
        raise UnsupportedLayerError(
            f"expected dimension 0 of what it computes to hold the {batch} examples, got shape "
            f"{tuple(values.shape)}; put the examples first (batch_first=True)."
        )
    positions = values.shape[:-1].numel() // max(batch, 1)
    return full_precision(values).reshape(batch, positions, values.shape[-1])


def full_precision(values: Tensor) -> Tensor:
    """Half-precision values as float32, in which norms and sums are taken."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
