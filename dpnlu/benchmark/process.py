"""Measuring in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def result_of(module: str, *arguments: str) -> Any:
    """What a module, run as a program, prints as JSON.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {run.stderr.strip()[-500:]}")
    return json.loads(run.stdout)
