"""Memory of the running process, as Linux counts it; None elsewhere."""

from __future__ import annotations

import contextlib
from pathlib import Path


def reset_peak_memory() -> None:
    """Start measuring the peak anew."""
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
