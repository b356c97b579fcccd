"""Exact confidence limits of a probability, from the number of successes in independent trials."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from attacks._validate import Floats, floats, open_unit


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
