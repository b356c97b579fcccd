"""Oracles: the binomial tails that define the Clopper-Pearson limits."""

import numpy as np
import pytest
from scipy import stats

from attacks.intervals import binomial_interval, lower_limit, paired_interval, upper_limit


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


# ---- paired shares ---------------------------------------------------------------------------


def _outcomes(both, first, second, neither):
    before = [True] * (both + first) + [False] * (second + neither)
    after = [True] * both + [False] * first + [True] * second + [False] * neither
    return np.array(before), np.array(after)


@pytest.mark.parametrize(
    "cells", [(0.5, 0.2, 0.05, 0.25), (0.9, 0.08, 0.01, 0.01), (0.85, 0.05, 0.05, 0.05)]
)
def test_a_paired_interval_covers_the_difference_about_as_often_as_it_says(cells):
    """Exactly: over all tables of 12 trials, weighted by their probability."""
    n, covered, total = 12, 0.0, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                counts = (a, b, c, n - a - b - c)
                weight = stats.multinomial.pmf(counts, n, cells)
                low, high = paired_interval(*_outcomes(*counts), confidence=0.9)
                covered += weight * (low <= cells[2] - cells[1] <= high)
                total += weight
    assert total == pytest.approx(1)
    assert 0.86 < covered < 0.999


def test_a_paired_interval_contains_the_difference_and_turns_round_with_it():
    for counts in [(5, 3, 1, 2), (10, 0, 0, 0), (0, 0, 0, 4), (0, 7, 0, 0), (5, 0, 0, 5)]:
        before, after = _outcomes(*counts)
        low, high = paired_interval(before, after, confidence=0.95)
        assert -1 <= low <= after.mean() - before.mean() <= high <= 1
        assert low < high, "no trial is certain"
        assert paired_interval(after, before, confidence=0.95) == pytest.approx((-high, -low))


def test_paired_outcomes_that_agree_tell_the_difference_better_than_others():
    agreeing = paired_interval(*_outcomes(20, 6, 0, 24), confidence=0.95)
    crossing = paired_interval(*_outcomes(8, 18, 12, 12), confidence=0.95)
    assert agreeing[1] - agreeing[0] < crossing[1] - crossing[0]


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((2,), (3,)), ((2, 2), (2, 2))])
def test_outcomes_that_do_not_pair_are_refused(shapes):
    with pytest.raises(ValueError, match="same trials"):
        paired_interval(*(np.ones(shape, bool) for shape in shapes), confidence=0.95)
