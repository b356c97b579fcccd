"""Peak memory of a private step over that of an ordinary one, each in a process of its own."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dpnlu.benchmark.cases import Case, named
from dpnlu.benchmark.process import result_of

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


def measure(case: Case) -> Memory:
    """Run a few steps of each kind in a fresh process and read its peak (Linux).

    Raises:
        RuntimeError: the process failed.
    """
    peaks = {kind: peak(case, kind) for kind in ("ordinary", "private")}
    return Memory(
        case=case.name,
        ordinary_mib=peaks["ordinary"],
        private_mib=peaks["private"],
        ratio=peaks["private"] / peaks["ordinary"],
    )


def peak(case: Case, kind: str, *, compiles: bool = False) -> float:
    """Peak memory of a few steps in a fresh process, in MiB, beyond what the libraries take.

    Args:
        kind: "ordinary" or "private".
        compiles: compiled steps, after compiling; the compiler counts as a library.

    Raises:
        RuntimeError: the process failed.
    """
    found = result_of("dpnlu.benchmark.memory", case.name, kind, *["compiled"] * compiles)
    return float(found)


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


def _peak(case: Case, kind: str, *, compiles: bool) -> float:
    """Peak resident memory above that of the imported libraries, in MiB."""
    import torch

    from dpnlu.benchmark.steps import ordinary, private
    from dpnlu.runs.resources import current_memory, peak_memory, reset_peak_memory

    case.build()  # loads whatever is loaded when first needed
    if compiles:
        torch.compile(torch.exp)(torch.ones(2))  # so does this
    reset_peak_memory()
    before = current_memory()
    torch.manual_seed(0)
    run = {"ordinary": ordinary, "private": private}[kind]
    with run(case, case.build().train(), compiles=compiles) as step:
        if compiles:
            step()
            step()
            gc.collect()
            reset_peak_memory()
        for _ in range(_STEPS):
            step()
    peak = peak_memory()
    if peak is None or before is None:
        raise RuntimeError("peak memory can be read on Linux only")
    return peak - before


if __name__ == "__main__":
    name, kind, *more = sys.argv[1:]
    print(json.dumps(_peak(named(name), kind, compiles=more == ["compiled"])))
