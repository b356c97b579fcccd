"""How far groups of people lie apart in accuracy, and what privacy changes about it, from arrays
alone.

The cost of privacy in accuracy is not the same for everyone: Bagdasaryan, Poursaeed and Shmatikov
(2019), Differential privacy has disparate impact on model accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks.report.compared import LEAST_IN_TEST
from dpnlu.compare.breakdown import Breakdown

_REPLICATES = 2000
# Added to each cell of a group's two-by-two table before it is drawn from: Agresti and Min (2005),
# Simple improved confidence intervals for comparing matched proportions. Without it a few texts
# that are all answered right would never be drawn wrong.
_PSEUDO_COUNT = 0.5


@dataclass(frozen=True, kw_only=True)
class GroupGap:
    """The gap of a run is the accuracy of its best group minus that of its worst.

    Attributes:
        highest, lowest: the names of these two groups; of groups alike, by name.
        gap: in [0, 1].
        gap_by_chance: the mean gap of as many texts if all groups had the accuracy of all their
            texts together: what is no higher says nothing.
        change: gap − that of the ordinary run, whose best and worst groups may be others; None:
            there is no run to compare with.
        change_interval: of the bootstrap over texts within groups.
    """

    highest: str
    lowest: str
    gap: float
    gap_by_chance: float
    change: float | None = None
    change_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What was measured, for the report."""
        return {name: value for name, value in vars(self).items() if value is not None}


def group_gap(
    groups: Breakdown,
    right: NDArray[np.bool_],
    *,
    ordinary: NDArray[np.bool_] | None = None,
    confidence: float,
    rng: np.random.Generator,
) -> GroupGap | None:
    """Compare the groups that have at least `LEAST_IN_TEST` texts; None where fewer than two have.

    Which groups are best and worst is chosen anew for either run and in every replicate: two groups
    fixed by their result in one run lie less far apart in any other, by chance alone, which would
    hide what privacy costs. A gap is too high for the same reason, the more so the more groups
    there are; in a change this cancels for the most part.

    The interval takes percentiles of the bootstrap (Efron and Tibshirani, 1993, chapter 13). A
    replicate draws as many texts of each group as there are, each with both verdicts about it, so
    that runs stay paired. It is widened to contain the change.

    Args:
        groups: the group of each of N texts.
        right: (N,) whether the model is right about each.
        ordinary: (N,) whether the model to compare with is; None: there is none.
        confidence: of the interval, in (0, 1).
        rng: of the bootstrap.
    """
    sizes = np.bincount(groups.classes[groups.classes >= 0], minlength=len(groups.names))
    large = np.flatnonzero(sizes >= LEAST_IN_TEST)
    if len(large) < 2:
        return None
    tables = [_table(right, ordinary, groups.classes == index) for index in large]
    shares = np.array([_shares(cells)[0] for cells in tables])
    order = np.argsort(shares, kind="stable")
    gap = GroupGap(
        highest=groups.names[large[order[-1]]],
        lowest=groups.names[large[order[0]]],
        gap=float(np.ptp(shares)),
        gap_by_chance=_by_chance(tables, rng),
    )
    if ordinary is None:
        return gap
    own, other = _gaps(_shares(cells) for cells in tables)
    change = float(own - other)
    drawn_own, drawn_other = _gaps(_shares(cells) for cells in _drawn(tables, rng))
    replicates = drawn_own - drawn_other
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return replace(
        gap,
        change=change,
        change_interval=(float(min(low, change)), float(max(high, change))),
    )


def _table(
    right: NDArray[np.bool_], ordinary: NDArray[np.bool_] | None, asked: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """(4,) of the texts asked, how many: both runs get right, this alone, the other alone, none."""
    here = right[asked]
    there = here if ordinary is None else ordinary[asked]
    return np.bincount(3 - 2 * here - there, minlength=4)


def _shares(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """(..., 4) tables of one group -> (2, ...) the shares right by this run and the other."""
    both, this, other, _ = np.moveaxis(tables, -1, 0)
    shares: NDArray[np.float64] = np.stack([both + this, both + other]) / tables.sum(axis=-1)
    return shares


def _gaps(shares: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The largest share of any group minus the smallest, elementwise; groups come one by one, as
    there may be as many as people."""
    groups = iter(shares)
    high = low = next(groups)
    for share in groups:
        high, low = np.maximum(high, share), np.minimum(low, share)
    return high - low


def _drawn(
    tables: Sequence[NDArray[np.int64]], rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """For each group (R, 4): as many texts as it has, drawn anew."""
    for cells in tables:
        smoothed = cells + _PSEUDO_COUNT
        yield rng.multinomial(int(cells.sum()), smoothed / smoothed.sum(), size=_REPLICATES)


def _by_chance(tables: Sequence[NDArray[np.int64]], rng: np.random.Generator) -> float:
    """The mean gap of groups that are alike."""
    sizes = [int(cells.sum()) for cells in tables]
    accuracy = sum(int(cells[:2].sum()) for cells in tables) / sum(sizes)
    gaps = _gaps(rng.binomial(size, accuracy, size=_REPLICATES) / size for size in sizes)
    return float(gaps.mean())
