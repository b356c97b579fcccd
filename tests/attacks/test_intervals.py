"""Oracles: the binomial tails that define the Clopper-Pearson limits."""

import numpy as np
import pytest
from scipy import stats

from attacks.intervals import binomial_interval, lower_limit, upper_limit


@pytest.mark.parametrize(("successes", "trials"), [(1, 10), (5, 10), (9, 10), (250, 1000)])
def test_limits_are_where_the_tail_is_the_error(successes, trials):
    low = float(lower_limit(successes, trials, error=0.03))
    high = float(upper_limit(successes, trials, error=0.03))
    assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.03)
    assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.03)


def test_limits_at_the_edges():
    assert lower_limit(0, 20, error=0.05) == 0
    assert upper_limit(20, 20, error=0.05) == 1
    assert upper_limit(0, 20, error=0.05) == pytest.approx(1 - 0.05 ** (1 / 20))


def test_limits_of_arrays_are_those_of_their_entries():
    counts = np.arange(8)
    limits = lower_limit(counts, 7, error=0.1)
    assert limits.tolist() == [float(lower_limit(k, 7, error=0.1)) for k in counts]


def test_interval_agrees_with_scipy():
    reference = stats.binomtest(3, 11).proportion_ci(0.9, method="exact")
    assert binomial_interval(3, 11, confidence=0.9) == pytest.approx(tuple(reference))


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match="successes <= trials"):
        binomial_interval(successes, trials, confidence=0.95)


def test_confidence_in_percent_is_refused():
    with pytest.raises(ValueError, match=r"`confidence` in \(0, 1\), got 95"):
        binomial_interval(1, 2, confidence=95)
