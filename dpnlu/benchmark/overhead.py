"""Time of a private step over that of an ordinary one: interleaved pairs, median of ratios."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpnlu.benchmark.cases import Case
from dpnlu.benchmark.steps import Step, ordinary, private
from dpnlu.progress import Told


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


def measure(case: Case, *, pairs: int, told: Told) -> Overhead:
    """Time a case: ordinary and private steps in turn, in one process, after two of each."""
    torch.manual_seed(0)
    model = case.build().train()
    steps = (ordinary(case, copy.deepcopy(model)), private(case, model))
    for step in steps * 2:
        step()
    times = []
    for pair in range(pairs):
        times.append(tuple(_time(step) for step in steps))
        told(case.name, pair + 1, pairs)
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


def _time(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
