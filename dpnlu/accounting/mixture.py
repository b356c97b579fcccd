"""The privacy loss of one Gaussian release where a batch holds a random number of copies.

Without the copies the release is A = N(0, σ²); with k of them in the batch, which has probability
p_k, it is N(k, σ²) at worst: M = Σ p_k N(k, σ²) (Choquette-Choo et al. 2023, "Privacy Amplification
for Matrix Mechanisms", arXiv 2310.15526, section 3). At the outcome x the privacy loss is -L(x) if
the copies are added, and if they are removed

    L(x) = log(M / A) = log Σ p_k e^((2kx - k²) / 2σ²),

which rises with x. With one copy this is `dpnlu.accounting.loss_distribution`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpnlu.accounting.loss_distribution import (
    Array,
    LossDistribution,
    connected,
    deviations,
    interval_masses,
)

_OUTCOMES = 4096
_MARGIN = 6.0  # standard deviations: a tilted distribution reaches beyond where the plain one ends
_HALVINGS = 64
_BEYOND = 10.0
_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Copies:
    """How many of the copies a batch holds.

    Attributes:
        numbers: k, rising (N,).
        logs: log p_k (N,).
        left_out: probability of the numbers that are not listed, at most.
    """

    numbers: Array
    logs: Array
    left_out: float

    @classmethod
    def binomial(cls, size: int, sample_rate: float, *, left_out: float) -> Copies:
        """Each of `size` copies by a coin of its own; what is improbable is left out.

        Args:
            left_out: probability that the numbers left out may have, > 0, half on either side.
        """
        from scipy import stats  # it takes a while: only when needed

        law = stats.binom(size, sample_rate)
        low = max(0, int(law.ppf(left_out / 2)) - 1)
        high = min(size, int(law.isf(left_out / 2)) + 1)
        numbers = np.arange(low, high + 1, dtype=np.float64)
        logs = law.logpmf(numbers)
        there = np.isfinite(logs)
        numbers, logs = numbers[there], logs[there]
        return cls(numbers, logs - np.logaddexp.reduce(logs), left_out)

    @property
    def most(self) -> float:
        return float(self.numbers[-1])

    def losses(self, outcomes: Array, noise_multiplier: float) -> Array:
        """L(x) of each outcome (X,)."""
        found = [
            np.logaddexp.reduce(
                self.logs
                + (2 * x[:, None] - self.numbers) * self.numbers / (2 * noise_multiplier**2),
                axis=1,
            )
            for x in np.array_split(outcomes, max(1, len(outcomes) // _CHUNK))
        ]
        return np.concatenate(found)

    def outcomes(self, losses: Array, noise_multiplier: float, reach: float) -> Array:
        """The x of each loss (X,), rising; far out where no outcome has it.

        Beyond `_BEYOND` times the reach no outcome has a probability above 0 in float64, so that it
        does not matter on which side of there an interval ends.
        """
        low = np.full(len(losses), -_BEYOND * reach)
        high = np.full(len(losses), self.most + _BEYOND * reach)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = self.losses(middle, noise_multiplier) < losses
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        found: Array = (low + high) / 2
        return found


def mixture_distributions(
    noise_multiplier: float, copies: Copies, *, grid: float, tail: float
) -> tuple[LossDistribution, LossDistribution]:
    """Those of one release if the copies are removed, and if they are added.

    Guarantee: as `dpnlu.accounting.loss_distribution.loss_distributions`.

    Args:
        noise_multiplier: σ > 0, in units of the sensitivity.
        grid: g > 0.
        tail: probability, above 0, up to which outcomes on either side may count as one.
    """
    reach = noise_multiplier * deviations(tail)
    ends = np.array([-reach, copies.most + reach])
    first, last = copies.losses(ends, noise_multiplier) / grid
    places = np.arange(math.floor(first), math.ceil(last) + 1)
    edges = copies.outcomes(places * grid, noise_multiplier, reach)
    without = interval_masses(edges / noise_multiplier)
    mixed = np.zeros_like(without)
    for number, log in zip(copies.numbers, copies.logs, strict=True):
        mixed += math.exp(log) * interval_masses((edges - number) / noise_multiplier)
    return (
        connected(mixed, without, grid, int(places[0])),
        connected(without[::-1], mixed[::-1], grid, -int(places[-1])),
    )


def sampled_mixture_losses(
    noise_multiplier: float, copies: Copies, *, tail: float, removed: bool
) -> tuple[Array, Array]:
    """Losses of outcomes at equal distances and the logs of their shares, to integrate over."""
    reach = noise_multiplier * (deviations(tail) + _MARGIN)
    outcomes = np.linspace(-reach, copies.most + reach, _OUTCOMES)
    losses = copies.losses(outcomes, noise_multiplier)
    logs = -0.5 * (outcomes / noise_multiplier) ** 2
    if removed:
        logs += losses
    logs -= np.logaddexp.reduce(logs)
    return (losses if removed else -losses), logs
