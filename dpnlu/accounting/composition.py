"""What many releases cost together: ε of the sum of their privacy losses.

Probabilities of sums are convolutions, computed by Fourier transforms, whose rounding errors are
about 1e-16 of the largest probability for each step: nothing where δ is 1e-5, more than δ itself
where that is 1e-11 and the steps are a million. So every distribution is tilted first, p(l) e^(λl)
up to a factor, which makes losses about ε the likely ones, and errors small against what matters;
the factor is taken out again afterwards. Only a window about ε needs to be transformed then. With

    K(λ) = Σ steps · log E[e^(λ loss)] over all releases

λ is chosen where the bound on ε that K gives is least, and how much can lie above the window is
bounded (Chernoff). A bad choice of λ or of the window costs digits on the safe side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpnlu.accounting.loss_distribution import Array, LossDistribution

# How often each of some distributions is released.
Parts = Sequence[tuple[LossDistribution, int]]

_OUTSIDE = 1e-10  # of the tilted distribution, on either side of the window
_SHORT_OF_BOUND = 0.7  # the bound is above ε; and rare great losses are fewer with less of a tilt
_NEWTON_STEPS = 30
_CLOSE = 1e-4  # two tilts so close, as a ratio less 1, do as well

# How much the rounding of one step may change δ, as a share of δ: far more than is seen, and still
# a hundred times less than what the grid adds.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Tilt:
    """Where the sum of the losses is looked at.

    Attributes:
        factor: λ > 0.
        below, above: the further tilts, < 0 and > 0, that bound best how little of the tilted
            distribution is outside the window.
        epsilon: about what ε is, rather too large.
    """

    factor: float
    below: float
    above: float
    epsilon: float


def tilt_towards(
    delta: float, sampled: Sequence[tuple[Array, Array]], counts: Sequence[int]
) -> Tilt:
    """A λ near that whose bound ε <= (K(λ) - log δ - log(1 + λ)) / λ - log(1 + 1/λ) is least.

    The bound is that of Canonne, Kamath, Steinke 2020 (arXiv 2004.00010, proposition 12).

    Args:
        delta: in (0, 1).
        sampled: losses of each release and the logs of their shares.
        counts: how often each is released.
    """
    cumulant = _cumulant(sampled, counts)

    def of_epsilon(factor: float) -> tuple[float, float]:
        value, mean, variance = cumulant(factor)
        return (
            factor * mean - value + math.log1p(factor) + math.log(delta),
            factor**2 * variance + factor / (1 + factor),
        )

    best = _zero(of_epsilon, start=1.0)
    bound = (cumulant(best)[0] - math.log(delta) - math.log1p(best)) / best - math.log1p(1 / best)
    factor = _SHORT_OF_BOUND * best
    at_factor, _, variance = cumulant(factor)

    def further(sign: int) -> float:
        def of_window(tilt: float) -> tuple[float, float]:
            value, mean, variance = cumulant(factor + sign * tilt)
            off = sign * tilt * mean - (value - at_factor) + math.log(_OUTSIDE)
            return off, tilt**2 * variance

        return sign * _zero(of_window, start=1 / math.sqrt(max(variance, 1e-200)))

    return Tilt(factor, further(-1), further(1), max(0.0, bound))


def _zero(function: Callable[[float], tuple[float, float]], *, start: float) -> float:
    """About where a rising function of x > 0 crosses zero, by Newton's steps in log x.

    Args:
        function: x -> value, derivative by log x.
    """
    x, low, high = start, 0.0, math.inf
    for _ in range(_NEWTON_STEPS):
        value, slope = function(x)
        low, high = (x, high) if value < 0 else (low, x)
        step = -value / max(slope, abs(value))  # one at most
        if abs(step) < _CLOSE:
            break
        further = x * math.exp(step)
        x = further if low < further < high else math.sqrt(low * high)
    return x


def composed_epsilon(parts: Parts, tilt: Tilt, delta: float) -> float:
    """ε at `delta` of releases whose privacy losses add up.

    Guarantee: not less than the ε of the distributions given, whatever the tilt. What lies above
    the window counts as an unbounded loss; what lies below comes up within it, where it can only
    raise ε; rounding is allowed for by a smaller δ.

    Args:
        parts: distributions on one grid, and how often each is released; at least one.
        tilt: see `tilt_towards`.
        delta: in (0, 1).

    Returns:
        ε >= 0; infinite if an unbounded loss is more likely than δ.
    """
    tilted = _Tilted.of(parts, tilt.factor)
    bottom, top, is_all = tilted.window(tilt)
    losses = np.arange(bottom, top + 1, dtype=np.float64) * tilted.grid
    with np.errstate(divide="ignore"):
        logs = np.log(tilted.sums(bottom, top)) + tilted.cumulant - tilt.factor * losses
    # No probability is above 1; where one seems to be, far below ε, no digit of it is right.
    logs = np.minimum(logs, 0.0)
    infinite = -math.expm1(sum(count * math.log1p(-part.infinite) for part, count in parts))
    if not is_all:
        above = tilted.cumulant - tilt.factor * losses[-1] + math.log(_OUTSIDE)
        infinite += math.exp(min(above, 0.0))
    steps = sum(count for _, count in parts)
    return _epsilon(losses, logs, tilted.grid, infinite, delta * (1 - _ROUNDING * steps))


@dataclass(frozen=True, eq=False)
class _Tilted:
    """Distributions p(l) e^(λl - κ), each with the κ that makes it one.

    Attributes:
        parts: log p(l) + λl - κ of each, -∞ where p is 0, its losses, and how often it is released.
        grid: of all.
        cumulant: K(λ), the sum of κ over all releases.
    """

    parts: Sequence[tuple[Array, LossDistribution, int]]
    grid: float
    cumulant: float

    @classmethod
    def of(cls, parts: Parts, factor: float) -> _Tilted:
        found, cumulant = [], 0.0
        for part, count in parts:
            with np.errstate(divide="ignore"):
                logs = np.log(part.masses) + factor * part.losses
            kappa = _log_sum(logs)
            found.append((logs - kappa, part, count))
            cumulant += count * kappa
        return cls(found, parts[0][0].grid, cumulant)

    def window(self, tilt: Tilt) -> tuple[int, int, bool]:
        """The least and the greatest place of a window outside which there is at most `_OUTSIDE`
        on either side (Chernoff), or nothing; whether there is nothing above it."""
        least = sum(count * part.first for _, part, count in self.parts)
        greatest = least + sum(count * (len(logs) - 1) for logs, _, count in self.parts)
        below, above = (
            (self._cumulant_at(nu) - math.log(_OUTSIDE)) / (nu * self.grid)
            for nu in (tilt.below, tilt.above)
        )
        bottom, top = math.floor(max(below, least)), math.ceil(min(above, greatest))
        return bottom, top, top == greatest

    def _cumulant_at(self, nu: float) -> float:
        """log E[e^(ν · sum)] under the tilted distribution."""
        return sum(count * _log_sum(logs + nu * part.losses) for logs, part, count in self.parts)

    def sums(self, bottom: int, top: int) -> Array:
        """Probabilities of the sum's places bottom … top; what lies outside comes round."""
        from scipy import fft

        size = int(fft.next_fast_len(top - bottom + 1, real=True))
        spectra: dict[int, NDArray[np.complex128] | float] = defaultdict(lambda: 1.0)
        for logs, part, count in self.parts:
            places = (part.first + np.arange(len(logs))) % size
            spectra[count] = spectra[count] * fft.rfft(np.bincount(places, np.exp(logs), size))
        spectrum = math.prod(spectrum**count for count, spectrum in spectra.items())
        from_zero = fft.irfft(spectrum, size)
        from_bottom: Array = np.roll(from_zero, -(bottom % size))
        return np.maximum(from_bottom[: top - bottom + 1], 0.0)


