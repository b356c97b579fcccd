"""Figures over runs: ROC curves, time, exposure. None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attacks._validate import Floats
from attacks.report import wording as write
from attacks.report.figures import axes as look
from attacks.report.runs import Run, column, epsilon, is_private, labels, strongest

# More points than this on a ROC curve are not visible, only heavy.
ROC_POINTS = 200


def roc(report: Mapping[str, Any]) -> Figure | None:
    """The strongest attack's ROC curve of each run on logarithmic axes, with its band."""
    curves = [
        (name, run, attack)
        for name, run in _ordered(report)
        if (attack := strongest(run)) is not None and "roc" in attack
    ]
    if not curves:
        return None
    limit = _resolution(report, [attack for _, _, attack in curves])
    start = limit / 2
    with look.drawing():
        figure, axes = look.new_axes(height=1.15 * look.HEIGHT)
        axes.plot([start, 1], [start, 1], label="_guessing", zorder=1, **look.DOTTED)
        axes.axvline(limit, color=look.MUTED, linewidth=0.8)
        look.note(axes, f"one in {write.count(1 / limit)}\nnon-members", (limit, 1), offset=(4, -2))
        for (name, _, attack), (colour, dashes) in zip(curves, _styles(curves), strict=True):
            _draw_curve(axes, attack["roc"], start, label=name, color=colour, linestyle=dashes)
        _share_axes(axes, start)
        axes.legend(loc="lower right")
    return figure


def time(report: Mapping[str, Any]) -> Figure | None:
    """Training time of each run as a bar, with its ratio to ordinary training."""
    pairs = [(name, run) for name, run in _ordered(report) if "train_seconds" in run]
    if len(pairs) < 2:
        return None
    names, runs = zip(*pairs, strict=True)
    seconds = column(runs, "train_seconds")
    with look.drawing():
        figure, axes = look.row_axes(names)
        colours = [look.PRIVATE if is_private(run) else look.UNLIMITED for run in runs]
        bars = axes.barh(range(len(runs)), seconds, height=0.5, color=colours)
        axes.bar_label(bars, [_time_label(run) for run in runs], padding=4)
        axes.set_xlim(0, 1.4 * max(*seconds, 1e-9))
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return figure


def exposure(report: Mapping[str, Any]) -> Figure | None:
    """Exposure of the canary in each run, between nothing and all of its bits, next to chance."""
    pairs = [pair for pair in _ordered(report) if "exposure_bits" in pair[1].get("canary", {})]
    if not pairs:
        return None
    with look.drawing():
        figure, axes = look.row_axes([name for name, _ in pairs])
        for row, (_, run) in enumerate(pairs):
            _draw_exposure(axes, row, run["canary"], private=is_private(run))
        first = pairs[0][1]["canary"]
        for key, name in (("available_bits", "all bits"), ("chance_exposure_bits", "chance")):
            if key in first:
                place = (first[key], -0.3)
                look.note(axes, name, place, offset=(0, 2), ha="center", va="bottom")
        axes.set_xlim(0, 1.08 * max(run["canary"]["available_bits"] for _, run in pairs))
        axes.set_xlabel("exposure (bits)")
    return figure


def _ordered(report: Mapping[str, Any]) -> list[tuple[str, Run]]:
    """Labels and runs, from no privacy to the strictest."""
    pairs = zip(labels(report["runs"]), report["runs"], strict=True)
    return sorted(pairs, key=lambda pair: -epsilon(pair[1]))


def _resolution(report: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]]) -> float:
    """The smallest FPR but 0 that the non-members can show: one of them."""
    data = report.get("data", {})
    known = [attack["non_members"] for attack in attacks if attack.get("non_members")]
    if not known and data.get("members", 0) < data.get("audit_examples", 0) and "members" in data:
        known = [data["audit_examples"] - data["members"]]
    if known:
        return min(0.5, 1 / int(max(known)))
    rates = np.concatenate([attack["roc"]["fpr"] for attack in attacks])
    return float(min(0.5, rates[rates > 0].min(initial=0.5)))


def _styles(curves: Sequence[tuple[str, Run, Any]]) -> list[tuple[str, Any]]:
    """A colour and a line style for each curve; without privacy always the same colour."""
    styles, private = [], 0
    for index, (_, run, _) in enumerate(curves):
        turn, place = divmod(private, len(look.SERIES))
        colour = look.SERIES[place] if is_private(run) else look.UNLIMITED
        private += is_private(run)
        turn = turn if is_private(run) else index
        styles.append((colour, look.DASHES[turn % len(look.DASHES)]))
    return styles


def _draw_curve(
    axes: Axes, curve: Mapping[str, Sequence[float]], start: float, **style: Any
) -> None:
    """One ROC curve in steps, with its band; what is zero ends below the axis."""
    fpr, tpr, low, high = (np.array(curve[key], float) for key in ("fpr", "tpr", "low", "high"))
    kept = _visible(fpr)
    rates = fpr[kept]
    tpr, low, high = (np.maximum(rate[kept], start / 10) for rate in (tpr, low, high))
    band: dict[str, Any] = {"step": "post", "color": style["color"], "alpha": 0.13, "linewidth": 0}
    axes.fill_between(rates, low, high, **band)
    axes.plot(rates, tpr, drawstyle="steps-post", **style)


def _visible(fpr: Floats) -> Any:
    """Indices of the points that a logarithmic axis can show apart: the last of each FPR step."""
    last = np.flatnonzero(np.append(fpr[1:] > fpr[:-1], True) & (fpr > 0))
    grid = np.geomspace(fpr[last[0]], 1, ROC_POINTS) if last.size else np.empty(0)
    return last[np.unique(np.searchsorted(fpr[last], grid).clip(max=last.size - 1))]


def _share_axes(axes: Axes, start: float) -> None:
    """Both axes logarithmic from `start` to 1, in per cent."""
    ticks = 10.0 ** np.arange(np.ceil(np.log10(start)), 1)
    names = [write.level(tick) for tick in ticks]
    axes.set(xscale="log", yscale="log", xlim=(start, 1), ylim=(start, 1))
    for axis, name in ((axes.xaxis, "false positive rate"), (axes.yaxis, "true positive rate")):
        axis.set_ticks(ticks, names)
        axis.set_ticks([], minor=True)
        axis.set_label_text(name)


def _time_label(run: Run) -> str:
    """Seconds, and the ratio to ordinary training."""
    text = write.duration(run["train_seconds"])
    ratio = f"  ({write.significant(run['overhead'])}×)" if "overhead" in run else ""
    return text + (ratio if is_private(run) else "")


def _draw_exposure(axes: Axes, row: int, canary: Mapping[str, Any], *, private: bool) -> None:
    """One row: a rail as long as the bits there are, chance on it, and the measurement."""
    colour = look.PRIVATE if private else look.UNLIMITED
    axes.plot([0, canary["available_bits"]], [row, row], color=look.FAINT, linewidth=5, zorder=1)
    if "chance_exposure_bits" in canary:
        style: dict[str, Any] = {
            "marker": "|",
            "markersize": 12,
            "color": look.MUTED,
            "markeredgewidth": 1.4,
        }
        axes.plot([canary["chance_exposure_bits"]], [row], zorder=2, **style)
    bits = canary["exposure_bits"]
    margins = look.margins([bits], [canary.get("exposure_interval", (bits, bits))])
    axes.errorbar([bits], [row], xerr=margins, fmt="o", color=colour, capsize=3, zorder=3)
