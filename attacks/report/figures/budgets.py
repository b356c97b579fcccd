"""Figures over ε: leakage, usefulness and audits. None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attacks.ceilings import approximate_dp_ceiling_auc, gaussian_ceiling_auc
from attacks.report.figures import axes as look
from attacks.report.runs import Run, clean, column, epsilon, is_private, strongest_attack

# Where on its way up the Gaussian ceiling is named: there the two ceilings are far apart.
NAMED_AUC = 0.8

# A budget beyond these is no better than none, or no different from 0: it has no place on an axis.
DRAWN = (1e-6, 1e6)


def leakage(report: Mapping[str, Any]) -> Figure | None:
    """ε against the strongest attack's AUC, under both ceilings; ∞ at the right edge."""
    runs = [run for run in report["runs"] if run.get("membership")]
    private = [run for run in runs if _has_budget(run)]
    if not private:
        return None
    free = [run for run in runs if not is_private(run)]
    with look.drawing():
        figure, axes = look.new_axes()
        scale = look.budget_scale(
            axes, column(private, "epsilon"), unlimited=bool(free), least=0.25, most=4.0
        )
        _draw_ceilings(axes, scale, delta=max(column(private, "delta")))
        _draw_areas(axes, column(private, "epsilon"), private, colour=look.PRIVATE)
        _draw_areas(axes, [scale.infinity or 0] * len(free), free, colour=look.UNLIMITED)
        lowest = min(run["membership"][strongest_attack(run)]["auc_interval"][0] for run in runs)
        axes.set_ylim(min(0.44, lowest - 0.03), 1.0)
        names = {strongest_attack(run) for run in runs}
        which = f" ({name})" if len(names) == 1 and len(name := clean(*names)) < 10 else ""
        axes.set_ylabel(f"AUC of the strongest attack{which}")
    return figure


def usefulness(report: Mapping[str, Any]) -> Figure | None:
    """ε against intent accuracy and slot F1; the run without privacy as a dashed line."""
    private = sorted((run for run in report["runs"] if _has_budget(run)), key=epsilon)
    free = [run for run in report["runs"] if not is_private(run)]
    measures = [measure for measure in MEASURES if any(measure.key in run for run in private)]
    if not measures or len([run for run in private + free if measures[0].key in run]) < 2:
        return None
    with look.drawing():
        figure, axes = look.new_axes()
        epsilons = column(private, "epsilon")
        look.budget_scale(axes, epsilons, unlimited=False, least=min(epsilons), most=0)
        for measure in measures:
            _draw_measure(axes, [run for run in private if measure.key in run], measure)
        _draw_references(axes, free, measures)
        _name_measures(axes, private, measures)
        axes.set_ylabel("on held-out data (%)")
    return figure


def audit(report: Mapping[str, Any]) -> Figure | None:
    """The audited lower bound against the accounted ε, with the identity and each ceiling."""
    audited = [run for run in report["runs"] if "audit" in run]
    private = [run for run in audited if is_private(run) and run["epsilon"] <= DRAWN[1]]
    if not private:
        return None
    free = [run for run in audited if not is_private(run)]
    highest = max(1.0, *column(private, "epsilon"))
    most = [run["audit"].get("ceiling", run["audit"]["epsilon_lower_bound"]) for run in audited]
    top = 1.15 * max(highest, *most)
    with look.drawing():
        figure, axes = look.new_axes()
        look.root_scales(axes, right=1.06 * highest, top=top)
        _draw_identity(axes, highest, top)
        _draw_bounds(axes, look.beside(column(private, "epsilon")), private, colour=look.PRIVATE)
        if free:
            axes.axvline(1.12 * highest, color=look.FAINT, linewidth=0.8, zorder=0)
            _draw_bounds(axes, [1.27 * highest] * len(free), free, colour=look.UNLIMITED)
            names = [label.get_text() for label in axes.get_xticklabels()]
            axes.set_xticks([*axes.get_xticks(), 1.27 * highest], [*names, "∞"])
            axes.set_xlim(0, 1.42 * highest)
        axes.set(xlabel="accounted ε", ylabel="audited lower bound on ε")
    return figure


@dataclass(frozen=True)
class Measure:
    """One line of the figure of usefulness."""

    key: str
    name: str
    colour: str
    marker: str


MEASURES = (
    Measure("intent_accuracy", "intent\naccuracy", look.BLUE, "o"),
    Measure("slot_f1", "slot F1", look.GREEN, "s"),
)


def _has_budget(run: Run) -> bool:
    """Whether the run has a place on a logarithmic ε axis."""
    return is_private(run) and DRAWN[0] <= run["epsilon"] <= DRAWN[1]


