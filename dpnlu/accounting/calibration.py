"""From ε to the noise multiplier that reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpnlu.accounting.accountants import (
    LARGEST_NOISE_MULTIPLIER,
    SMALLEST_NOISE_MULTIPLIER,
    pld_epsilon_on_grid,
    spent,
)
from dpnlu.accounting.events import SampledGaussian, check_delta

# Calibration searches on a coarser grid first: faster, and still on the safe side.
_COARSE = 5.0
_ROUGH = 0.05  # relative width of a bracket in which log ε is almost a line in log σ
_NEWTON_STEPS = 3  # then the slope was wrong


def calibrate_noise_multiplier(
    events: Callable[[float], Sequence[SampledGaussian]],
    *,
    target_epsilon: float,
    delta: float,
    tolerance: float = 1e-3,
) -> float:
    """The smallest noise multiplier σ, within tolerance, for which `events(σ)` meets the target.

    Guarantee: the ε of the returned σ, as the PLD accountant reports it, was computed and does not
    exceed `target_epsilon`.

    Args:
        events: noise multiplier -> the events it leads to; ε must fall as σ grows.
        target_epsilon: > 0.
        delta: in [1e-12, 1).
        tolerance: relative width of the final bracket of σ.

    Raises:
        ValueError: δ is out of range, or no noise multiplier below a million reaches the target.
    """
    check_delta(delta)

    def excess(sigma: float, coarsening: float) -> float:
        found = spent(events(sigma), lambda e: pld_epsilon_on_grid(e, delta, coarsening))
        return math.log(max(found, 1e-300) / target_epsilon)

    least = min(event.noise_multiplier for event in events(1.0))
    start = 1 / least if least else math.inf  # a schedule may fall until nothing is left
    bracket = _bracket(lambda sigma: excess(sigma, _COARSE), start=start)
    low, high = _narrowed(lambda sigma: excess(sigma, _COARSE), bracket, tolerance=_ROUGH)
    line = _Line(low, excess(low, _COARSE), high, excess(high, _COARSE))
    sigma = _newton(lambda sigma: excess(sigma, 1.0), line, tolerance=tolerance)
    if sigma is not None:
        return sigma
    fine = _bracket(lambda sigma: excess(sigma, 1.0), start=high, factor=1.02)
    return _narrowed(lambda sigma: excess(sigma, 1.0), fine, tolerance=tolerance)[1]


def least_noise(
    excess: Callable[[float], float], *, start: float = 1.0, tolerance: float = 1e-3
) -> float:
    """The smallest noise multiplier, within tolerance, at which an excess is not above 0.

    Args:
        excess: of a noise multiplier: the logarithm of its ε over the target; it must fall.
        start: a noise multiplier to begin with.
        tolerance: as for `calibrate_noise_multiplier`.

    Raises:
        ValueError: no noise multiplier below a million reaches the target.
    """
    return _narrowed(excess, _bracket(excess, start=start), tolerance=tolerance)[1]


def _bracket(
    excess: Callable[[float], float], *, start: float, factor: float = 1.5
) -> tuple[float, float]:
    """(low, high) with the target missed at low and met at high."""
    high = start
    while high <= LARGEST_NOISE_MULTIPLIER and excess(high) > 0:
        high *= factor
    if high > LARGEST_NOISE_MULTIPLIER:
        raise ValueError(
            "Expected a target ε that some noise multiplier below 1e6 reaches, got one that needs "
            "more: raise the target ε or δ, train for fewer steps, or let the noise decay less."
        )
    low = high / factor
    while low > SMALLEST_NOISE_MULTIPLIER and excess(low) <= 0:
        low, high = low / factor, low
    return low, high


def _narrowed(
    excess: Callable[[float], float], bracket: tuple[float, float], *, tolerance: float
) -> tuple[float, float]:
    """A bracket so narrow, or with an upper end so close to the target, as the tolerance asks."""
    low, high = bracket
    low_excess, high_excess = excess(low), excess(high)
    while high / low > 1 + tolerance and high_excess < -tolerance / 2:
        # Aim slightly to the safe side of the root, so that the next `high` is a close one.
        share = _Line(low, low_excess, high, high_excess).root_share() + 0.02
        middle = low * (high / low) ** min(max(share, 0.05), 0.95)
        middle_excess = excess(middle)
        if middle_excess > 0:
            low, low_excess = middle, middle_excess
        else:
            high, high_excess = middle, middle_excess
    return low, high


@dataclass(frozen=True)
class _Line:
    """Through two points of the excess over log σ, one with the target missed, one with it met."""

    low: float
    low_excess: float
    high: float
    high_excess: float

    def root_share(self) -> float:
        """Where it meets zero, as a share of the way from low to high."""
        if not math.isfinite(self.low_excess):
            return 0.5
        return self.low_excess / (self.low_excess - self.high_excess)

    def slope(self) -> float:
        """Below 0."""
        return (self.high_excess - self.low_excess) / math.log(self.high / self.low)


def _newton(excess: Callable[[float], float], line: _Line, *, tolerance: float) -> float | None:
    """A σ that meets the target and is within `tolerance` of it, by steps along the line's slope.

    ε falls at least as fast as σ grows, so that σ is as close to the least one. None if the line
    did not lead there.
    """
    sigma: float = line.low * (line.high / line.low) ** line.root_share()
    off = 0.0
    for _ in range(_NEWTON_STEPS):
        step = -(off + tolerance / 4) / line.slope()
        if not abs(step) <= 1:
            return None
        sigma *= math.exp(step)
        off = excess(sigma)
        if -tolerance <= off <= 0:
            return sigma
    return None
