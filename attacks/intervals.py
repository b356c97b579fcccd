"""Exact confidence limits of a probability, from the number of successes in independent trials."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from attacks._validate import Floats, open_unit


def lower_limit(successes: ArrayLike, trials: ArrayLike, *, error: float) -> Floats:
    """One-sided Clopper-Pearson limit: the probability is below it with chance at most `error`.

    Args:
        successes: integers between 0 and `trials`, any shape.
        trials: integers of a shape that broadcasts with `successes`.
        error: in (0, 1).

    Returns:
        An array of the broadcast shape; 0 where there was no success.
    """
    k, n = _counts(successes, trials, error)
    # The beta quantile does not exist for k = 0; its limit is 0.
    limit: Floats = np.where(k > 0, special.betaincinv(np.maximum(k, 1), n - k + 1, error), 0.0)
    return limit


def upper_limit(successes: ArrayLike, trials: ArrayLike, *, error: float) -> Floats:
    """One-sided Clopper-Pearson limit: the probability is above it with chance at most `error`.

    Arguments as for `lower_limit`; 1 where every trial was a success.
    """
    k, n = _counts(successes, trials, error)
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
    open_unit("confidence", confidence)
    error = (1 - confidence) / 2
    low = lower_limit(successes, trials, error=error)
    return float(low), float(upper_limit(successes, trials, error=error))


def _counts(successes: ArrayLike, trials: ArrayLike, error: float) -> tuple[Floats, Floats]:
    """Check counts and error; return the counts as floats of one shape."""
    open_unit("error", error)
    k, n = np.broadcast_arrays(
        np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    )
    if not ((k >= 0) & (k <= n) & (n >= 1)).all():
        raise ValueError(
            f"Expected 0 <= successes <= trials and trials >= 1, got {successes!r} of {trials!r}: "
            "count the successes among the trials."
        )
    return k, n
