"""How figures look: one style, colours that everybody can tell apart, and SVG without surprises."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from attacks._validate import Floats
from attacks.report.wording import significant

# Okabe and Ito (2008), whose colours survive every common colour blindness, without their yellow
# (too faint on white); the second column is for a dark page.
COLOURS = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1c2024", "#e6e9ec"),
    "muted": ("#5b6571", "#a3adb8"),
    "faint": ("#ccd3da", "#434b54"),
    "blue": ("#0072b2", "#4ba3dc"),
    "vermilion": ("#d55e00", "#f08040"),
    "green": ("#009e73", "#2fc79b"),
    "purple": ("#b0588a", "#dd8fbb"),
    "sky": ("#56b4e8", "#8fd0f5"),
    "orange": ("#e69f01", "#f3bd4b"),
}
PAPER, INK, MUTED, FAINT, BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    light for light, _ in COLOURS.values()
)
# One colour for all that has no privacy, one for private runs, several to tell these apart.
PRIVATE, UNLIMITED = BLUE, VERMILION
SERIES = (BLUE, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

DOTTED: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (1, 2))}
DASHED: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 3))}
SHADE: dict[str, Any] = {"color": FAINT, "alpha": 0.45, "linewidth": 0}

# Small in points, so that letters stay readable where the figure is shrunk to a phone's width.
WIDTH, HEIGHT = 4.7, 3.0
FONT_SIZE, SMALL = 9.0, 8.0

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "attacks.report",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "lines.linewidth": 1.6,
}

# Ticks of an ε axis: budgets are usually powers of two.
BUDGETS = tuple(2.0**power for power in range(-10, 21))
MOST_TICKS = 9

# Runs of the same ε stand apart by this factor.
BESIDE = 1.09


@contextmanager
def drawing() -> Iterator[None]:
    """The style above whatever the user's settings; a letter no font has is no reason to warn."""
    with warnings.catch_warnings(), style.context("default"), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield


def new_axes(*, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure that no window and no global list knows of, and its only axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def row_axes(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with one named row for each label, the first on top, and nothing but the names."""
    figure, axes = new_axes(height=0.7 + 0.34 * len(labels))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure, axes


def margins(values: ArrayLike, limits: ArrayLike) -> Floats:
    """Distances `(2, N)` of values to their limits; an interval may miss by rounding errors."""
    low, high = np.transpose(limits)
    distances: Floats = np.maximum([values - low, high - values], 0)
    return distances


def note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    *,
    offset: tuple[float, float],
    ha: str = "left",
    va: str = "top",
    color: str = MUTED,
) -> None:
    """A word next to a place, so many points away."""
    style: dict[str, Any] = {"fontsize": SMALL, "color": color, "annotation_clip": False}
    axes.annotate(text, place, offset, textcoords="offset points", ha=ha, va=va, **style)


def beside(epsilons: list[float]) -> list[float]:
    """The same places on a logarithmic axis, with equal ones moved a little apart."""
    places = []
    for index, epsilon in enumerate(epsilons):
        turn, equals = epsilons[:index].count(epsilon), epsilons.count(epsilon)
        places.append(epsilon * BESIDE ** (turn - (equals - 1) / 2))
    return places


def root_scales(axes: Axes, *, right: float, top: float) -> None:
    """Both axes as square roots from 0, where small and large budgets are visible together."""
    roots = (_root, _square)
    axes.set_xscale("function", functions=roots)
    axes.set_yscale("function", functions=roots)
    axes.set(xlim=(0, right), ylim=(0, top))
    for axis, end in ((axes.xaxis, right), (axes.yaxis, top)):
        ticks = [0.0, *(budget for budget in BUDGETS if end / 20 <= budget <= end)]
        axis.set_ticks(ticks, [significant(tick) for tick in ticks])


def _root(values: Floats) -> Floats:
    """The square root; what is negative belongs to the margin below 0."""
    roots: Floats = np.sqrt(np.maximum(values, 0))
    return roots


def _square(values: Floats) -> Floats:
    """Its inverse."""
    squares: Floats = np.square(np.maximum(values, 0))
    return squares


@dataclass(frozen=True)
class BudgetScale:
    """A logarithmic ε axis: its two ends, and where ∞ stands if there is a run for it."""

    low: float
    high: float
    infinity: float | None


def budget_scale(
    axes: Axes, epsilons: Sequence[float], *, unlimited: bool, least: float, most: float
) -> BudgetScale:
    """Make x the accounted ε, logarithmic, at least from `least` to `most`; ∞ has a place right."""
    low, high = min(least, min(epsilons) / 1.5), max(most, 1.3 * max(epsilons))
    infinity = high * (high / low) ** 0.08 if unlimited else None
    ticks = [budget for budget in BUDGETS if low <= budget <= high] or [min(epsilons)]
    ticks = ticks[:: -(-len(ticks) // MOST_TICKS)]
    names = [significant(tick) for tick in ticks]
    if infinity is not None:
        axes.axvline(high * (high / low) ** 0.02, color=FAINT, linewidth=0.8, zorder=0)
        ticks, names = [*ticks, infinity], [*names, "∞"]
    axes.set_xscale("log")
    axes.set_xticks(ticks, names)
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high if infinity is None else high * (high / low) ** 0.13)
    axes.set_xlabel("accounted ε")
    return BudgetScale(low, high, infinity)


def to_svg(figure: Figure, *, title: str) -> str:
    """The figure as an SVG file on white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with drawing():
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor=PAPER)
    svg = re.sub(r"<!--.*?-->\n?|<!DOCTYPE[^>]*>\n?", "", buffer.getvalue().decode(), flags=re.S)
    svg = re.sub(r"<[^>]+>", lambda tag: _compact(tag[0]), svg)
    opening = f'\\g<0> role="img">\n <title>{escape(title)}</title'
    return re.sub(r"<svg\b[^>]*(?=>)", opening, svg, count=1)


def inline_svg(svg: str, *, prefix: str) -> str:
    """The same for a place inside a page: its colours follow the page, its ids are its own."""
    text = re.sub(r"<\?xml.*?\?>\s*|\s*<style.*?</style>", "", svg, flags=re.S)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"<[^>]+>", lambda tag: _adapted(tag[0], prefix), text)


def _compact(tag: str) -> str:
    """One tag with coordinates of two decimals, finer than any screen."""
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)


def _adapted(tag: str, prefix: str) -> str:
    """One tag with prefixed ids and references, and colours by name."""
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
    for name, (light, _) in COLOURS.items():
        tag = tag.replace(light, f"var(--fig-{name})")
    return tag
