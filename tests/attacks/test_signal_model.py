"""Oracles: data drawn from the very model that is fitted, so every probability must be right."""

import numpy as np
import pytest
from scipy import stats

from attacks import signal_model
from attacks.signal_model import grand_mean, log_density, log_upper_tail, mean_given, moments

WEIGHT, FREEDOM = 0.4, 9.0


def draw(rng, *, examples, references, signals):
    """Means and covariances from the conjugate prior, references and one fresh draw from them."""
    base = np.full((signals, signals), 0.6) + 0.4 * np.eye(signals)
    covariances = stats.invwishart.rvs(FREEDOM, FREEDOM * base, examples, random_state=rng)
    roots = np.linalg.cholesky(covariances.reshape(examples, signals, signals))

    def normal(*shape):
        return np.einsum("nst,...nt->...ns", roots, rng.normal(size=(*shape, examples, signals)))

    means = 3 + normal() / np.sqrt(WEIGHT)
    return means + normal(references), means + normal()


def fitted(rng, *, signals, references=4, examples=12_000):
    """Shrunk predictions, about half of the references used for each example, and fresh draws."""
    signals, fresh = draw(rng, examples=examples, references=references, signals=signals)
    own = moments(signals, rng.random((references, examples)) < 0.5)
    return own, signal_model.shrunk(own, grand_mean(own)), fresh


def is_uniform(probabilities):
    return stats.kstest(probabilities, "uniform").pvalue > 0.001


@pytest.mark.parametrize("signals", [1, 2])
class TestShrunk:
    def test_predicts_fresh_signals_with_the_right_spread(self, signals):
        """Also of examples with one reference or none."""
        own, fit, fresh = fitted(np.random.default_rng(0), signals=signals)
        deviation = (fresh - fit.location)[..., None]
        distance = (deviation * np.linalg.solve(fit.scale, deviation)).sum(axis=(1, 2))
        levels = stats.f.cdf(distance / signals, signals, fit.degrees)
        for count in range(4):
            assert is_uniform(levels[own.count == count])
        assert not is_uniform(stats.f.cdf(1.15 * distance / signals, signals, fit.degrees))

    def test_upper_tail_is_a_probability(self, signals):
        _, fit, fresh = fitted(np.random.default_rng(1), signals=signals)
        assert is_uniform(np.exp(log_upper_tail(fit, fresh)))

    def test_recovers_the_prior(self, signals):
        own, _, _ = fitted(np.random.default_rng(2), signals=signals, references=10)
        weight, freedom, _ = signal_model._estimate_prior(
            own,
            grand_mean(own),
            signal_model._pooled_covariance(own),
            np.ones(len(own.count), dtype=bool),
        )
        assert weight == pytest.approx(WEIGHT, rel=0.1)
        assert freedom == pytest.approx(FREEDOM, rel=0.2)

    def test_log_density_is_that_of_student_t(self, signals):
        _, fit, fresh = fitted(np.random.default_rng(3), signals=signals, examples=500)
        exact = [
            stats.multivariate_t.logpdf(x, loc, shape, df)
            for x, loc, shape, df in zip(fresh, fit.location, fit.scale, fit.degrees, strict=True)
        ]
        constant = -signals / 2 * np.log(2 * np.pi)
        assert log_density(fit, fresh) + constant == pytest.approx(exact, abs=1e-9)


def test_log_density_of_gaussians():
    own = moments(np.random.default_rng(4).normal(size=(9, 5, 2)), np.ones((9, 5), dtype=bool))
    fit = signal_model.per_example(own, grand_mean(own))
    exact = [
        stats.multivariate_normal.logpdf([1, 2], mean, covariance)
        for mean, covariance in zip(fit.location, fit.scale, strict=True)
    ]
    assert log_density(fit, np.array([[1.0, 2.0]])) - np.log(2 * np.pi) == pytest.approx(exact)


@pytest.mark.parametrize("nu", [1.5, 3.0, 30.0, 500.0, 8000.0])
def test_student_tail_continues_where_the_direct_one_underflows(nu):
    z = np.array([-5.0, 0.0, 1.0, 8.0, 20.0, 36.0])
    tail = signal_model._log_student_tail(z, np.full(6, nu))
    assert tail == pytest.approx(stats.t.logsf(z, nu), rel=1e-9)
    far = np.geomspace(1.0, 1e6, 200)
    tail = signal_model._log_student_tail(far, np.full(200, nu))
    assert np.isfinite(tail).all()
    # The slope is minus the hazard, which grows towards that of a power law: z f(z)/sf(z) -> nu.
    assert (np.diff(tail) < 0).all()
    assert (tail[-1] - tail[-2]) / np.log(far[-1] / far[-2]) == pytest.approx(-nu, rel=1e-3)


class TestPriorMean:
    def test_is_the_regression_on_the_other_side(self):
        rng = np.random.default_rng(5)
        own = moments(rng.normal(size=(3, 50, 1)), np.ones((3, 50), dtype=bool))
        other = moments(own.mean * 2 + rng.normal(size=(3, 50, 1)), np.ones((3, 50), dtype=bool))
        line = np.polyfit(other.mean[:, 0], own.mean[:, 0], 1)
        expected = np.polyval(line, other.mean[:, 0])
        assert mean_given(own, other=other)[:, 0] == pytest.approx(expected)

    def test_is_unknown_without_the_other_side(self):
        rng = np.random.default_rng(6)
        mask = np.ones((3, 50), dtype=bool)
        mask[:, 7] = False
        own = moments(rng.normal(size=(3, 50, 1)), np.ones((3, 50), dtype=bool))
        other = moments(rng.normal(size=(3, 50, 1)), mask)
        assert np.flatnonzero(np.isnan(mean_given(own, other=other)[:, 0])).tolist() == [7]

    def test_is_the_grand_mean_of_few_examples(self):
        own = moments(np.arange(6.0).reshape(2, 3, 1), np.ones((2, 3), dtype=bool))
        assert mean_given(own, other=own).ravel().tolist() == [2.5, 2.5, 2.5]

    def test_unknown_leaves_the_own_mean_alone(self):
        rng = np.random.default_rng(7)
        own = moments(rng.normal(size=(4, 30, 1)), np.ones((4, 30), dtype=bool))
        prior_mean = np.full((30, 1), 50.0)
        prior_mean[:10] = np.nan
        fit = signal_model.shrunk(own, prior_mean)
        assert fit.location[:10] == pytest.approx(own.mean[:10])
        assert (fit.location[10:] > own.mean[10:]).all()
