"""Time of a private step over that of an ordinary one: interleaved pairs, median of ratios.

Each case has a process of its own, so that none inherits another's memory. Where private steps
take other kernels than torch's, a case is measured once more with torch's alone on both sides: what
a user gets on this processor, and what the method costs.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpnlu.benchmark.cases import Case, named
from dpnlu.benchmark.process import EQUAL_KERNELS, KEEPS_MEMORY, result_of
from dpnlu.benchmark.steps import Step, ordinary, private
from dpnlu.gradients.kernels import are_those_of_torch
from dpnlu.gradients.recurrent.native import scan_for

# Pairs of steps before those that are timed: memory is there then, and most early checks are done.
_WARM_UP = 4


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What one case took.

    Attributes:
        ordinary_ms, private_ms: median times of a logical step.
        ratio: median over pairs of private / ordinary.
        ratios: the quartiles of the same.
        equal_ratio: the ratio with torch's kernels alone on both sides.
        target: what was aimed at.
    """

    case: str
    ordinary_ms: float
    private_ms: float
    ratio: float
    ratios: tuple[float, float]
    equal_ratio: float
    target: float | None


def measure(case: Case, *, pairs: int, device: str = "cpu") -> Overhead:
    """Time a case in a fresh process with as many threads as this one.

    Raises:
        RuntimeError: the process failed.
    """
    ours = _result(case, pairs=pairs, device=device, environment=KEEPS_MEMORY)
    equal = ours
    if device == "cpu" and _takes_other_kernels(case):
        environment = KEEPS_MEMORY | EQUAL_KERNELS
        equal = _result(case, pairs=pairs, device=device, environment=environment)
    return Overhead(
        case=case.name,
        **ours | {"ratios": tuple(ours["ratios"])},
        equal_ratio=equal["ratio"],
        target=case.target,
    )


def _takes_other_kernels(case: Case) -> bool:
    """Whether private steps of this case have kernels that ordinary ones do not have."""
    compiled = scan_for(torch.zeros(4, 1)) is not None
    return not are_those_of_torch() or (
        compiled and any(isinstance(module, nn.RNNBase) for module in case.build().modules())
    )


def _result(
    case: Case, *, pairs: int, device: str, environment: Mapping[str, str]
) -> dict[str, Any]:
    arguments = (case.name, str(pairs), str(torch.get_num_threads()), device)
    found: dict[str, Any] = result_of(
        "dpnlu.benchmark.overhead", *arguments, environment=environment
    )
    return found


def _times(case: Case, *, pairs: int, device: str) -> dict[str, Any]:
    """The fields of `Overhead` that are times or ratios, of ordinary and private steps in turn."""
    torch.manual_seed(0)
    model = case.build().train()
    with (
        ordinary(case, copy.deepcopy(model), device=device) as one,
        private(case, model, device=device) as other,
    ):
        for step in (one, other) * _WARM_UP:
            step()
        times = [(seconds(one), seconds(other)) for _ in range(pairs)]
    ratios = [b / a for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ordinary_ms": 1e3 * statistics.median(a for a, _ in times),
        "private_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratios": (quartiles[0], quartiles[2]),
    }


def table(rows: Sequence[Overhead]) -> str:
    """The results in Markdown."""
    lines = [
        "| work | ordinary ms | private ms | ratio | quartiles | with equal kernels | target |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        target = "" if row.target is None else f"{row.target:.2f}"
        lines.append(
            f"| {row.case} | {row.ordinary_ms:.1f} | {row.private_ms:.1f} | **{row.ratio:.3f}** | "
            f"{row.ratios[0]:.3f} – {row.ratios[1]:.3f} | {row.equal_ratio:.3f} | {target} |"
        )
    return "\n".join(lines)


def seconds(step: Step) -> float:
    """How long a step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    name, pairs, threads, device = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_times(named(name), pairs=int(pairs), device=device)))