def _draw_ceilings(axes: Axes, scale: look.BudgetScale, *, delta: float) -> None:
    """Both ceilings of the AUC, each with its name, and the line of guessing."""
    grid = np.geomspace(scale.low, scale.high, 120)
    general = [approximate_dp_ceiling_auc(point, delta) for point in grid]
    axes.fill_between(grid, general, 1, **look.SHADE)
    axes.plot(grid, general, color=look.MUTED, linewidth=1.2, label="(ε, δ) ceiling")
    look.note(axes, "(ε, δ) rules\nthis out", (scale.low, 1), offset=(5, -4))
    axes.axhline(0.5, **look.DOTTED)
    look.note(axes, "guessing", (scale.low, 0.5), offset=(5, -3))
    if delta == 0:  # no Gaussian mechanism has such a guarantee
        return
    gaussian = np.array([gaussian_ceiling_auc(point, delta) for point in grid])
    axes.plot(grid, gaussian, color=look.MUTED, label="Gaussian ceiling", **look.DASHED)
    named = int(np.abs(gaussian - min(NAMED_AUC, 0.15 + 0.85 * gaussian[-1])).argmin())
    place = (grid[named], gaussian[named])
    look.note(axes, "Gaussian\nmechanism", place, offset=(-8, 3), ha="right", va="center")


def _draw_areas(axes: Axes, places: list[float], runs: Sequence[Run], *, colour: str) -> None:
    """The strongest attack's AUC of each run with its interval."""
    if not runs:
        return
    attacks = [run["membership"][strongest_attack(run)] for run in runs]
    values = column(attacks, "auc")
    margins = look.margins(values, [attack["auc_interval"] for attack in attacks])
    style: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3, "markersize": 5}
    axes.errorbar(look.beside(places), values, margins, zorder=3, **style)


def _draw_measure(axes: Axes, runs: Sequence[Run], measure: Measure) -> None:
    """One measure over ε, with its interval where it has one; joined unless two share an ε."""
    epsilons = column(runs, "epsilon")
    joined = "-" if len(set(epsilons)) == len(epsilons) else "none"
    values = 100 * np.array(column(runs, measure.key))
    style: dict[str, Any] = {"color": measure.colour, "linestyle": joined}
    axes.plot(look.beside(epsilons), values, measure.marker, label=measure.key, **style)
    for place, value, run in zip(look.beside(epsilons), values, runs, strict=True):
        if f"{measure.key}_interval" in run:
            margins = look.margins([value], [[100 * x for x in run[f"{measure.key}_interval"]]])
            axes.errorbar([place], [value], margins, fmt=" ", color=measure.colour, capsize=3)


def _draw_references(axes: Axes, free: Sequence[Run], measures: Sequence[Measure]) -> None:
    """The same measures without privacy as dashed lines, named once."""
    pairs = [(100 * run[m.key], m.colour) for m in measures for run in free if m.key in run]
    for height, colour in pairs:
        axes.axhline(height, color=colour, **look.DASHED)
    axes.margins(y=0.12)
    if pairs:
        place = (axes.get_xlim()[0], max(pairs)[0])
        look.note(axes, "without privacy", place, offset=(4, 2), va="bottom")


def _name_measures(axes: Axes, private: Sequence[Run], measures: Sequence[Measure]) -> None:
    """Each line's name right of its last point; two names keep a distance."""
    heights = [100 * [run[m.key] for run in private if m.key in run][-1] for m in measures]
    low, high = axes.get_ylim()
    gap = 0.16 * (high - low)
    if len(heights) == 2 and abs(heights[0] - heights[1]) < gap:
        middle, sign = sum(heights) / 2, 1 if heights[0] >= heights[1] else -1
        heights = [middle + sign * gap / 2, middle - sign * gap / 2]
    for height, measure in zip(heights, measures, strict=True):
        place = (axes.get_xlim()[1], height)
        look.note(axes, measure.name, place, offset=(4, 0), va="center", color=measure.colour)


def _draw_identity(axes: Axes, highest: float, top: float) -> None:
    """The line that no bound may cross, and the region beyond it."""
    axes.plot([0, highest], [0, highest], color=look.MUTED, linewidth=1, label="bound = ε")
    axes.fill_between([0, highest], [0, highest], top, **look.SHADE)
    box: dict[str, Any] = {"facecolor": look.PAPER, "edgecolor": "none", "pad": 1.5, "alpha": 0.8}
    style: dict[str, Any] = {"fontsize": look.SMALL, "color": look.MUTED, "bbox": box, "zorder": 4}
    place = axes.transAxes
    axes.text(0.02, 0.97, "refutes the accounted ε", va="top", transform=place, **style)


def _draw_bounds(axes: Axes, places: Sequence[float], runs: Sequence[Run], *, colour: str) -> None:
    """Each bound as a triangle, below a bar at the largest bound its audit could have given."""
    for place, run in zip(places, runs, strict=True):
        low, high = run["audit"]["epsilon_lower_bound"], run["audit"].get("ceiling")
        style: dict[str, Any] = {"color": colour, "clip_on": False, "zorder": 3}
        axes.plot([place], [low], marker="^", markersize=7, linestyle="none", **style)
        if high is not None:
            axes.plot([place, place], [low, high], linewidth=1, linestyle=(0, (1, 2)), **style)
            axes.plot([place], [high], marker="_", markersize=11, markeredgewidth=1.6, **style)
