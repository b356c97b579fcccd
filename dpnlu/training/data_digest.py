"""A digest of a data set, by which processes, or a run and the one that resumes it, tell it from
others."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

# Evenly spread over the data set; all of a large one would take minutes.
_TOLD_BY = 1000


def digest_of(dataset: Any, *, key: str) -> str:
    """A keyed digest of the size and of at most 1000 examples, evenly spread, in their order.

    Args:
        dataset: indexed from 0, with a length.
        key: 32 bytes in hexadecimal.
    """
    size = len(dataset)
    numbers = np.unique(np.linspace(0, size - 1, num=min(size, _TOLD_BY)).round().astype(int))
    found = hmac.new(bytes.fromhex(key), f"{size}\n".encode(), digestmod="sha256")
    for number in numbers.tolist():
        found.update(repr(_plain(dataset[number])).encode() + b"\n")
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """An example as numbers, strings and lists, whatever holds them."""
    if isinstance(value, Mapping):
        return [(str(name), _plain(value[name])) for name in sorted(value, key=str)]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | bytes | int | float | None) else type(value).__name__
