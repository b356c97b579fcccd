"""ε against closed forms, and against three other accountants."""

import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from dpnlu.accounting import calibration
from dpnlu.accounting.accountants import (
    ACCOUNTANTS,
    epsilon,
)
from dpnlu.accounting.calibration import calibrate_noise_multiplier
from dpnlu.accounting.events import (
    SMALLEST_DELTA,
    SampledGaussian,
)


def gaussian(noise_multiplier, sample_rate=1.0, steps=1, **truncation):
    return SampledGaussian(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps, **truncation
    )


def exact_gaussian_epsilon(mu, delta):
    """ε of the Gaussian mechanism, sensitivity / std = mu (Balle and Wang 2018, theorem 8)."""

    def excess(eps):
        tail = math.exp(eps + stats.norm.logcdf(-eps / mu - mu / 2))
        return stats.norm.cdf(-eps / mu + mu / 2) - tail - delta

    return optimize.brentq(excess, 0, 500)


@dataclass(frozen=True)
class Setting:
    """Noise multiplier, sample rate, steps."""

    sigma: float
    rate: float
    steps: int


GRID = [
    Setting(0.6, 0.01, 100),
    Setting(0.8, 0.1, 20),
    Setting(1.0, 0.005, 2000),
    Setting(1.0, 0.001, 20_000),  # many small losses ask for a fine grid
    Setting(2.0, 0.05, 400),
    Setting(5.0, 0.5, 30),
]
DELTA = 1e-5


@pytest.mark.parametrize("delta", [DELTA, SMALLEST_DELTA])
@pytest.mark.parametrize(
    ("sigma", "steps"), [(0.5, 1), (1.0, 1), (4.0, 1), (4.0, 25), (30, 900), (10, 1000)]
)
def test_without_sampling_epsilon_is_that_of_one_gaussian(sigma, steps, delta):
    exact = exact_gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    found = epsilon([gaussian(sigma, steps=steps)], delta=delta)
    assert exact - 1e-6 <= found <= 1.001 * exact + 1e-4


@pytest.mark.parametrize("setting", GRID, ids=str)
def test_four_accountants_agree(setting):
    """PLD is the tight one, dp-accounting's the same on the same grid: PRV within its stated error
    of 0.01, RDP above, and not by much."""
    events = [gaussian(setting.sigma, setting.rate, setting.steps)]
    pld = epsilon(events, delta=DELTA)
    assert pld == pytest.approx(epsilon(events, delta=DELTA, accountant="dp-accounting"), rel=1e-6)
    assert pld == pytest.approx(epsilon(events, delta=DELTA, accountant="prv"), rel=0.01, abs=0.02)
    rdp = epsilon(events, delta=DELTA, accountant="rdp")
    assert pld <= rdp <= 1.6 * pld + 0.1


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_every_accountant_adds_up_different_events(accountant):
    """A decaying σ costs what its parts cost together, not what the first or mean σ would."""
    events = [gaussian(sigma, 0.02, 50) for sigma in (1.2, 1.0, 0.8)]
    total = epsilon(events, delta=DELTA, accountant=accountant)
    least = epsilon([gaussian(1.0, 0.02, 150)], delta=DELTA, accountant=accountant)
    most = epsilon([gaussian(0.8, 0.02, 150)], delta=DELTA, accountant=accountant)
    assert least < total < most


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_nothing_released_costs_nothing_and_no_noise_costs_everything(accountant):
    assert epsilon([], delta=DELTA, accountant=accountant) == 0
    assert epsilon([gaussian(0.0, steps=0)], delta=DELTA, accountant=accountant) == 0
    noisy = gaussian(5.0, 0.1, 10)
    for none in (0.0, 1e-3, 1e-300):
        assert epsilon([noisy, gaussian(none)], delta=DELTA, accountant=accountant) == math.inf


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_never_negative(accountant):
    assert 0 <= epsilon([gaussian(50.0, 1e-3, 1)], delta=0.5, accountant=accountant) < 1e-3


def test_an_accountant_that_falls_below_zero_by_rounding_is_corrected(monkeypatch):
    monkeypatch.setitem(ACCOUNTANTS, "pld", lambda events, delta: -1e-9)
    assert epsilon([gaussian(1.0)], delta=DELTA) == 0


