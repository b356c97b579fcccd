"""The privacy loss distribution of one Gaussian release of a Poisson-sampled sum, on a grid.

Without the example the release is A = N(0, σ²), with it M = (1 - q) A + q B, B = N(1, σ²): the
worst case (Zhu, Dong, Wang 2022, "Optimal Accounting of Differential Privacy via Characteristic
Function", arXiv 2106.08567). At the outcome x the privacy loss is -L(x) if the example is added,
and if it is removed

    L(x) = log(M / A) = log(1 - q + q e^((2x - 1) / 2σ²)).

Connect the dots (Doroshenko et al. 2022, arXiv 2207.04380, algorithm 1): outcomes whose loss lies
between neighbours l and l + g of the grid, of probability P under the distribution that the loss is
drawn from and Q under the other, move to these two so that P and Q stay what they are,

    u = (P - e^l Q) / (1 - e^-g) to l + g, and P - u to l.

P and Q are taken from the interval itself. Differences between values of δ would give the same, but
keep few digits where δ is close to 1: for a small sampling rate on a fine grid they find
probability that is not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OUTCOMES = 1024
_MARGIN = 6.0  # standard deviations: a tilted distribution reaches beyond where the plain one ends


@dataclass(frozen=True, eq=False)
class LossDistribution:
    """How likely each privacy loss of a release is.

    Attributes:
        grid: distance g > 0 between neighbouring losses.
        first: the least loss, in units of g.
        masses: probability of the losses first · g, (first + 1) · g, … (N,).
        infinite: probability of an unbounded loss.
    """

    grid: float
    first: int
    masses: Array
    infinite: float

    @property
    def losses(self) -> Array:
        return _places(self.first, len(self.masses)) * self.grid


def loss_distributions(
    noise_multiplier: float, sample_rate: float, *, grid: float, tail: float
) -> tuple[LossDistribution, LossDistribution]:
    """Those of one release if an example is removed, and if one is added.

    Guarantee: the pair of distributions that each stands for can tell the two data sets apart at
    least as well as the release can. For an interval between two losses this is so because the
    outcome within it can be drawn again from the place that it was moved to; beyond the ends of the
    grid losses are rounded up.

    Args:
        noise_multiplier: σ > 0, in units of the sensitivity.
        sample_rate: q in (0, 1].
        grid: g > 0.
        tail: probability, above 0, up to which outcomes on either side may count as one, of an
            unbounded loss on the upper side.
    """
    reach = noise_multiplier * deviations(tail)
    first, last = _losses(np.array([-reach, 1 + reach]), noise_multiplier, sample_rate) / grid
    places = np.arange(math.floor(first), math.ceil(last) + 1)
    edges = _outcomes(places * grid, noise_multiplier, sample_rate)
    without = interval_masses(edges / noise_multiplier)
    shifted = interval_masses((edges - 1) / noise_multiplier)
    mixed = (1 - sample_rate) * without + sample_rate * shifted
    return (
        connected(mixed, without, grid, int(places[0])),
        connected(without[::-1], mixed[::-1], grid, -int(places[-1])),
    )


def sampled_losses(
    noise_multiplier: float, sample_rate: float, *, tail: float, removed: bool
) -> tuple[Array, Array]:
    """Losses of outcomes at equal distances and the log of their share, to integrate over.

    Args:
        noise_multiplier, sample_rate, tail: as of `loss_distributions`.
        removed: if an example is removed, not added.

    Returns:
        losses and log shares, (1024,) each; shares add up to 1.
    """
    reach = noise_multiplier * (deviations(tail) + _MARGIN)
    outcomes = np.linspace(-reach, 1 + reach, _OUTCOMES)
    losses = _losses(outcomes, noise_multiplier, sample_rate)
    logs = -0.5 * (outcomes / noise_multiplier) ** 2
    if removed:
        logs += losses
    logs -= np.logaddexp.reduce(logs)
    return (losses if removed else -losses), logs


def deviations(tail: float) -> float:
    """How far from its mean, in standard deviations, a normal variable lies with that chance."""
    from scipy.special import ndtri

    return -float(ndtri(tail))


def _losses(outcomes: Array, noise_multiplier: float, sample_rate: float) -> Array:
    """L(x) of each."""
    unsampled = (2 * outcomes - 1) / (2 * noise_multiplier**2)
    rest = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    return np.logaddexp(rest, math.log(sample_rate) + unsampled)


def _outcomes(losses: Array, noise_multiplier: float, sample_rate: float) -> Array:
    """The x of each loss; -∞ if every outcome's is larger.

    Without sampling the loss there were log(1 + (e^l - 1) / q), here in two forms, one that keeps
    its digits for small and one that does not overflow for large l.
    """
    small, large = np.minimum(losses, 1.0), np.maximum(losses, 1.0)
    with np.errstate(divide="ignore"):
        of_small = np.log1p(np.maximum(np.expm1(small) / sample_rate, -1.0))
        of_large = large - math.log(sample_rate) + np.log1p((sample_rate - 1) * np.exp(-large))
    return noise_multiplier**2 * np.where(losses < 1, of_small, of_large) + 0.5


def interval_masses(edges: Array) -> Array:
    """What a standard normal distribution has below the first edge, between each and the next, and
    above the last. Above 0 the upper tails are subtracted, for the digits."""
    from scipy.special import ndtr

    below, above = ndtr(edges), ndtr(-edges)
    between = np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return np.concatenate((below[:1], between, above[-1:]))


def connected(upper: Array, lower: Array, grid: float, first: int) -> LossDistribution:
    """`upper` and `lower` are P and Q of what is below the grid, of each interval, of what is
    above; `first` is the grid's least loss in units of g."""
    inside = upper[1:-1]
    losses = _places(first, len(inside)) * grid
    with np.errstate(divide="ignore"):
        excess = inside - np.exp(losses + np.log(lower[1:-1]))
    raised = np.clip(excess / -math.expm1(-grid), 0.0, inside)
    masses = np.zeros(len(inside) + 1)
    masses[0] = upper[0]
    masses[:-1] += inside - raised
    masses[1:] += raised
    return LossDistribution(grid, first, masses, float(upper[-1]))


def _places(first: int, count: int) -> Array:
    return np.arange(first, first + count, dtype=np.float64)
