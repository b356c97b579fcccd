"""ε of sums of privacy losses, against sums taken one by one and closed forms."""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from scipy import optimize, special

from dpnlu.accounting import composition
from dpnlu.accounting.composition import composed_epsilon, tilt_towards
from dpnlu.accounting.loss_distribution import LossDistribution, loss_distributions, sampled_losses

# (noise multiplier, sample rate, steps) of each release
MIXED = ((0.8, 0.1, 3), (1.5, 0.3, 4), (0.6, 0.02, 3))
HEAVY = ((0.5, 0.01, 40),)  # seldom a loss, and then a great one
GAUSSIAN = ((5.0, 1.0, 12),)
GRID = 0.005


def parts_of(releases, way):
    return [
        (loss_distributions(sigma, rate, grid=GRID, tail=1e-20)[way], steps)
        for sigma, rate, steps in releases
    ]


def tilt_of(releases, delta, way):
    sampled = [sampled_losses(s, q, tail=1e-20, removed=way == 0) for s, q, _ in releases]
    return tilt_towards(delta, sampled, [steps for _, _, steps in releases])


@lru_cache
def sum_one_by_one(releases, way):
    """Losses, their probabilities, and that of an unbounded loss, convolved one after the other."""
    total, first, bounded = np.ones(1), 0, 1.0
    for part, count in parts_of(releases, way):
        for _ in range(count):
            total = np.convolve(total, part.masses)
            first, bounded = first + part.first, bounded * (1 - part.infinite)
    return (first + np.arange(len(total))) * GRID, total, 1 - bounded


def epsilon_one_by_one(releases, way, delta):
    losses, masses, infinite = sum_one_by_one(releases, way)

    def excess(epsilon):
        shares = -np.expm1(np.minimum(epsilon - losses, 0.0))
        return infinite + math.fsum(masses * shares) - delta

    return optimize.brentq(excess, 0, losses[-1], xtol=1e-12) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("way", [0, 1], ids=["removed", "added"])
@pytest.mark.parametrize("releases", [MIXED, HEAVY, GAUSSIAN], ids=["mixed", "heavy", "gaussian"])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8])
def test_epsilon_is_that_of_the_sum(releases, way, delta):
    parts = parts_of(releases, way)
    exact = epsilon_one_by_one(releases, way, delta)
    found = composed_epsilon(parts, tilt_of(releases, delta, way), delta)
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.5, 3.0])
@pytest.mark.parametrize("releases", [MIXED, HEAVY, GAUSSIAN], ids=["mixed", "heavy", "gaussian"])
def test_another_tilt_never_gives_less(releases, factor):
    parts, best = parts_of(releases, 0), tilt_of(releases, 1e-5, 0)
    exact = epsilon_one_by_one(releases, 0, 1e-5)
    found = composed_epsilon(parts, replace(best, factor=factor * best.factor), 1e-5)
    assert found >= exact * (1 - 1e-9)


@pytest.mark.parametrize("outside", [0.3, 1e-2, 1e-4])
@pytest.mark.parametrize("releases", [MIXED, HEAVY, GAUSSIAN], ids=["mixed", "heavy", "gaussian"])
def test_too_narrow_a_window_never_gives_less(monkeypatch, releases, outside):
    """What it leaves out counts as unbounded or comes round on the safe side."""
    parts = parts_of(releases, 0)
    exact = epsilon_one_by_one(releases, 0, 1e-5)
    wide = composed_epsilon(parts, tilt_of(releases, 1e-5, 0), 1e-5)
    monkeypatch.setattr(composition, "_OUTSIDE", outside)
    narrow = composed_epsilon(parts, tilt_of(releases, 1e-5, 0), 1e-5)
    assert narrow >= exact * (1 - 1e-9)
    assert outside < 0.3 or narrow > wide


