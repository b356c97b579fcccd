"""Memory of the running process, as Linux counts it, or on a CUDA device; None elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpnlu.training.device import resolved_device as resolved_device


@dataclass(frozen=True)
class Memory:
    """How to look at one kind of memory.

    Attributes:
        reset_peak: forgets the peak so far.
        peak, current: in MiB; None: unknown here.
    """

    reset_peak: Callable[[], None]
    peak: Callable[[], float | None]
    current: Callable[[], float | None]


def memory_of(device: str) -> Memory:
    """The memory of the device: what torch has handed out on CUDA, else that of the process."""
    if not device.startswith("cuda"):
        return Memory(reset_peak_memory, peak_memory, current_memory)
    from torch import cuda

    return Memory(
        reset_peak=partial(cuda.reset_peak_memory_stats, device),
        peak=lambda: cuda.max_memory_allocated(device) / 2**20,
        current=lambda: cuda.memory_allocated(device) / 2**20,
    )


def reset_peak_memory() -> None:
    """Forget the peak so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> float | None:
    """Peak resident memory in MiB since the last reset."""
    return _status("VmHWM:")


def current_memory() -> float | None:
    """Resident memory in MiB."""
    return _status("VmRSS:")


def _status(field: str) -> float | None:
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith(field))
        return int(line.split()[1]) / 1024
    return None
