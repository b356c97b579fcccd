"""Mixtures of experts that multiply rows of all examples, sorted by the expert they go to."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dpnlu.gradients.errors import UnsupportedLayerError


def grouped_mm(*_: Any, **__: Any) -> Any:
    """Refuse rows sorted by expert, as no dimension of them holds the examples.

    Raises:
        UnsupportedLayerError: always.
    """
    raise UnsupportedLayerError(
        "expected experts whose rows can be told apart by example, got a product of rows that were "
        "sorted by routing; pass experts_implementation='batched_mm' or 'eager' to "
        "from_pretrained or from_config."
    )


_GROUPED = ((torch, "_grouped_mm"), (F, "grouped_mm"), (torch, "grouped_mm"))
REWRITES: dict[Any, Any] = {
    getattr(module, name): grouped_mm for module, name in _GROUPED if hasattr(module, name)
}
