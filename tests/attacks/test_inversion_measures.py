"""Oracles: normal distributions in closed form, simulated secrets, counting by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from attacks.inversion.measures import (
    _log_skew_normal_cdf,
    estimated_exposure,
    guessing_curve,
    position_matches,
)


class TestPositions:
    def test_by_hand(self) -> None:
        found = position_matches([[1, 2], [1, 0], [3, 0]], [[1, 2], [2, 0], [0, 0]])
        assert [position.match for position in found] == pytest.approx([1 / 3, 1])
        assert found[1].interval[0] == pytest.approx(0.025 ** (1 / 3))
        assert found[0].chance == 0.1

    def test_each_position_has_its_own_chance(self) -> None:
        rng = np.random.default_rng(0)
        guesses, secrets = rng.integers((2, 5), size=(2, 50_000, 2))
        for position in position_matches(guesses, secrets, candidates=(2, 5)):
            assert position.match == pytest.approx(position.chance, abs=0.01)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="of one shape"):
            position_matches([[1, 2]], [[1, 2], [3, 4]])


class TestEstimatedExposure:
    @pytest.mark.parametrize("z", [-2.0, -4.0, -8.0, -20.0])
    def test_of_normal_losses_is_the_closed_form(self, z: float) -> None:
        """Quantiles in place of a sample: the fit is then that of the distribution itself."""
        references = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
        found = estimated_exposure(z, references, candidates=10**300)
        expected = -stats.norm.logcdf(z) / math.log(2)
        assert found.bits == pytest.approx(expected, rel=0.03)
        assert found.fit_p_value > 0.99
        assert found.sampled_bits == pytest.approx(min(expected, math.log2(10_001)), rel=0.01)

    def test_is_never_more_than_there_is(self) -> None:
        references = np.random.default_rng(0).normal(size=500)
        found = estimated_exposure(-50.0, references, candidates=1000)
        assert found.bits == found.available_bits == pytest.approx(math.log2(1000))
        assert found.sampled_bits <= math.log2(501)

    def test_agrees_with_the_exact_exposure_of_a_secret_within(self) -> None:
        rng = np.random.default_rng(1)
        everything = stats.skewnorm.rvs(3, size=100_000, random_state=rng)
        true = float(np.sort(everything)[99])
        sample = rng.choice(everything, size=5000)
        found = estimated_exposure(true, sample, candidates=100_000)
        assert found.bits == pytest.approx(math.log2(100_000 / 100), abs=1.5)

    def test_a_bad_fit_is_seen(self) -> None:
        rng = np.random.default_rng(2)
        two = np.concatenate((rng.normal(size=500), rng.normal(9, 1, size=500)))
        assert estimated_exposure(0.0, two, candidates=10**6).fit_p_value < 1e-3

    @pytest.mark.parametrize(
        ("loss", "references", "message"),
        [
            (0.0, np.zeros(500), "different reference losses, got 1 among 500"),
            (0.0, np.arange(50.0), "at least 100 different"),
            (np.inf, np.arange(500.0), "losses below 1e.100"),
            (np.nan, np.arange(500.0), "without NaN"),
        ],
    )
    def test_bad_input(self, loss: float, references: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            estimated_exposure(loss, references, candidates=10)


class TestTail:
    @pytest.mark.parametrize("value", [-1.0, -6.0, -10.0, -40.0, -1000.0])
    def test_without_skew_is_that_of_the_normal(self, value: float) -> None:
        assert _log_skew_normal_cdf(value, shape=0.0) == pytest.approx(
            stats.norm.logcdf(value), rel=1e-6
        )

    @pytest.mark.parametrize("shape", [-5.0, -1.0, 1.0, 5.0])
    @pytest.mark.parametrize("value", [-3.0, -7.0, -9.0])
    def test_with_skew_is_the_integral(self, value: float, shape: float) -> None:
        """Against a fine sum in logarithms."""
        grid = np.linspace(value - 12, value, 400_001)
        density = np.log(2) + stats.norm.logpdf(grid) + stats.norm.logcdf(shape * grid)
        top = density.max()
        expected = top + math.log(np.trapezoid(np.exp(density - top), grid))
        assert _log_skew_normal_cdf(value, shape=shape) == pytest.approx(expected, rel=1e-4)


class TestGuesses:
    def test_by_hand(self) -> None:
        curve = guessing_curve([1, 1, 2.5, 40], candidates=100)
        assert curve.guesses.tolist() == [1, 3, 40, 100]
        assert curve.found.tolist() == [0.5, 0.75, 1, 1]
        assert curve.chance.tolist() == [0.01, 0.03, 0.4, 1]
        assert (curve.low <= curve.found).all() and (curve.found <= curve.high).all()

    def test_a_model_that_knows_nothing_is_at_chance(self) -> None:
        ranks = np.random.default_rng(0).integers(1, 1001, size=5000)
        curve = guessing_curve(ranks, candidates=1000)
        assert np.abs(curve.found - curve.chance).max() < 0.03

    @pytest.mark.parametrize("ranks", [[], [0.5], [11]])
    def test_ranks_out_of_range(self, ranks: list[float]) -> None:
        with pytest.raises(ValueError, match=r"ranks in \[1, 10\]"):
            guessing_curve(ranks, candidates=10)
