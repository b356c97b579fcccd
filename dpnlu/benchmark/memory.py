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


def measure(case: Case, *, device: str = "cpu") -> Memory:
    """Run a few steps of each kind in a fresh process and read its peak: Linux', or CUDA's.

    Raises:
        RuntimeError: the process failed.
    """
    peaks = {kind: peak(case, kind, device=device) for kind in ("ordinary", "private")}
    return Memory(
        case=case.name,
        ordinary_mib=peaks["ordinary"],
        private_mib=peaks["private"],
        ratio=peaks["private"] / peaks["ordinary"],
    )


def peak(case: Case, kind: str, *, compiles: bool = False, device: str = "cpu") -> float:
    """Peak memory of a few steps in a fresh process, in MiB, beyond what the libraries take.

    Args:
        kind: "ordinary" or "private".
        compiles: compiled steps, after compiling; the compiler counts as a library.

    Raises:
        RuntimeError: the process failed.
    """
    module = "dpnlu.benchmark.memory"
    found = result_of(module, case.name, kind, device, *["compiled"] * compiles)
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


def _peak(case: Case, kind: str, *, compiles: bool, device: str) -> float:
    """Peak memory above that of the imported libraries, in MiB: resident, or that of the device."""
    import torch

    from dpnlu.benchmark.steps import ordinary, private
    from dpnlu.runs.resources import memory_of

    case.build()  # loads whatever is loaded when first needed
    if compiles:
        torch.compile(torch.exp)(torch.ones(2))  # so does this
    memory = memory_of(device)
    memory.reset_peak()
    before = memory.current()
    torch.manual_seed(0)
    run = {"ordinary": ordinary, "private": private}[kind]
    with run(case, case.build().train(), compiles=compiles, device=device) as step:
        if compiles:
            step()
            step()
            gc.collect()
            memory.reset_peak()
        for _ in range(_STEPS):
            step()
    peak = memory.peak()
    if peak is None or before is None:
        raise RuntimeError("peak memory can be read on Linux and of CUDA only")
    return peak - before


if __name__ == "__main__":
    name, kind, device, *more = sys.argv[1:]
    print(json.dumps(_peak(named(name), kind, compiles=more == ["compiled"], device=device)))