def test_order_and_grouping_of_events_do_not_matter():
    one, other = gaussian(1.0, 0.01, 30), gaussian(0.7, 0.01, 10)
    together = epsilon([one, other], delta=DELTA)
    assert epsilon([other, one], delta=DELTA) == pytest.approx(together, rel=1e-6)
    singly = [replace(one, steps=1)] * 30 + [replace(other, steps=5)] * 2
    assert epsilon(singly, delta=DELTA) == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize(
    "costlier",
    [
        gaussian(0.9, 0.02, 100),
        gaussian(1.0, 0.03, 100),
        gaussian(1.0, 0.02, 150),
    ],
    ids=["less noise", "more of the data", "more steps"],
)
def test_epsilon_rises_with_what_is_given_away(costlier):
    base = epsilon([gaussian(1.0, 0.02, 100)], delta=DELTA)
    assert epsilon([costlier], delta=DELTA) > 1.05 * base
    assert epsilon([gaussian(1.0, 0.02, 100)], delta=DELTA / 10) > 1.05 * base


@pytest.mark.parametrize("cap", [60, 80, 200])
def test_truncated_batches_cost_at_least_what_poisson_batches_cost(cap):
    poisson = gaussian(1.0, 0.05, 100)
    truncated = replace(poisson, max_batch_size=cap, num_examples=1000)
    assert epsilon([truncated], delta=DELTA) >= epsilon([poisson], delta=DELTA) - 1e-4


def test_a_bound_that_is_never_reached_costs_nothing():
    poisson = gaussian(1.0, 0.05, 100)
    truncated = replace(poisson, max_batch_size=500, num_examples=1000)
    assert epsilon([truncated], delta=DELTA) == pytest.approx(
        epsilon([poisson], delta=DELTA), rel=1e-3
    )


def sums_of_truncated_batches(event, *, own, other):
    """{sum: probability}, one example having the gradient `own` (None: never drawn), all others
    `other`."""
    found = Counter()
    for drawn in range(event.num_examples):
        share = stats.binom.pmf(drawn, event.num_examples - 1, event.sample_rate)
        without, cap = other * min(drawn, event.max_batch_size), event.max_batch_size
        rate = 0 if own is None else event.sample_rate * min(1, cap / (drawn + 1))
        found[without] += share * (1 - rate)
        if own is not None:
            found[own + other * min(drawn, cap - 1)] += share * rate
    return found


@pytest.mark.parametrize("other", [-1, 0, 1])
@pytest.mark.parametrize(("rate", "cap", "sigma"), [(0.5, 8, 1.0), (1.0, 5, 2.0), (0.2, 1, 1.0)])
def test_epsilon_bounds_what_truncated_batches_give_away(rate, cap, sigma, other):
    """The exact hockey-stick divergence where all others pull one way, and one the other way or not
    at all: at the ε found it is at most δ."""
    event = gaussian(sigma, rate, max_batch_size=cap, num_examples=20)
    grid = np.linspace(-50, 50, 20_001)
    densities = [
        sum(p * stats.norm.pdf(grid, at, sigma) for at, p in sums.items())
        for sums in (sums_of_truncated_batches(event, own=own, other=other) for own in (1, 0, None))
    ]
    for delta in (1e-2, 1e-4):
        factor = math.exp(epsilon([event], delta=delta))
        for one, neighbour in permutations(densities, 2):
            if one is densities[0] or neighbour is densities[0]:
                assert integrate.trapezoid(np.maximum(one - factor * neighbour, 0), grid) <= delta


def test_only_pld_accountants_take_truncated_batches():
    truncated = gaussian(1.0, 0.05, 1, max_batch_size=60, num_examples=1000)
    for accountant in ("prv", "rdp"):
        with pytest.raises(ValueError, match="use 'pld'"):
            epsilon([truncated], delta=DELTA, accountant=accountant)
    theirs = epsilon([truncated], delta=DELTA, accountant="dp-accounting")
    assert epsilon([truncated], delta=DELTA) == theirs > 0


def test_dp_accounting_is_not_asked_what_it_has_no_digits_for():
    """After a million steps its rounding is larger than a δ of 1e-11: its ε came out 5 % too
    small."""
    events = [gaussian(0.8, 1e-4, 1_000_000)]
    with pytest.raises(ValueError, match="at least 1e-07 for so many steps"):
        epsilon(events, delta=1e-11, accountant="dp-accounting")
    truncated = replace(events[0], max_batch_size=60, num_examples=1000)
    with pytest.raises(ValueError, match="untruncated batches"):
        epsilon([truncated], delta=1e-11)


