"""Measuring in a process of its own.

glibc gives large blocks of memory back to the system as soon as they are free, and takes page
faults when it needs them again: in a fresh process these slow an ordinary step by up to 1.7 times,
in one that has run for a while by nothing. What is timed is therefore run with an allocator that
keeps its memory, on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# glibc's thresholds for giving memory back, as high as they go.
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# See `dpnlu.gradients.kernels`.
EQUAL_KERNELS = {"DPNLU_KERNELS": "torch"}


def result_of(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """What a module, run as a program, prints as JSON.

    Args:
        environment: variables to set for it.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    variables = {**os.environ, **(environment or {})}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {run.stderr.strip()[-500:]}")
    return json.loads(run.stdout)
