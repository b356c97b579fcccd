"""How cost grows with examples, positions and width, beside that of Opacus' hooks.

A stack of layers that Opacus supports: embedding, two feed-forward blocks, normalisation, head.
Beside it the two ways to a linear layer's norms, Gram matrices and gradients written out, and which
of them is taken.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.benchmark.cases import Case
from dpnlu.benchmark.process import KEEPS_MEMORY, result_of
from dpnlu.benchmark.steps import Step, ordinary, private
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.grams import GramCache
from dpnlu.runs.progress import OnProgress

_VOCABULARY, _INTENTS = 2_000, 64
_AXES = {
    "examples": (8, 32, 128, 512),
    "positions": (8, 32, 128, 512),
    "width": (64, 128, 256, 512),
}
_BASE = {"examples": 32, "positions": 32, "width": 128}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size.

    Attributes:
        axis: what varies: "examples", "positions" or "width".
        ordinary_ms: median time of an ordinary step.
        ratio, opacus_ratio: median over pairs of private / ordinary, by dpnlu and Opacus.
        gram_ms, written_out_ms: both ways to the norms of one layer (width, 4 width).
        takes_gram: which of them is taken.
    """

    axis: str
    examples: int
    positions: int
    width: int
    ordinary_ms: float
    ratio: float
    opacus_ratio: float
    gram_ms: float
    written_out_ms: float
    takes_gram: bool


class Feedforward(nn.Module):
    """(B, T) ids -> (B, K) logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        for block in self.blocks:
            states = states + block(states)
        logits: Tensor = self.head(self.norm(states).mean(1))
        return logits


def sizes() -> Iterator[tuple[str, dict[str, int]]]:
    """(axis, sizes) of every point."""
    for axis, values in _AXES.items():
        for value in values:
            yield axis, _BASE | {axis: value}


def measure(on_progress: OnProgress, *, pairs: int) -> list[Point]:
    """All points, each in a process of its own with as many threads as this one.

    Raises:
        RuntimeError: a process failed.
    """
    points = []
    places = list(sizes())
    for done, (axis, size) in enumerate(places, start=1):
        arguments = [str(number) for number in (*size.values(), pairs, torch.get_num_threads())]
        found = result_of("dpnlu.benchmark.sweep", *arguments, environment=KEEPS_MEMORY)
        points.append(Point(axis=axis, **(size | found)))
        on_progress("sweep", done, len(places))
    return points


def _times(examples: int, positions: int, width: int, *, pairs: int) -> dict[str, Any]:
    """The fields of `Point` that are times, ratios of times, or follow from the size."""
    case = Case(
        name=f"feed-forward {width}",
        build=lambda: Feedforward(width),
        positions=positions,
        physical=examples,
        logical=examples,
        vocabulary=_VOCABULARY,
    )
    torch.manual_seed(0)
    model = case.build().train()
    copies = [copy.deepcopy(model) for _ in range(2)]
    with (
        ordinary(case, model) as plain,
        private(case, copies[0]) as ours,
        private(case, copies[1], engine="opacus") as theirs,
    ):
        steps: tuple[Step, ...] = (plain, ours, theirs)
        for step in steps * 2:
            step()
        times = [[_time(step) for step in steps] for _ in range(pairs)]
    gram, written_out, takes_gram = _norms(examples, positions, width, pairs=pairs)
    return {
        "ordinary_ms": 1e3 * statistics.median(row[0] for row in times),
        "ratio": statistics.median(row[1] / row[0] for row in times),
        "opacus_ratio": statistics.median(row[2] / row[0] for row in times),
        "gram_ms": gram,
        "written_out_ms": written_out,
        "takes_gram": takes_gram,
    }


def _norms(examples: int, positions: int, width: int, *, pairs: int) -> tuple[float, float, bool]:
    """Median ms of Gram matrices and of gradients written out; whether the former are taken."""
    use = OuterProducts(
        torch.randn(examples, positions, width), torch.randn(examples, positions, 4 * width)
    )
    ways: Sequence[Callable[[], object]] = (
        lambda: use.norms_by_gram(GramCache()),
        use.norms_written_out,
    )
    times = [statistics.median(_time(way) for _ in range(pairs)) for way in ways]
    return 1e3 * times[0], 1e3 * times[1], use.takes_gram


def _time(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def table(points: Sequence[Point]) -> str:
    """The results in Markdown."""
    lines = [
        "| varies | B | T | width | ordinary ms | dpnlu | Opacus hooks | Gram ms | "
        "written out ms | taken |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for p in points:
        taken = "Gram" if p.takes_gram else "written out"
        lines.append(
            f"| {p.axis} | {p.examples} | {p.positions} | {p.width} | {p.ordinary_ms:.1f} | "
            f"**{p.ratio:.2f}** | {p.opacus_ratio:.2f} | {p.gram_ms:.2f} | "
            f"{p.written_out_ms:.2f} | {taken} |"
        )
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path) -> None:
    """One panel per axis: overheads above, the two ways to the norms below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(_AXES), figsize=(11, 6), sharex="col")
    for column, axis in enumerate(_AXES):
        chosen = [point for point in points if point.axis == axis]
        x = [getattr(point, axis) for point in chosen]
        above, below = panels[0][column], panels[1][column]
        above.plot(x, [p.ratio for p in chosen], "o-", label="dpnlu")
        above.plot(x, [p.opacus_ratio for p in chosen], "s--", label="Opacus hooks")
        below.plot(x, [p.gram_ms for p in chosen], "o-", label="Gram matrices")
        below.plot(x, [p.written_out_ms for p in chosen], "s--", label="written out")
        for panel in (above, below):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
        below.set_xlabel(axis)
    panels[0][0].set_ylabel("private / ordinary step")
    panels[1][0].set_ylabel("norms of one layer, ms")
    for row in panels:
        row[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    *size, pairs, threads = (int(text) for text in sys.argv[1:])
    torch.set_num_threads(threads)
    print(json.dumps(_times(*size, pairs=pairs)))
