"""Which test texts one model gets right and another wrong, from arrays alone.

Two models of the same accuracy need not be right about the same texts. Yan et al. (2021),
Positive-congruent training, call a text that only the older model gets right a negative flip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks.intervals import binomial_interval


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Shares of N texts, with their Clopper-Pearson intervals.

    Attributes:
        texts: N.
        negative: the first model is right, the second wrong.
        positive: the first model is wrong, the second right.
        disagreement: the answers differ, right or wrong.
    """

    texts: int
    negative: float
    negative_interval: tuple[float, float]
    positive: float
    positive_interval: tuple[float, float]
    disagreement: float
    disagreement_interval: tuple[float, float]


def flips(
    right: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    differ: NDArray[np.bool_],
    *,
    confidence: float,
) -> Flips:
    """Count the texts about which two models are not of one mind.

    Args:
        right: (N,) each, N >= 1: whether the first model, and the second, is right.
        differ: (N,) whether their answers differ.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: the shapes differ, or there is no text, or answers are the same where one is
            right and the other wrong.
    """
    first, second = right
    if not first.shape == second.shape == differ.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            "Expected two verdicts and a comparison for each text, at least one, got shapes "
            f"{first.shape}, {second.shape} and {differ.shape}."
        )
    if ((first != second) & ~differ).any():
        raise ValueError(
            "Expected answers that differ wherever one alone is right, got equal ones."
        )
    shares: dict[str, Any] = {}
    for name, flipped in (
        ("negative", first & ~second),
        ("positive", ~first & second),
        ("disagreement", differ),
    ):
        shares[name] = float(flipped.mean())
        shares[f"{name}_interval"] = binomial_interval(
            int(flipped.sum()), len(flipped), confidence=confidence
        )
    return Flips(texts=len(differ), **shares)
