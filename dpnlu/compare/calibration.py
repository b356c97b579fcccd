"""Whether a classifier is as often right as it is sure: calibration, from arrays alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attacks.intervals import binomial_interval

# Of equal width over [0, 1], as in Guo et al. (2017).
BINS = 15
_REPLICATES = 1000


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The texts whose confidence falls into one part of [0, 1].

    Attributes:
        texts: how many, at least one.
        confidence, accuracy: their means.
        accuracy_interval: Clopper-Pearson.
    """

    texts: int
    confidence: float
    accuracy: float
    accuracy_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Confidence against accuracy over N texts.

    Attributes:
        texts: N.
        accuracy, mean_confidence: shares.
        overconfidence: mean confidence − accuracy; negative: too careful.
        overconfidence_interval: percentiles of the bootstrap over texts.
        ece: the expected calibration error: the mean over texts of the distance between mean
            confidence and accuracy of their bin (Guo et al., 2017, eq. 3).
        ece_interval: basic bootstrap over texts, which takes out that both estimate and replicates
            are too high; widened to contain the estimate.
        ece_by_chance: the mean error of models that are as often right as they are sure, with the
            same confidences on as many texts: what is no higher says nothing.
        bins: those that hold a text, in the order of confidence.
    """

    texts: int
    accuracy: float
    mean_confidence: float
    overconfidence: float
    overconfidence_interval: tuple[float, float]
    ece: float
    ece_interval: tuple[float, float]
    ece_by_chance: float
    bins: tuple[Bin, ...]


def calibration(
    sure: NDArray[np.float64],
    right: NDArray[np.bool_],
    *,
    confidence: float,
    rng: np.random.Generator,
) -> Calibration:
    """Compare how sure a classifier is with how often it is right.

    Args:
        sure: (N,) its own probability of what it answers, in [0, 1].
        right: (N,) whether the answer is right.
        confidence: of the intervals, in (0, 1).
        rng: of the bootstrap.

    Raises:
        ValueError: there is no text, the shapes differ, or a probability is out of range.
    """
    sure = np.asarray(sure, np.float64)
    if sure.ndim != 1 or sure.shape != np.shape(right) or not sure.size:
        raise ValueError(
            "Expected a confidence and a verdict for each text, at least one, got shapes "
            f"{sure.shape} and {np.shape(right)}."
        )
    if not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(
            "Expected confidences in [0, 1], got others: a model that has diverged has none."
        )
    places = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    ece, gap = _error(places, right - sure), float(np.mean(sure - right))
    gaps, errors, chance = _replicates(places, sure, right, rng)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.maximum(2 * ece - np.quantile(errors, tails)[::-1], 0)
    least, most = np.quantile(gaps, tails)
    return Calibration(
        texts=len(sure),
        accuracy=float(np.mean(right)),
        mean_confidence=float(np.mean(sure)),
        overconfidence=gap,
        overconfidence_interval=(float(min(least, gap)), float(max(most, gap))),
        ece=ece,
        ece_interval=(float(min(low, ece)), float(max(high, ece))),
        ece_by_chance=float(np.mean(chance)),
        bins=tuple(
            _bin(sure[places == place], right[places == place], confidence)
            for place in np.unique(places)
        ),
    )


def _error(places: NDArray[np.int64], excess: NDArray[np.float64]) -> float:
    """The expected calibration error, from each text's verdict minus its confidence."""
    return float(np.abs(np.bincount(places, excess, minlength=BINS)).sum() / len(places))


def _replicates(
    places: NDArray[np.int64],
    sure: NDArray[np.float64],
    right: NDArray[np.bool_],
    rng: np.random.Generator,
) -> tuple[list[float], list[float], list[float]]:
    """Of texts drawn anew overconfidence and error; and the error of calibrated models."""
    excess, size = right - sure, len(sure)
    gaps, errors, chance = [], [], []
    for _ in range(_REPLICATES):
        drawn = rng.integers(size, size=size)
        gaps.append(float(-excess[drawn].mean()))
        errors.append(_error(places[drawn], excess[drawn]))
        chance.append(_error(places, (rng.random(size) < sure) - sure))
    return gaps, errors, chance


def _bin(sure: NDArray[np.float64], right: NDArray[np.bool_], confidence: float) -> Bin:
    return Bin(
        texts=len(sure),
        confidence=float(sure.mean()),
        accuracy=float(right.mean()),
        accuracy_interval=binomial_interval(int(right.sum()), len(right), confidence=confidence),
    )
