"""The figure of a recovered secret: original, recovered, and the score of every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attacks._validate import Floats
from attacks.report.figures import axes as look
from attacks.report.runs import Run, labels, planted, shortened

# More secrets than these are a table, no picture.
MOST_EXAMPLES = 6
_ROW_HEIGHT, _WIDTH = 0.3, 7.0
_LONGEST_TOKEN = 9


def recovered(report: Mapping[str, Any]) -> Figure | None:
    """One panel per recovered secret: a row for each position, its candidates by their loss."""
    examples = [
        (name, example)
        for name, run in zip(labels(report["runs"]), report["runs"], strict=True)
        for example in examples_of(run)
    ][:MOST_EXAMPLES]
    if not examples:
        return None
    heights = [1 + len(example["positions"]) for _, example in examples]
    with look.drawing():
        figure = Figure(figsize=(_WIDTH, _ROW_HEIGHT * sum(heights) + 0.4), layout="constrained")
        panels = figure.subplots(
            len(examples), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for panel, (name, example) in zip(panels[:, 0], examples, strict=True):
            _draw(panel, name, example)
    return figure


def examples_of(run: Run) -> list[Mapping[str, Any]]:
    """The recovered secrets that a run shows: of its canaries, or after a given prefix."""
    canaries = [canary["example"] for canary in planted(run) if "example" in canary]
    return canaries + list(run.get("recovered", []))


def caption_of(example: Mapping[str, Any]) -> str:
    """Carrier, original where it is known, and recovered secret, in one line."""
    found = " ".join(example["recovered"])
    known = f"{' '.join(example['original'])} → " if "original" in example else ""
    return f"{shortened(example['carrier'], 40)}: {known}{found}"


def _draw(axes: Axes, name: str, example: Mapping[str, Any]) -> None:
    """One secret: a row of cells for each position, the likeliest candidate first."""
    positions: Sequence[Mapping[str, Any]] = example["positions"]
    original = example.get("original", [None] * len(positions))
    for row, position in enumerate(positions):
        shades = _plausibility(np.array(position["losses"], float))
        for column, (token, shade) in enumerate(zip(position["candidates"], shades, strict=True)):
            cell: dict[str, Any] = {"color": look.BLUE, "alpha": 0.45 * float(shade)}
            axes.barh(row, 0.96, left=column - 0.48, height=0.9, linewidth=0, **cell)
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": look.SMALL}
            if token == original[row]:
                style["bbox"] = {
                    "boxstyle": "square,pad=0.2",
                    "fill": False,
                    "ec": look.INK,
                    "lw": 0.8,
                }
            weight = "bold" if token == example["recovered"][row] else "normal"
            axes.text(column, row, shortened(token, _LONGEST_TOKEN), weight=weight, **style)
    axes.set_title(f"{name}, {caption_of(example)}", loc="left", fontsize=look.SMALL)
    axes.set_xlim(-0.6, max(len(position["candidates"]) for position in positions) - 0.4)
    axes.set_ylim(len(positions) - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks(range(len(positions)), [str(row + 1) for row in range(len(positions))])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plausibility(losses: Floats) -> Floats:
    """1 at the lowest loss of a position, 0 at the highest shown; equal losses are all 1."""
    spread = losses.max() - losses.min()
    if spread <= 0:
        return np.ones_like(losses)
    shades: Floats = 1 - (losses - losses.min()) / spread
    return shades
