"""Distributions of one release's privacy loss, against closed forms and dp-accounting."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import special

from dpnlu.accounting.loss_distribution import loss_distributions, sampled_losses

# Noise multiplier, sample rate, grid.
SETTINGS = [
    (0.3, 1.0, 1e-2),
    (0.56, 2.56e-5, 6e-5),
    (0.86, 0.04, 1e-3),
    (2.0, 0.5, 1e-3),
    (30.0, 1.0, 1e-3),
    (1000.0, 0.5, 1e-5),
    (0.05, 0.01, 0.05),
]
TAIL = 1e-22


def exact_delta(epsilon, sigma, rate, *, removed):
    """The hockey-stick divergence of the sampled Gaussian mechanism.

    With w the likelihood ratio B / A where the loss is ε, it is q (P_B - w P_A) of the outcomes
    beyond if the example is removed, and e^ε q (w P_A - P_B) of those below if it is added.
    """
    sign = 1 if removed else -1
    share = rate * math.exp(-sign * epsilon) - math.expm1(-sign * epsilon)  # q w e^(-±ε)
    if share <= 0:
        return -math.expm1(epsilon) if removed else 0.0
    log_ratio = sign * epsilon + math.log(share / rate)
    outcome = sigma**2 * log_ratio + 0.5
    own, other = sign * (1 - outcome) / sigma, sign * -outcome / sigma
    difference = special.ndtr(own) - math.exp(log_ratio + special.log_ndtr(other))
    return rate * difference if removed else -math.exp(epsilon) * rate * difference


def delta_of(distribution, epsilon):
    shares = -np.expm1(np.minimum(epsilon - distribution.losses, 0.0))
    return distribution.infinite + math.fsum(distribution.masses * shares)


@pytest.mark.parametrize(("sigma", "rate", "grid"), SETTINGS)
def test_both_distributions_are_probabilities(sigma, rate, grid):
    """What is moved to the grid keeps its probability under both data sets: the masses add up to 1,
    and so do those of the other data set, e^-loss times as much."""
    for found in loss_distributions(sigma, rate, grid=grid, tail=TAIL):
        assert np.all(found.masses >= 0)
        assert math.fsum(found.masses) + found.infinite == pytest.approx(1, abs=1e-13)
        with np.errstate(divide="ignore"):
            other = np.exp(np.log(found.masses) - found.losses)
        assert math.fsum(other) == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize(("sigma", "rate", "grid"), SETTINGS)
def test_delta_is_exact_on_the_grid_and_never_too_small_between(sigma, rate, grid):
    for removed, found in zip(
        (True, False), loss_distributions(sigma, rate, grid=grid, tail=TAIL), strict=True
    ):
        for quantile in (0.01, 0.3, 0.6, 0.9, 0.99, 0.999, 1 - 1e-6):
            place = int(np.searchsorted(np.cumsum(found.masses), quantile))
            at = float(found.losses[place])
            exact = exact_delta(at, sigma, rate, removed=removed)
            assert delta_of(found, at) == pytest.approx(exact, rel=1e-9, abs=1e-20)
            between = at + 0.4 * grid
            least = exact_delta(between, sigma, rate, removed=removed)
            assert delta_of(found, between) >= least * (1 - 1e-9) - 1e-20


@pytest.mark.parametrize(("sigma", "rate"), [(0.86, 0.04), (2.0, 0.5), (1.0, 1.0)])
def test_it_is_the_distribution_of_dp_accounting(sigma, rate):
    grid = 1e-2
    expected_pair = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=grid, sampling_prob=rate
    )
    pair = (expected_pair._pmf_remove, expected_pair._pmf_add)
    for found, expected in zip(
        loss_distributions(sigma, rate, grid=grid, tail=TAIL), pair, strict=True
    ):
        dense = expected.to_dense_pmf()
        theirs = dict(enumerate(dense._probs, dense._lower_loss))
        ours = dict(enumerate(found.masses, found.first))
        for place in theirs.keys() | ours.keys():
            assert ours.get(place, 0) == pytest.approx(theirs.get(place, 0), abs=1e-12)


def test_unlikely_great_losses_count_as_unbounded():
    """Cut where a share of 1e-3 lies beyond, not at the -22nd power of ten."""
    found, added = loss_distributions(1.0, 0.2, grid=1e-3, tail=1e-3)
    assert 0.2 * 0.9e-3 < found.infinite < 1.1e-3
    for one in (found, added):
        assert math.fsum(one.masses) + one.infinite == pytest.approx(1, abs=1e-13)
    last = float(found.losses[-1])
    assert delta_of(found, last) >= exact_delta(last, 1.0, 0.2, removed=True)


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.01), (2.0, 0.3), (5.0, 1.0)])
@pytest.mark.parametrize("order", [2, 3, 6])
def test_integrating_sampled_losses_gives_the_moments(sigma, rate, order):
    """E under A of (M / A)^n = Σ C(n, k) (1 - q)^(n - k) q^k e^((k² - k) / 2σ²) (Mironov, Talwar,
    Zhang 2019, equation 4): the moment n - 1 of e^loss if an example is removed."""
    exact = math.fsum(
        math.comb(order, k)
        * (1 - rate) ** (order - k)
        * rate**k
        * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    )
    losses, log_shares = sampled_losses(sigma, rate, tail=1e-15, removed=True)
    assert np.exp(log_shares + (order - 1) * losses).sum() == pytest.approx(exact, rel=1e-6)
    losses, log_shares = sampled_losses(sigma, rate, tail=1e-15, removed=False)
    assert np.exp(log_shares - order * losses).sum() == pytest.approx(exact, rel=1e-6)
