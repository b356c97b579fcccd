"""Peak memory of a private step over that of an ordinary one, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dpnlu.benchmark.cases import CASES, Case
from dpnlu.progress import Told

_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one case took at its peak, in MiB, beyond what the libraries take.

    Attributes:
        ratio: private / ordinary.
        target: what was aimed at.
    """

    case: str
    ordinary_mib: float
    private_mib: float
    ratio: float
    target: float = 1.20


def measure(case: Case, *, told: Told) -> Memory:
    """Run a few steps of each kind in a fresh process and read its peak (Linux).

    Raises:
        RuntimeError: the process failed.
    """
    peaks = {}
    for number, kind in enumerate(("ordinary", "private"), start=1):
        command = [sys.executable, "-m", "dpnlu.benchmark.memory", case.name, kind]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"measuring {case.name} failed: {run.stderr.strip()[-500:]}")
        peaks[kind] = float(json.loads(run.stdout))
        told(case.name, number, 2)
    return Memory(
        case=case.name,
        ordinary_mib=peaks["ordinary"],
        private_mib=peaks["private"],
        ratio=peaks["private"] / peaks["ordinary"],
    )


def table(rows: Sequence[Memory]) -> str:
    """The results in Markdown."""
    lines = [
        "| work | ordinary MiB | private MiB | ratio | target |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.case} | {row.ordinary_mib:.0f} | {row.private_mib:.0f} | **{row.ratio:.2f}** | "
        f"{row.target:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _peak(case: Case, kind: str) -> float:
    """Peak resident memory above that of the imported libraries, in MiB."""
    import torch

    from dpnlu.benchmark.steps import ordinary, private
    from dpnlu.resources import current_memory, peak_memory, reset_peak_memory

    case.build()  # loads whatever is loaded when first needed
    reset_peak_memory()
    before = current_memory()
    torch.manual_seed(0)
    step = {"ordinary": ordinary, "private": private}[kind](case, case.build().train())
    for _ in range(_STEPS):
        step()
    peak = peak_memory()
    if peak is None or before is None:
        raise RuntimeError("peak memory can be read on Linux only")
    return peak - before


if __name__ == "__main__":
    name, kind = sys.argv[1:]
    print(json.dumps(_peak(next(case for case in CASES if case.name == name), kind)))
