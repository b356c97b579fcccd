"""Time of a private step over that of an ordinary one: interleaved pairs, median of ratios.

Each case has a process of its own, so that none inherits another's memory.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from dpnlu.benchmark.cases import Case, named
from dpnlu.benchmark.process import result_of
from dpnlu.benchmark.steps import Step, ordinary, private


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What one case took.

    Attributes:
        ordinary_ms, private_ms: median times of a logical step.
        ratio: median over pairs of private / ordinary.
        ratios: the quartiles of the same.
        target: what was aimed at.
    """

    case: str
    ordinary_ms: float
    private_ms: float
    ratio: float
    ratios: tuple[float, float]
    target: float | None


def measure(case: Case, *, pairs: int, device: str = "cpu") -> Overhead:
    """Time a case in a fresh process with as many threads as this one.

    Raises:
        RuntimeError: the process failed.
    """
    module = "dpnlu.benchmark.overhead"
    found = result_of(module, case.name, str(pairs), str(torch.get_num_threads()), device)
    return Overhead(**found | {"ratios": tuple(found["ratios"])})


def _measure(case: Case, *, pairs: int, device: str) -> Overhead:
    """Ordinary and private steps in turn, after two of each."""
    torch.manual_seed(0)
    model = case.build().train()
    with (
        ordinary(case, copy.deepcopy(model), device=device) as one,
        private(case, model, device=device) as other,
    ):
        for step in (one, other) * 2:
            step()
        times = [(seconds(one), seconds(other)) for _ in range(pairs)]
    ratios = [b / a for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return Overhead(
        case=case.name,
        ordinary_ms=1e3 * statistics.median(a for a, _ in times),
        private_ms=1e3 * statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        ratios=(quartiles[0], quartiles[2]),
        target=case.target,
    )


def table(rows: Sequence[Overhead]) -> str:
    """The results in Markdown."""
    lines = [
        "| work | ordinary ms | private ms | ratio | quartiles | target |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        target = "" if row.target is None else f"{row.target:.2f}"
        lines.append(
            f"| {row.case} | {row.ordinary_ms:.1f} | {row.private_ms:.1f} | **{row.ratio:.3f}** | "
            f"{row.ratios[0]:.3f} – {row.ratios[1]:.3f} | {target} |"
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
    print(json.dumps(asdict(_measure(named(name), pairs=int(pairs), device=device))))
