"""ε of several copies together: closed forms, a second computation, and what it may never do."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from dpnlu.accounting import SampledGaussian, epsilon, group_epsilon
from dpnlu.accounting.mixture import Copies

DELTA = 1e-5


def _events(sigma: float, rate: float, steps: int) -> list[SampledGaussian]:
    return [SampledGaussian(noise_multiplier=sigma, sample_rate=rate, steps=steps)]


def _gaussian_epsilon(mean: float, delta: float) -> float:
    """Of N(0, 1) against N(mean, 1): Balle and Wang (2018), theorem 8."""

    def found(eps: float) -> float:
        lost = stats.norm.cdf(mean / 2 - eps / mean)
        return lost - math.exp(eps + stats.norm.logcdf(-mean / 2 - eps / mean)) - delta

    return float(optimize.brentq(found, 1e-9, 500))


@pytest.mark.parametrize(("size", "steps"), [(3, 1), (2, 4), (10, 9)])
def test_without_sampling_copies_are_a_larger_sensitivity(size: int, steps: int) -> None:
    exact = _gaussian_epsilon(size * math.sqrt(steps) / 4.0, DELTA)
    found = group_epsilon(_events(4.0, 1.0, steps), size=size, delta=DELTA)
    assert exact <= found <= exact * 1.01 + 0.01


@pytest.mark.parametrize(("sigma", "rate", "size"), [(1.0, 0.1, 5), (2.0, 0.5, 3), (1.5, 0.02, 40)])
def test_one_step_is_the_hockey_stick_of_the_mixture(sigma: float, rate: float, size: int) -> None:
    """δ(ε) by numerical integration, in both directions."""
    counts = np.arange(size + 1)
    weights = stats.binom.pmf(counts, size, rate)

    def mixture(x: float) -> float:
        return float((weights * stats.norm.pdf(x, counts, sigma)).sum())

    found = group_epsilon(_events(sigma, rate, 1), size=size, delta=DELTA)

    def lost(eps: float) -> float:
        def removed(x: float) -> float:
            return max(0.0, mixture(x) - math.exp(eps) * stats.norm.pdf(x, 0, sigma))

        def added(x: float) -> float:
            return max(0.0, stats.norm.pdf(x, 0, sigma) - math.exp(eps) * mixture(x))

        ends = (-12 * sigma, size + 12 * sigma)
        return max(integrate.quad(f, *ends, limit=400, points=[0])[0] for f in (removed, added))

    assert lost(found) <= DELTA * 1.001
    assert lost(found * 0.97 - 0.02) > DELTA


def test_one_copy_is_the_epsilon_of_one_example() -> None:
    events = _events(1.1, 0.02, 100)
    assert group_epsilon(events, size=1, delta=DELTA) == epsilon(events, delta=DELTA)


def test_it_rises_with_the_copies_and_falls_behind_none() -> None:
    events = _events(1.0, 0.01, 200)
    found = [group_epsilon(events, size=size, delta=DELTA) for size in (1, 2, 5, 20)]
    assert all(a < b for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("sigma", "size", "computed"),
    [(0.8, 2, 4.4), (1.0, 10, 17.2), (1.0, 100, 504.0), (2.0, 10, 5.4), (2.0, 100, 122.3)],
)
def test_a_corpus_of_the_size_of_snips(sigma: float, size: int, computed: float) -> None:
    """By `dp-accounting`, for 13 084 examples, batches of 64 and 2 040 steps."""
    found = group_epsilon(_events(sigma, 64 / 13_084, 2_040), size=size, delta=DELTA)
    assert found == pytest.approx(computed, rel=2e-3, abs=0.05)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "size"),
    [
        (1.0, 0.05, 20, 4),
        pytest.param(2.0, 0.3, 5, 10, marks=pytest.mark.slow),
        (3.0, 0.01, 300, 30),
    ],
)
def test_a_second_accountant_agrees(sigma: float, rate: float, steps: int, size: int) -> None:
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    counts = np.arange(size + 1)
    one = pld.from_mixture_gaussian_mechanism(
        sigma,
        counts.astype(float).tolist(),
        stats.binom.pmf(counts, size, rate).tolist(),
        value_discretization_interval=1e-3,
    )
    second = one.self_compose(steps).get_epsilon_for_delta(DELTA)
    found = group_epsilon(_events(sigma, rate, steps), size=size, delta=DELTA)
    assert found == pytest.approx(second, rel=1e-3, abs=2e-3)


def test_the_copies_that_a_batch_holds() -> None:
    copies = Copies.binomial(200, 0.3, left_out=1e-9)
    assert 0 < copies.numbers[0] and copies.most < 200
    inside = stats.binom.pmf(copies.numbers, 200, 0.3)
    assert 1 - 1e-9 <= inside.sum() < 1
    np.testing.assert_allclose(np.exp(copies.logs), inside / inside.sum(), rtol=1e-9)
    assert Copies.binomial(3, 1.0, left_out=1e-9).numbers.tolist() == [3.0]


def test_nothing_and_everything() -> None:
    assert group_epsilon([], size=5, delta=DELTA) == 0.0
    assert group_epsilon(_events(0.0, 0.1, 1), size=5, delta=DELTA) == math.inf
    assert group_epsilon(_events(0.3, 0.5, 50), size=1000, delta=DELTA) == math.inf


def test_different_events_are_composed() -> None:
    first, second = _events(2.0, 0.1, 5), _events(3.0, 0.1, 5)
    both = group_epsilon([*first, *second], size=4, delta=DELTA)
    for one in (first, second):
        assert group_epsilon(one, size=4, delta=DELTA) < both
    same = group_epsilon([*first, *first], size=4, delta=DELTA)
    assert same == group_epsilon(_events(2.0, 0.1, 10), size=4, delta=DELTA)
    assert both < same


def test_what_nobody_can_tell_is_refused() -> None:
    truncated = [
        SampledGaussian(
            noise_multiplier=1.0, sample_rate=0.1, steps=1, max_batch_size=5, num_examples=20
        )
    ]
    with pytest.raises(ValueError, match="not truncated for a group of 3"):
        group_epsilon(truncated, size=3, delta=DELTA)
    with pytest.raises(ValueError, match="at least one example, got 0"):
        group_epsilon(_events(1.0, 0.1, 1), size=0, delta=DELTA)
