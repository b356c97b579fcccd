"""What tuning costs, beside mechanisms whose best of several can be computed exactly."""

import math

import numpy as np
import pytest
from scipy import stats

from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.events import SampledGaussian
from dpnlu.accounting.tuning import (
    NUMBERS,
    calibrate_tuning,
    cheapest_tuning,
    draw_trials,
    halting_probability,
    tuning_epsilon,
)

DELTA = 1e-5
RANDOM = [name for name in NUMBERS if name != "fixed"]


def _gaussian(noise_multiplier: float, steps: int = 1) -> list[SampledGaussian]:
    return [SampledGaussian(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=steps)]


def _slope_of_best(number: str, trials: float, below: np.ndarray) -> np.ndarray:
    """The derivative of E[F^K] in F, the probability that one training scores less."""
    if number == "poisson":
        return trials * np.exp(trials * (below - 1))
    rest = 1 - (1 / trials if number == "geometric" else halting_probability(trials))
    if number == "geometric":
        return (1 - rest) / (1 - rest * below) ** 2
    return rest / (1 - rest * below) / -math.log1p(-rest)


def _exact_delta(number: str, trials: float, noise: float, at: float) -> float:
    """δ at this ε of the best of several releases of a number with noise, itself the score; one
    neighbour has it at 0, the other at 1."""
    score = np.linspace(-12 * noise, 12 * noise + 1, 100_001)

    def density(mean: float) -> np.ndarray:
        law = stats.norm(mean, noise)
        return law.pdf(score) * _slope_of_best(number, trials, law.cdf(score))

    ways = [(density(1.0), density(0.0)), (density(0.0), density(1.0))]
    step = score[1] - score[0]
    return max(float(np.maximum(p - math.exp(at) * q, 0).sum() * step) for p, q in ways)


@pytest.mark.parametrize("number", RANDOM)
@pytest.mark.parametrize("trials", [1.5, 30])
@pytest.mark.parametrize("noise", [0.7, 2.0])
def test_the_exact_delta_of_the_best_is_below_the_stated(
    number: str, trials: float, noise: float
) -> None:
    stated = tuning_epsilon(_gaussian(noise), trials=trials, number=number, delta=DELTA)
    assert _exact_delta(number, trials, noise, stated) <= DELTA
    # Many trainings give more away than the ε of one would say: the oracle sees it.
    alone = epsilon(_gaussian(noise), delta=DELTA)
    assert trials < 4 or _exact_delta(number, trials, noise, alone) > DELTA


@pytest.mark.parametrize(("number", "shape"), [("geometric", 1.0), ("logarithmic", 0.0)])
def test_it_is_the_formula_of_the_paper(number: str, shape: float) -> None:
    """Papernot and Steinke (2022), theorem 2, for Gaussians, whose Rényi divergence is
    λ / (2 σ²)."""
    noise, trials = 3.0, 20
    gamma = 1 / trials if number == "geometric" else halting_probability(trials)
    orders = np.linspace(1.01, 400, 200_001)
    divergence = orders / (2 * noise**2)
    constant = (1 + shape) * np.min((1 - 1 / orders) * divergence - math.log(gamma) / orders)
    best = divergence + constant + math.log(trials) / (orders - 1)
    conversion = np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)
    exact = float(np.min(best + conversion))
    stated = tuning_epsilon(_gaussian(noise), trials=trials, number=number, delta=DELTA)
    assert exact <= stated * (1 + 1e-6) and stated <= exact * 1.03


def test_a_fixed_number_is_composition() -> None:
    five = tuning_epsilon(_gaussian(2.0, 3), trials=5, number="fixed", delta=DELTA)
    assert five == epsilon(_gaussian(2.0, 15), delta=DELTA)
    one = tuning_epsilon(_gaussian(2.0), trials=1, number="fixed", delta=DELTA)
    assert one == epsilon(_gaussian(2.0), delta=DELTA)


def test_the_cheapest_way_depends_on_how_many() -> None:
    few = cheapest_tuning(_gaussian(1.0, 3), trials=1, delta=DELTA)
    many = cheapest_tuning(_gaussian(1.0, 3), trials=50, delta=DELTA)
    assert few[0].number == "fixed" and many[-1].number == "fixed"
    assert [way.epsilon for way in many] == sorted(way.epsilon for way in many)
    uneven = cheapest_tuning(_gaussian(1.0), trials=2.5, delta=DELTA)
    assert {way.number for way in uneven} == set(RANDOM)


@pytest.mark.parametrize("number", NUMBERS)
def test_calibration_meets_the_target_closely(number: str) -> None:
    sigma = calibrate_tuning(_gaussian, trials=10, number=number, target_epsilon=3.0, delta=DELTA)
    reached = [
        tuning_epsilon(_gaussian(s), trials=10, number=number, delta=DELTA)
        for s in (sigma, sigma / 1.002)
    ]
    assert reached[0] <= 3.0 < reached[1]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("trials", [1, 3, 40])
def test_numbers_are_drawn_with_the_mean_that_is_stated(number: str, trials: int) -> None:
    rng = np.random.default_rng(3)
    drawn = np.array([draw_trials(number, trials, rng) for _ in range(1000)])
    error = drawn.std() / math.sqrt(len(drawn)) + 1e-9
    assert abs(drawn.mean() - trials) < 4 * error
    assert number == "poisson" or drawn.min() >= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": 0.5}, "number of trials >= 1"),
        ({"trials": math.inf}, "number of trials >= 1"),
        ({"trials": math.nan, "number": "fixed"}, "number of trials >= 1"),
        ({"trials": 1e300, "number": "fixed"}, "a million at most"),
        ({"trials": 2.5, "number": "fixed"}, "whole if it is fixed"),
        ({"number": "uniform"}, "one of fixed, poisson"),
        ({"delta": 0.0}, "delta"),
    ],
)
def test_bad_input_is_refused(changes: dict, said: str) -> None:
    right = {"trials": 2, "number": "poisson", "delta": DELTA}
    with pytest.raises(ValueError, match=said):
        tuning_epsilon(_gaussian(1.0), **(right | changes))


@pytest.mark.parametrize("trials", [math.inf, math.nan, 1e300, 0])
def test_no_way_is_the_cheapest_for_no_number_of_trials(trials: float) -> None:
    with pytest.raises(ValueError, match="number of trials >= 1"):
        cheapest_tuning(_gaussian(1.0), trials=trials, delta=DELTA)


def test_a_million_trainings_are_counted_and_not_listed() -> None:
    found = tuning_epsilon(_gaussian(300.0, 10), trials=10**6, number="fixed", delta=DELTA)
    assert found == epsilon(_gaussian(300.0, 10**7), delta=DELTA)


def test_truncated_batches_have_no_random_number_of_trials() -> None:
    event = SampledGaussian(
        noise_multiplier=1.0, sample_rate=0.1, steps=2, max_batch_size=30, num_examples=100
    )
    with pytest.raises(ValueError, match="not truncated"):
        tuning_epsilon([event], trials=2, number="poisson", delta=1e-3)


def test_without_noise_or_releases_the_answer_is_clear() -> None:
    assert tuning_epsilon([], trials=9, number="poisson", delta=DELTA) == 0
    assert tuning_epsilon(_gaussian(0.0), trials=9, number="poisson", delta=DELTA) == math.inf