@pytest.mark.parametrize(
    "values",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": "1"},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"sample_rate": math.nan},
        {"steps": -1},
        {"steps": 1.5},
        {"max_batch_size": 60},
        {"num_examples": 1000},
        {"max_batch_size": 0, "num_examples": 1000},
        {"max_batch_size": 60, "num_examples": 1000.0},
    ],
    ids=str,
)
def test_what_is_no_release_cannot_be_described(values):
    with pytest.raises(ValueError, match="Expected a release"):
        replace(gaussian(1.0, 0.05, 1), **values)


def test_an_unknown_accountant_is_refused():
    with pytest.raises(ValueError, match=r"one of \['dp-accounting', 'pld', 'prv', 'rdp'\], got"):
        epsilon([], delta=DELTA, accountant="moments")


@pytest.mark.parametrize("delta", [0.0, 1.0, 2.0, -1e-5, math.nan, 1e-13])
def test_a_delta_that_is_no_probability_is_refused(delta):
    """At δ >= 1 everything is private: ε = 0 must not be reported by mistake. At a tiny δ some
    accountants find less than the true ε: for σ = 10, 1000 steps, q = 1 less by 0.005 at 1e-13."""
    with pytest.raises(ValueError, match=r"`delta` in \[1e-12, 1\)"):
        epsilon([gaussian(1.0, 0.1, 1)], delta=delta)
    with pytest.raises(ValueError, match="delta"):
        calibrate_noise_multiplier(
            lambda sigma: [gaussian(sigma, 0.1, 1)], target_epsilon=1.0, delta=delta
        )


@pytest.mark.parametrize("disabled", [False, True])
def test_accounting_leaves_the_loggers_alone(monkeypatch, disabled):
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "disabled", disabled)
    epsilon([gaussian(1.3 + disabled, 0.01, 7)], delta=DELTA, accountant="rdp")
    assert logger.disabled is disabled


@settings(max_examples=6)
@given(
    target=st.floats(0.2, 10),
    rate=st.floats(0.01, 0.5),
    steps=st.integers(1, 100),
    delta=st.sampled_from([1e-4, 1e-6]),
)
def test_calibration_meets_the_target_and_hardly_overshoots(target, rate, steps, delta):
    """The ε of the returned σ does not exceed `target_epsilon`, and is within 0.2 % of it."""
    sigma = calibrate_noise_multiplier(
        lambda sigma: [gaussian(sigma, rate, steps)], target_epsilon=target, delta=delta
    )
    assert 0.998 * target <= epsilon([gaussian(sigma, rate, steps)], delta=delta) <= target


def test_calibration_takes_the_safe_side_of_a_decaying_schedule():
    def events(sigma):
        return [gaussian(sigma * 0.8**epoch, 0.02, 50) for epoch in range(4)]

    sigma = calibrate_noise_multiplier(events, target_epsilon=3.0, delta=DELTA)
    assert 0.998 * 3.0 <= epsilon(events(sigma), delta=DELTA) <= 3.0


def test_calibration_goes_on_where_the_slope_leads_nowhere(monkeypatch):
    """Newton steps along a line are a short cut: without an answer of theirs, σ is bracketed."""

    def events(sigma):
        return [gaussian(sigma, 0.05, 40)]

    for size in (1e-9, 1.0):  # a line too flat to follow, and one too steep
        line = calibration._Line(low=1.0, low_excess=size, high=2.0, high_excess=-size)
        assert calibration._newton(lambda sigma: 0.1 * (5 - sigma), line, tolerance=1e-3) is None
    monkeypatch.setattr(calibration, "_newton", lambda *_, **__: None)
    sigma = calibrate_noise_multiplier(events, target_epsilon=2.0, delta=DELTA)
    assert 0.998 * 2.0 <= epsilon(events(sigma), delta=DELTA) <= 2.0


def test_an_unreachable_target_is_refused():
    with pytest.raises(ValueError, match="raise the target"):
        calibrate_noise_multiplier(
            lambda sigma: [gaussian(min(sigma, 1.0), 1.0, 100)], target_epsilon=0.1, delta=DELTA
        )


@pytest.mark.parametrize("factor", [0.0, 1e-9])
def test_noise_that_falls_to_nothing_is_refused(factor):
    with pytest.raises(ValueError, match="decay less"):
        calibrate_noise_multiplier(
            lambda sigma: [gaussian(sigma, 0.1, 1), gaussian(factor * sigma, 0.1, 1)],
            target_epsilon=1.0,
            delta=DELTA,
        )
