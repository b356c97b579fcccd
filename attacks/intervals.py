"""Confidence limits of a probability, and of how much it differs between two looks at one thing."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from attacks._validate import Floats, any_array, bools, floats, open_unit


def lower_limit(successes: ArrayLike, trials: ArrayLike, *, error: float) -> Floats:
    """One-sided Clopper-Pearson limit: the probability is below it with chance at most `error`.

    Args:
        successes: integers between 0 and `trials`, any shape.
        trials: integers of a shape that broadcasts with `successes`.
        error: in (0, 1).

    Returns:
        An array of the broadcast shape; 0 where there was no success.

    Raises:
        ValueError: for counts or an error out of range, or shapes that do not fit.
    """
    k, n, error = _counts(successes, trials, error)
    # The beta quantile does not exist for k = 0; its limit is 0. So is it, or below what scipy can
    # say (NaN), for an error that is next to nothing.
    limit: Floats = np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, error), 0.0)
    return np.nan_to_num(limit, nan=0.0)


def upper_limit(successes: ArrayLike, trials: ArrayLike, *, error: float) -> Floats:
    """One-sided Clopper-Pearson limit: the probability is above it with chance at most `error`.

    Arguments as for `lower_limit`; 1 where every trial was a success.
    """
    k, n, error = _counts(successes, trials, error)
    limit: Floats = 1.0 - lower_limit(n - k, n, error=error)
    return limit


def binomial_interval(successes: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval, exact: its coverage is at least `confidence`.

    Args:
        successes: between 0 and `trials`.
        trials: at least 1.
        confidence: in (0, 1).

    Raises:
        ValueError: for counts or a confidence out of range.
    """
    confidence = open_unit("confidence", confidence)
    error = (1 - confidence) / 2
    low = lower_limit(successes, trials, error=error)
    high = upper_limit(successes, trials, error=error)
    if low.ndim > 0:
        raise ValueError(f"Expected one number of successes and of trials, got shape {low.shape}.")
    return float(low), float(high)


def paired_interval(
    before: ArrayLike, after: ArrayLike, *, confidence: float
) -> tuple[float, float]:
    """Interval of the difference of two success probabilities in the same trials: after − before.

    Method 10 of Newcombe (1998), Improved confidence intervals for the difference between binomial
    proportions based on paired data: it joins two score intervals by the correlation of the
    outcomes, stays in [-1, 1], and is no single point where nothing differs.

    Args:
        before, after: (N,) Boolean, N >= 1: whether each trial was a success.
        confidence: in (0, 1); approximate.

    Raises:
        ValueError: for arrays of other shapes or a confidence out of range.
    """
    confidence = open_unit("confidence", confidence)
    shapes = any_array("before", before).shape, any_array("after", after).shape
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(
            "Expected outcomes of the same trials, at least one, got shapes "
            f"{shapes[0]} and {shapes[1]}: give one before and one after for each."
        )
    first, second = (
        bools(name, values, shape=shapes[0])
        for name, values in (("before", before), ("after", after))
    )
    n, old, new = len(first), float(first.mean()), float(second.mean())
    (low_old, high_old), (low_new, high_new) = (
        _score_interval(share, n, confidence) for share in (old, new)
    )
    phi = _correlation(first, second)
    difference = new - old
    below = _joined(new - low_new, high_old - old, phi)
    above = _joined(high_new - new, old - low_old, phi)
    return max(difference - below, -1.0), min(difference + above, 1.0)


def _score_interval(share: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval around a share of n trials; 0 and 1 are their own limits."""
    z = float(special.ndtri((1 + confidence) / 2))
    if np.isinf(z):  # of a confidence next to 1
        return 0.0, 1.0
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return float(min(middle - half, share)), float(max(middle + half, share))


def _correlation(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Newcombe's φ of paired outcomes, corrected for continuity where it is positive."""
    n, both, one, other = len(first), first & second, first & ~second, ~first & second
    a, b, c = float(both.sum()), float(one.sum()), float(other.sum())
    d = n - a - b - c
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    excess = a * d - b * c
    return float((max(excess - n / 2, 0.0) if excess > 0 else excess) / np.sqrt(margins))


def _joined(one: float, other: float, phi: float) -> float:
    """The distance from a difference to its limit, from those of its two terms."""
    return float(np.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0)))


def _counts(successes: ArrayLike, trials: ArrayLike, error: float) -> tuple[Floats, Floats, float]:
    """Check counts and error; return the counts as floats of one shape."""
    error = open_unit("error", error)
    k, n = floats("successes", successes), floats("trials", trials)
    try:
        k, n = np.broadcast_arrays(k, n)
    except ValueError:
        raise ValueError(
            f"Expected `successes` and `trials` of shapes that fit, got {k.shape} and {n.shape}."
        ) from None
    impossible = ~((k >= 0) & (k <= n) & (n >= 1) & np.isfinite(n) & (k == np.rint(k)))
    if impossible.any():
        raise ValueError(
            "Expected whole numbers, 0 <= successes <= trials and trials >= 1, got "
            f"{k[impossible][0]:g} of {n[impossible][0]:g}: count the successes among the trials."
        )
    return k, n, error
