"""How much extraction gave back: position by position, and how many guesses it takes.

Exact match, Hamming distance and the lower bound on a group's ε are in `attacks.canaries`; here is
what is needed besides, and exposure where there are too many secrets to score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from attacks._validate import Floats, count, floats
from attacks.canaries import recovery
from attacks.intervals import binomial_interval

_LEAST_REFERENCES = 100
# A larger loss is no measurement, nor are references within the inverse of that.
_LARGEST = 1e100
# Of the quadrature in the far tail.
_NODES = 40
# Below such a probability the tail is integrated, where a difference would round to nothing.
_FAR = 1e-10


@dataclass(frozen=True, kw_only=True)
class PositionMatch:
    """How often the token of one position was right.

    Attributes:
        match: share of trials.
        interval: its Clopper-Pearson interval.
        chance: `match` of a uniform guess.
    """

    match: float
    interval: tuple[float, float]
    chance: float


@dataclass(frozen=True, kw_only=True)
class EstimatedExposure:
    """Exposure from a sample of the secrets, where there are too many to score.

    Attributes:
        sampled_bits: -log2 of the share of references at or before the secret, the secret itself
            counted as one of them; at most log2 of one more than their number.
        bits: extrapolated, by a skew-normal distribution of the references' losses (Carlini et
            al., 2019, section 4.3); at most `available_bits`, however far out the secret lies.
        fit_p_value: of the Kolmogorov-Smirnov test of that fit; as it was fitted to the same
            losses it is too large. Where it is small, do not believe `bits`.
        available_bits: log2 of the number of secrets.
        references: the number of losses.
    """

    sampled_bits: float
    bits: float
    fit_p_value: float
    available_bits: float
    references: int


@dataclass(frozen=True, kw_only=True)
class GuessingCurve:
    """The share of secrets found within so many guesses, the likeliest first.

    Attributes:
        guesses: (G,) rising.
        found: (G,) the share.
        low, high: (G,) their Clopper-Pearson intervals, each by itself.
        chance: (G,) the share when guessing blindly.
    """

    guesses: Floats
    found: Floats
    low: Floats
    high: Floats
    chance: Floats


def position_matches(
    guesses: ArrayLike,
    secrets: ArrayLike,
    *,
    candidates: int | Sequence[int] = 10,
    confidence: float = 0.95,
) -> tuple[PositionMatch, ...]:
    """Compare extracted with true secrets at each position; one row per trained model.

    Args:
        guesses: `(K, length)`, indices of candidate tokens.
        secrets: `(K, length)`, the truth.
        candidates: number of candidate tokens, of each position or of all.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: as `attacks.canaries.recovery`.
    """
    recovery(guesses, secrets, candidates=candidates, confidence=confidence)
    right = np.asarray(guesses) == np.asarray(secrets)
    trials, length = right.shape
    sizes = [candidates] * length if isinstance(candidates, int) else list(candidates)
    return tuple(
        PositionMatch(
            match=float(column.mean()),
            interval=binomial_interval(int(column.sum()), trials, confidence=confidence),
            chance=1 / size,
        )
        for column, size in zip(right.T, sizes, strict=True)
    )


def estimated_exposure(
    loss: float, reference_losses: ArrayLike, *, candidates: int
) -> EstimatedExposure:
    """Estimate the exposure of a secret from the losses of secrets drawn at random.

    Args:
        loss: the model's loss on the canary with the true secret.
        reference_losses: `(N,)`, with secrets drawn uniformly and independently; N >= 100.
        candidates: the number of possible secrets.

    Raises:
        ValueError: too few or constant references, or losses that are not finite.
    """
    references = floats("reference_losses", reference_losses, dimensions=1)
    true = float(floats("loss", loss, dimensions=0))
    available = math.log2(count("candidates", candidates, least=1))
    if not (np.abs([true, *references]) < _LARGEST).all():
        raise ValueError(
            f"Expected losses below {_LARGEST:g}, got larger or infinite ones: the model has "
            "diverged."
        )
    if references.size < _LEAST_REFERENCES or references.std() <= 1 / _LARGEST:
        raise ValueError(
            f"Expected at least {_LEAST_REFERENCES} different reference losses, got "
            f"{np.unique(references).size} among {references.size}: draw more secrets."
        )
    before = int((references <= true).sum())
    # In units of their own spread, so that the fit does not depend on the scale.
    center, spread = references.mean(), references.std()
    standard = (references - center) / spread
    shape, location, scale = stats.skewnorm.fit(standard)
    far = (true - center) / spread
    bits = -_log_skew_normal_cdf((far - location) / scale, shape=shape) / math.log(2)
    test = stats.kstest(standard, stats.skewnorm(shape, location, scale).cdf)
    return EstimatedExposure(
        sampled_bits=min(available, -math.log2((1 + before) / (1 + references.size))),
        bits=min(available, max(0.0, bits)),
        fit_p_value=float(test.pvalue),
        available_bits=available,
        references=references.size,
    )


def _log_skew_normal_cdf(value: float, *, shape: float) -> float:
    """log F(value) of the standard skew-normal distribution, far into its left tail, too.

    Where F itself is too small to be a difference, log F is integrated from the density f, which is
    log-concave: f(x - u/s) e^u is smooth for the slope s of log f at x (Gauss-Laguerre).
    """
    direct = float(stats.skewnorm.cdf(value, shape))
    if direct > _FAR:
        return math.log(direct)
    step = 1e-4 * max(1.0, abs(value))
    ends = _log_density(np.array([value - step, value + step]), shape)
    slope = max(float(ends[1] - ends[0]) / (2 * step), 1e-3)
    nodes, weights = special.roots_laguerre(_NODES)
    there = float(_log_density(np.array([value]), shape)[0])
    integrand = _log_density(value - nodes / slope, shape) - there + nodes
    return there - math.log(slope) + float(special.logsumexp(integrand, b=weights))


def _log_density(values: Floats, shape: float) -> Floats:
    density: Floats = (
        math.log(2) - values**2 / 2 - math.log(2 * math.pi) / 2 + special.log_ndtr(shape * values)
    )
    return density


def guessing_curve(ranks: ArrayLike, *, candidates: int, confidence: float = 0.95) -> GuessingCurve:
    """Return how many secrets are found within how many guesses.

    Args:
        ranks: `(K,)`, of the secrets of independently trained models, from 1; ties share the
            middle rank, as in `attacks.canaries.exposure`.
        candidates: the number of possible secrets.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: no rank, or one outside of [1, candidates].
    """
    values, most = floats("ranks", ranks, dimensions=1), count("candidates", candidates, least=1)
    if values.size == 0 or values.min() < 1 or values.max() > most:
        raise ValueError(
            f"Expected ranks in [1, {most}], at least one, got {values.tolist()[:5]}: the first "
            "candidate has rank 1."
        )
    guesses = np.unique(np.ceil(np.concatenate(([1.0, float(most)], values))))
    hits = [int((values <= guess).sum()) for guess in guesses]
    limits = np.array([binomial_interval(k, values.size, confidence=confidence) for k in hits])
    return GuessingCurve(
        guesses=guesses,
        found=np.array(hits) / values.size,
        low=limits[:, 0],
        high=limits[:, 1],
        chance=guesses / most,
    )