def _epsilon(losses: Array, logs: Array, grid: float, infinite: float, delta: float) -> float:
    """The least ε >= 0 with δ(ε) <= `delta`, but not below the least loss.

    δ(ε) = infinite + Σ p(l) (1 - e^(ε - l)) over l > ε. At a place l' of the grid g the sum is that
    of e^(l' - l) (e^g - 1) P(loss >= l) over l > l': no differences in which digits would be lost.

    Args:
        losses: ascending (N,), at distance g = `grid`.
        logs: log p of each.
    """
    if infinite >= delta:
        return math.inf
    least = max(0.0, float(losses[0]))
    positive = losses > 0
    losses, logs = losses[positive], logs[positive]
    places = losses - grid  # l' before each
    excess = places + math.log(math.expm1(grid)) + _log_sums_from(_log_sums_from(logs) - losses)
    missed = np.flatnonzero(infinite + np.exp(excess) > delta)
    if not len(missed):
        return least
    last = missed[-1]
    place = float(places[last])
    # Up to the next place δ(ε) falls by (e^(ε - l') - 1) Σ p(l) e^(l' - l).
    slope = math.exp(place + np.logaddexp.reduce(logs[last:] - losses[last:]))
    above = infinite + math.exp(excess[last]) - delta
    return max(least, place + (min(math.log1p(above / slope), grid) if slope else grid))


def _log_sums_from(logs: Array) -> Array:
    """Of each place, the log of the sum over it and those after it."""
    return np.logaddexp.accumulate(logs[::-1])[::-1]


def _log_sum(logs: Array) -> float:
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).sum()))


def _cumulant(
    sampled: Sequence[tuple[Array, Array]], counts: Sequence[int]
) -> Callable[[float], tuple[float, float, float]]:
    """λ -> K(λ) and its first two derivatives."""
    losses, log_shares = (np.stack(of_all) for of_all in zip(*sampled, strict=True))
    weights = np.array(counts, dtype=np.float64)

    def at(factor: float) -> tuple[float, float, float]:
        logs = log_shares + factor * losses
        values = np.logaddexp.reduce(logs, axis=1)
        shares = np.exp(logs - values[:, None])
        means = (shares * losses).sum(axis=1)
        variances = (shares * (losses - means[:, None]) ** 2).sum(axis=1)
        return float(weights @ values), float(weights @ means), float(weights @ variances)

    return at
