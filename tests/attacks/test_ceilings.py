"""Oracles: the definition of δ(ε; μ), numeric integration, and simulated optimal attacks."""

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from attacks import ceilings, metrics

# ε: μ, then AUC, TPR at 1 % and at 0.1 % for the Gaussian mechanism, then the same for any
# mechanism; δ = 1e-5, as printed with three digits.
TABLE = {
    0.5: (0.142, 0.540, 0.014, 0.0016, 0.622, 0.016, 0.0017),
    1: (0.268, 0.575, 0.020, 0.0024, 0.731, 0.027, 0.0027),
    2: (0.502, 0.639, 0.034, 0.0048, 0.881, 0.074, 0.0074),
    4: (0.925, 0.743, 0.081, 0.015, 0.982, 0.546, 0.055),
    8: (1.666, 0.881, 0.255, 0.077, 1.0, 1.0, 1.0),
    16: (2.905, 0.980, 0.719, 0.427, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize(("epsilon", "row"), TABLE.items())
def test_table_of_ceilings(epsilon, row):
    values = [
        ceilings.gaussian_mu(epsilon, 1e-5),
        ceilings.gaussian_ceiling_auc(epsilon, 1e-5),
        ceilings.gaussian_ceiling_tpr(epsilon, 1e-5, fpr=0.01),
        ceilings.gaussian_ceiling_tpr(epsilon, 1e-5, fpr=0.001),
        ceilings.approximate_dp_ceiling_auc(epsilon, 1e-5),
        ceilings.approximate_dp_ceiling_tpr(epsilon, 1e-5, fpr=0.01),
        ceilings.approximate_dp_ceiling_tpr(epsilon, 1e-5, fpr=0.001),
    ]
    assert values == pytest.approx(row, rel=0.02, abs=0.0006)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
def test_mu_solves_the_definition(epsilon, delta):
    mu = ceilings.gaussian_mu(epsilon, delta)
    attained = special.ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * special.ndtr(
        -mu / 2 - epsilon / mu
    )
    assert attained == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize("epsilon", [1e-6, 0.1, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("delta", [1e-100, 1e-12, 1e-5, 0.9])
def test_mu_and_epsilon_are_inverse_even_at_extremes(epsilon, delta):
    mu = ceilings.gaussian_mu(epsilon, delta)
    assert ceilings.gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-6, abs=1e-9)


def test_epsilon_of_a_harmless_mechanism_is_zero():
    assert ceilings.gaussian_epsilon(0, 1e-5) == 0
    assert ceilings.gaussian_epsilon(1e-6, 1e-5) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0, 30.0])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.2])
def test_auc_is_the_area_under_the_tpr(epsilon, delta):
    def ceiling(fpr):
        return ceilings.approximate_dp_ceiling_tpr(epsilon, delta, fpr=fpr)

    corner = (1 - delta) / (1 + math.exp(epsilon))
    area, _ = integrate.quad(ceiling, 0, 1, points=[corner, 1 - delta])
    assert ceilings.approximate_dp_ceiling_auc(epsilon, delta) == pytest.approx(area, abs=1e-6)


def test_randomised_response_reaches_the_ceiling():
    """It tells the truth with odds e^ε, the worst that (ε, 0)-privacy allows."""
    rng = np.random.default_rng(0)
    is_member = rng.random(200_000) < 0.5
    scores = is_member == (rng.random(200_000) < special.expit(1.0))
    # Its ROC has one corner, from where the ceiling is a straight line on either side.
    corner = ceilings.approximate_dp_ceiling_tpr(1.0, 0.0, fpr=special.expit(-1.0))
    assert np.mean(scores[is_member]) == pytest.approx(corner, abs=0.005)
    assert metrics.auc(scores, is_member) == pytest.approx(
        ceilings.approximate_dp_ceiling_auc(1.0, 0.0), abs=0.005
    )


def test_gaussian_mechanism_reaches_the_gaussian_ceiling():
    rng = np.random.default_rng(1)
    is_member = rng.random(200_000) < 0.5
    scores = rng.normal(size=is_member.size) + ceilings.gaussian_mu(4, 1e-5) * is_member
    assert metrics.auc(scores, is_member) == pytest.approx(
        ceilings.gaussian_ceiling_auc(4, 1e-5), abs=0.005
    )
    assert metrics.tpr_at_fpr(scores, is_member, fpr=0.01) == pytest.approx(
        ceilings.gaussian_ceiling_tpr(4, 1e-5, fpr=0.01), abs=0.01
    )


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 8.0, np.inf])
def test_gaussian_is_below_the_approximate_ceiling(epsilon):
    for fpr in np.linspace(0.001, 0.999, 50):
        gaussian = ceilings.gaussian_ceiling_tpr(epsilon, 1e-3, fpr=fpr)
        assert gaussian <= ceilings.approximate_dp_ceiling_tpr(epsilon, 1e-3, fpr=fpr) + 1e-9
    assert ceilings.gaussian_ceiling_auc(epsilon, 1e-3) <= ceilings.approximate_dp_ceiling_auc(
        epsilon, 1e-3
    )


def test_no_guarantee_has_the_ceiling_one():
    assert ceilings.approximate_dp_ceiling_auc(np.inf, 1e-5) == 1
    assert ceilings.approximate_dp_ceiling_tpr(np.inf, 1e-5, fpr=0.01) == 1
    assert ceilings.gaussian_ceiling_auc(np.inf, 1e-5) == 1
    assert ceilings.approximate_dp_ceiling_tpr(0.0, 0.0, fpr=0.01) == pytest.approx(0.01)


def test_mu_matches_a_normal_mean_shift():
    """δ(ε; μ) is the largest excess of P(set) over e^ε Q(set), here by integration."""
    epsilon, mu = 1.3, ceilings.gaussian_mu(1.3, 0.01)
    grid = np.linspace(-10, 10, 200_001)
    excess = stats.norm.pdf(grid, mu) - math.exp(epsilon) * stats.norm.pdf(grid)
    assert integrate.trapezoid(np.maximum(excess, 0), grid) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ceilings.gaussian_mu(1, 0), "`delta`"),
        (lambda: ceilings.gaussian_mu(-1, 1e-5), "`epsilon` >= 0, got -1"),
        (lambda: ceilings.gaussian_mu(np.nan, 1e-5), "`epsilon`"),
        (lambda: ceilings.gaussian_epsilon(-1, 1e-5), "`mu`"),
        (lambda: ceilings.approximate_dp_ceiling_auc(1, 1), "`delta`"),
        (lambda: ceilings.approximate_dp_ceiling_tpr(1, 0, fpr=1), "`fpr`"),
        (lambda: ceilings.gaussian_ceiling_tpr(1, 0.1, fpr=0), "`fpr`"),
    ],
)
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