def exact_gaussian_epsilon(mu, delta):
    """ε of the Gaussian mechanism, sensitivity / std = mu (Balle and Wang 2018, theorem 8), with
    the digits that a small δ needs."""

    def excess(epsilon):
        log_delta = special.log_ndtr(mu / 2 - epsilon / mu)
        ratio = epsilon + special.log_ndtr(-mu / 2 - epsilon / mu) - log_delta
        return log_delta + math.log(-math.expm1(ratio)) - math.log(delta)

    return optimize.brentq(excess, 1e-9, 500, xtol=1e-12)


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-30, 1e-60])
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (10.0, 400), (3000.0, 1_000_000)])
def test_small_deltas_and_many_steps_keep_their_digits(sigma, steps, delta):
    """Without sampling, `steps` releases are one of a √steps-th of the noise. Fourier transforms of
    what is not tilted are wrong by 1e-11 after a million steps."""
    exact = exact_gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    tail = 1e-10 * delta / steps
    tilt = tilt_towards(delta, [sampled_losses(sigma, 1.0, tail=tail, removed=True)], [steps])
    removed, _ = loss_distributions(sigma, 1.0, grid=0.03 / sigma, tail=tail)
    found = composed_epsilon([(removed, steps)], tilt, delta)
    assert exact * (1 - 1e-9) <= found <= exact * 1.0002


def test_an_unbounded_loss_likelier_than_delta_has_no_epsilon():
    certain = LossDistribution(0.1, 0, np.array([0.5, 0.5 - 1e-3]), 1e-3)
    tilt = tilt_of(MIXED, 1e-5, 0)
    assert composed_epsilon([(certain, 1)], tilt, 0.9e-3) == math.inf
    assert composed_epsilon([(certain, 1)], tilt, 2e-3) < 0.1
    assert composed_epsilon([(certain, 3)], tilt, 2e-3) == math.inf


def test_rounding_of_many_steps_is_allowed_for():
    """A million of them may move δ by a millionth."""
    nothing = LossDistribution(0.1, -1, np.array([0.0, 1 - 1e-9, 0.0]), 1e-9)
    infinite, tilt = -math.expm1(1e6 * math.log1p(-1e-9)), tilt_of(GAUSSIAN, 1e-5, 0)
    assert composed_epsilon([(nothing, 1_000_000)], tilt, infinite * (1 + 0.5e-6)) == math.inf
    assert composed_epsilon([(nothing, 1_000_000)], tilt, infinite * (1 + 2e-6)) == 0


def test_a_loss_of_nothing_costs_nothing():
    nothing = LossDistribution(0.1, -1, np.array([0.0, 1.0, 0.0]), 0.0)
    assert composed_epsilon([(nothing, 100)], tilt_of(GAUSSIAN, 1e-5, 0), 1e-5) == 0


@pytest.mark.parametrize("releases", [MIXED, HEAVY, GAUSSIAN], ids=["mixed", "heavy", "gaussian"])
@pytest.mark.parametrize("delta", [0.5, 1e-5, 1e-12])
def test_the_tilt_comes_with_a_bound_on_epsilon(releases, delta):
    """Least of all that K gives: no other λ on a fine grid gives less."""
    tilt = tilt_of(releases, delta, 0)
    sampled = [sampled_losses(s, q, tail=1e-20, removed=True) for s, q, _ in releases]

    def bound(factor):
        cumulant = sum(
            steps * np.logaddexp.reduce(shares + factor * losses)
            for (losses, shares), (_, _, steps) in zip(sampled, releases, strict=True)
        )
        rest = math.log(delta) + math.log1p(factor)
        return (cumulant - rest) / factor - math.log1p(1 / factor)

    least = min(bound(factor) for factor in np.geomspace(1e-3, 1e3, 2000))
    assert tilt.epsilon == pytest.approx(max(0.0, least), rel=1e-3, abs=1e-6)
    exact = epsilon_one_by_one(releases, 0, delta)
    assert tilt.epsilon >= exact - GRID
