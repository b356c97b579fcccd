"""Memory that is free, handed back to the system.

The C library keeps what was freed between tensors that live on. Every phase of a check leaves holes
of its own sizes, into which the tensors of the next do not fit: a checked batch of a large model
took a tenth more memory than the tensors in it.
"""

from __future__ import annotations

import ctypes
from typing import Any

from dpnlu.gradients.trace import Trace


def _found() -> Any:
    """glibc's `malloc_trim`; None: another library."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        return None


_trim = _found()


def hand_back(trace: Trace) -> None:
    """Hand back what is free, where what arrives at the places of a batch takes much memory; of a
    small batch it would take more time than the batch."""
    if _trim is not None and len(trace.pieces()) > 1:
        _trim(0)
