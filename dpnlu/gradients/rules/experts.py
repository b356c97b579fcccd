"""Experts that take the rows that were routed to them, those of all examples side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from dpnlu.gradients.errors import UnsupportedLayerError


def grouped_mm(*_: Any, **__: Any) -> Any:
    """Rows sorted by expert, with no dimension that holds the examples.

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
