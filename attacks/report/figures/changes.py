"""Figures of what privacy changed in the answers to the test texts. None without a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from attacks.report import wording as write
from attacks.report.compared import Compared, classes, compared, flips_of
from attacks.report.figures import axes as look
from attacks.report.runs import Run, shortened

# The worst classes have names in the figure.
NAMED = 3
# Bins of fewer texts are not drawn: their intervals fill the figure.
LEAST_IN_BIN = 10
_TIMES = tuple(step * 10.0**power for power in range(8) for step in (1, 2, 5))
_MOST_TICKS = 8
_KINDS = {"intents": "o", "slots": "s"}
_LOST, _WON = look.PURPLE, look.GREEN
# Where a legend covers nothing.
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}


def losses(report: Mapping[str, Any]) -> Figure | None:
    """Changes by class over its training frequency, and by that of the rarest word of a text."""
    found = compared(report)
    if found is None or not any("breakdown" in run for _, run in found.private):
        return None
    with look.drawing():
        figure = Figure(figsize=(look.WIDTH, 1.75 * look.HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        above, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": (1.25, 1)})
        _draw_classes(above, found)
        _draw_words(below, found)
        for axes in (above, below):
            axes.axhline(0, **look.DOTTED)
            axes.set_ylabel("change (points)")
    return figure


def reliability(report: Mapping[str, Any]) -> Figure | None:
    """Accuracy over confidence of each run, bin by bin, and the diagonal."""
    found = compared(report)
    pairs = [] if found is None else [p for p in found.everyone if p[1].get("calibration")]
    if not pairs:
        return None
    with look.drawing():
        figure, axes = look.new_axes(height=1.2 * look.HEIGHT)
        axes.plot([0, 100], [0, 100], label="_perfect", zorder=1, **look.DOTTED)
        for (name, run), colour in zip(pairs, _colours(pairs), strict=True):
            _draw_bins(axes, name, run["calibration"], colour)
        axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 103), ylim=(0, 103))
        axes.legend(ncols=2, borderaxespad=0, **_ABOVE)
    return figure


def flips(report: Mapping[str, Any]) -> Figure | None:
    """Texts that went from right to wrong to the left, from wrong to right to the right."""
    found = compared(report)
    if found is None:
        return None
    rows = flips_of(found)
    with look.drawing():
        figure, axes = look.row_axes([name for name, _, _ in rows])
        ends = [0.0]
        for row, (_, counted, is_control) in enumerate(rows):
            for key, sign, colour in (("negative", -1, _LOST), ("positive", 1, _WON)):
                ends.append(_draw_flip(axes, row, counted, key, sign, colour, faint=is_control))
        low, high = min(ends), max(ends)
        room = 0.35 * (high - low) or 1.0  # for the shares beside the bars
        axes.set_xlim(low - room, high + room)
        axes.axvline(0, color=look.MUTED, linewidth=0.8)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        for text, offset, ha in (("right → wrong", -6, "right"), ("wrong → right", 6, "left")):
            look.note(axes, text, (0, -0.5), offset=(offset, 3), ha=ha, va="bottom")
    return figure


def _colours(pairs: Sequence[tuple[str, Run]]) -> list[str]:
    """Of the ordinary run its own, of private runs one each."""
    return [
        look.UNLIMITED if run["epsilon"] is None else look.SERIES[(place - 1) % len(look.SERIES)]
        for place, (_, run) in enumerate(pairs)
    ]


def _draw_classes(axes: Axes, found: Compared) -> None:
    """One dot for each class and private run; the worst of the strictest run have their names."""
    for (name, run), colour in list(zip(found.everyone, _colours(found.everyone), strict=True))[1:]:
        for kind, marker in _KINDS.items():
            rows = [row for row in classes(run, kind).values() if "change" in row]
            places = [max(row.get("training", 0), 0.5) for row in rows]
            label = f"{name}, {kind}"
            heights = [100 * row["change"] for row in rows]
            style: dict[str, Any] = {"linestyle": "none", "markersize": 4.5, "alpha": 0.75}
            if rows:
                axes.plot(places, heights, marker, color=colour, label=label, **style)
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)
    low, high = axes.get_xlim()
    ticks = [tick for tick in _TIMES if low <= tick <= high]
    ticks = ticks if len(ticks) <= _MOST_TICKS else [t for t in ticks if np.log10(t) % 1 == 0]
    axes.set_xticks(ticks, [write.count(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("times in training")
    _name_worst(axes, found.strictest[1])
    if axes.lines:
        axes.legend(ncols=2, handletextpad=0.1, columnspacing=0.8, borderaxespad=0, **_ABOVE)


def _name_worst(axes: Axes, run: Run) -> None:
    rows = [
        row for kind in _KINDS for row in classes(run, kind).values() if row.get("change", 0) < 0
    ]
    low, high = axes.get_ylim()
    middle = np.sqrt(np.prod(axes.get_xlim()))
    last = -np.inf
    for row in sorted(rows, key=lambda row: row["change"])[:NAMED]:
        times, height = max(row.get("training", 0), 0.5), 100 * row["change"]
        if height - last < 0.085 * (high - low):  # a line of text: the table has them all
            continue
        last = height
        offset, ha = (-6, "right") if times > middle else (6, "left")
        name = shortened(row["name"], 24)
        look.note(axes, name, (times, height), offset=(offset, 0), ha=ha, va="center")


def _draw_words(axes: Axes, found: Compared) -> None:
    """One group of dots for each range of frequencies, one dot in it for each private run."""
    names = list(classes(found.strictest[1], "rarest_word"))
    pairs = list(zip(found.everyone, _colours(found.everyone), strict=True))[1:]
    for turn, ((_, run), colour) in enumerate(pairs):
        rows = classes(run, "rarest_word")
        shift = 0.16 * (turn - (len(pairs) - 1) / 2)
        for place, name in enumerate(names):
            row = rows.get(name, {})
            if "change" not in row:
                continue
            height = 100 * row["change"]
            limits = [100 * x for x in row.get("change_interval", [row["change"]] * 2)]
            style: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3, "markersize": 4.5}
            axes.errorbar([place + shift], [height], look.margins([height], [limits]), **style)
    counts = classes(found.strictest[1], "rarest_word")
    ticks = [f"{name}\n{write.count(counts[name]['test'])} texts" for name in names]
    axes.set_xticks(range(len(names)), ticks, fontsize=look.SMALL)
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("training texts that have the rarest word of a test text")


def _draw_bins(axes: Axes, name: str, known: Mapping[str, Any], colour: str) -> None:
    bins = [entry for entry in known.get("bins", ()) if entry["texts"] >= LEAST_IN_BIN]
    sure = 100 * np.array([entry["confidence"] for entry in bins])
    right = 100 * np.array([entry["accuracy"] for entry in bins])
    label = f"{name}: error {write.percentage(known['ece'])}"
    axes.plot(sure, right, "o-", color=colour, label=label, markersize=4.5)
    for place, height, entry in zip(sure, right, bins, strict=True):
        if "accuracy_interval" in entry:
            limits = [[100 * x for x in entry["accuracy_interval"]]]
            style: dict[str, Any] = {"fmt": " ", "color": colour, "capsize": 2, "alpha": 0.6}
            axes.errorbar([place], [height], look.margins([height], limits), **style)


def _draw_flip(
    axes: Axes,
    row: int,
    counted: Mapping[str, Any],
    key: str,
    sign: int,
    colour: str,
    *,
    faint: bool,
) -> float:
    """One bar with its interval and its share; where its interval ends."""
    share = 100 * counted[key]
    low, high = (100 * x for x in counted.get(f"{key}_interval", [counted[key]] * 2))
    axes.barh(row, sign * share, height=0.5, color=colour, alpha=0.4 if faint else 1.0)
    ends = sorted((sign * low, sign * high))
    style: dict[str, Any] = {"fmt": " ", "color": look.INK, "capsize": 2, "elinewidth": 0.9}
    axes.errorbar([sign * share], [row], xerr=look.margins([sign * share], [ends]), **style)
    offset, ha = (-5, "right") if sign < 0 else (5, "left")
    text = write.percentage(counted[key])
    look.note(axes, text, (sign * high, row), offset=(offset, 0), ha=ha, va="center")
    return float(sign * high)
