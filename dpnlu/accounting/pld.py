"""ε of many Gaussian releases by privacy loss distributions: on which grid, and where to look."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpnlu.accounting.composition import Tilt, composed_epsilon, tilt_towards
from dpnlu.accounting.loss_distribution import loss_distributions, sampled_losses

# Noise multiplier > 0 in units of the sensitivity, sample rate in (0, 1], steps >= 1.
Release = tuple[float, float, int]

# By what share of ε, about, the grid of losses may raise it; of what ε at least; the coarsest grid,
# as a share of ε above 1.
_GRID_ERROR = 2e-5
_LEAST_EPSILON = 1e-3
_COARSEST = 0.02

# How much finer a second grid may be, for it takes as much longer.
_FINEST = 1 / 8

# What share of δ unlikely outcomes that count as an unbounded loss may take.
_TAIL = 1e-10


def pld_epsilon(releases: Sequence[Release], delta: float, *, coarsening: float = 1.0) -> float:
    """ε at `delta` of all releases, under addition and removal of one example.

    Guarantee: an upper bound, on whatever grid. Of hundreds of random questions with ε from 0.1 to
    200 it was at most 0.03 % above that of a grid three times finer, commonly 0.003 %; below
    ε = 0.1 it was at most 3e-5 above.

    Args:
        releases: at least one.
        delta: in (0, 1).
        coarsening: how many times coarser than usual the grid is: faster, and ε larger.
    """
    never_drawn = sum(steps * math.log1p(-q) for _, q, steps in releases if q < 1)
    if all(q < 1 for _, q, _ in releases) and -math.expm1(never_drawn) <= delta:
        return 0.0  # the example is in no batch at all but with probability δ
    tail = _TAIL * delta / _steps(releases)
    tilts = tuple(_tilt(releases, delta, tail, removed) for removed in (True, False))

    def on_grid(grid: float) -> float:
        pairs = [
            loss_distributions(s, q, grid=grid * coarsening, tail=tail) for s, q, _ in releases
        ]
        ways = [
            [(pair[way], n) for pair, (_, _, n) in zip(pairs, releases, strict=True)]
            for way in (0, 1)
        ]
        return max(
            composed_epsilon(parts, tilt, delta) for parts, tilt in zip(ways, tilts, strict=True)
        )

    larger = max(tilts, key=lambda tilt: tilt.epsilon)
    grid = _grid(releases, larger, larger.epsilon)
    found = on_grid(grid)
    if found < larger.epsilon / 2:  # it was a grid for an ε far above
        finer = max(_grid(releases, larger, found), _FINEST * grid)
        found = min(found, on_grid(finer))
    return found


def grid_for(releases: Sequence[Release], delta: float) -> float:
    """A grid as fine as that of `pld_epsilon`, for accountants that take one only."""
    tilt = _tilt(releases, delta, _TAIL * delta / _steps(releases), removed=True)
    return _grid(releases, tilt, tilt.epsilon)


def _tilt(releases: Sequence[Release], delta: float, tail: float, removed: bool) -> Tilt:
    sampled = [sampled_losses(s, q, tail=tail, removed=removed) for s, q, _ in releases]
    return tilt_towards(delta, sampled, [steps for _, _, steps in releases])


def _grid(releases: Sequence[Release], tilt: Tilt, epsilon: float) -> float:
    return grid_of(_steps(releases), tilt, epsilon)


def grid_of(steps: int, tilt: Tilt, epsilon: float) -> float:
    """The distance g of losses that raises `epsilon` by about the share `_GRID_ERROR`.

    Moving losses to their neighbours adds g²/6 to their variance on average, so λ(λ + 1) g²/12 to
    the log of E[e^(λ loss)] and (λ + 1) g²/12 to ε at each step.
    """
    off = _GRID_ERROR * max(epsilon, _LEAST_EPSILON)
    fine = math.sqrt(12 * off / (steps * (tilt.factor + 1)))
    return min(fine, _COARSEST * max(epsilon, 1.0))


def _steps(releases: Sequence[Release]) -> int:
    return sum(steps for _, _, steps in releases)
