"""Oracles: naive p-values, known mechanisms (coverage), published power.

Coverage: on a mechanism of known ε a bound may exceed it in at most 5 % of the runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import optimize, special, stats

from attacks import auditing
from attacks.auditing import clopper_pearson, one_run, one_run_fdp
from attacks.ceilings import gaussian_epsilon

DELTA = 1e-5


def coins(rng, canaries):
    return rng.random(canaries) < 0.5


def null_scores(rng, is_member):
    return rng.normal(size=is_member.size)


def gaussian_scores(mu):
    return lambda rng, is_member: rng.normal(size=is_member.size) + mu * is_member


def randomised_response(epsilon):
    def scores(rng, is_member):
        truthful = rng.random(is_member.size) < special.expit(epsilon)
        return (is_member == truthful).astype(float)

    return scores


@dataclass(frozen=True)
class Mechanism:
    """Scores of a mechanism, given the coins, and its true ε at DELTA."""

    name: str
    scores: Callable[[np.random.Generator, np.ndarray], np.ndarray]
    epsilon: float


NULL = Mechanism("null", null_scores, 0.0)
RESPONSE = Mechanism("randomised response", randomised_response(1.0), 1.0)
GAUSSIAN = [
    Mechanism(f"mu={mu}", gaussian_scores(mu), gaussian_epsilon(mu, DELTA))
    for mu in (0.27, 0.93, 2.0)
]
CASES = [(one_run, m) for m in (NULL, RESPONSE, *GAUSSIAN)]
CASES += [(one_run_fdp, m) for m in (NULL, *GAUSSIAN)]
CASE_IDS = [f"{audit.__name__}-{mechanism.name}" for audit, mechanism in CASES]


def bounds(audit, mechanism, *, runs, canaries=1000, seed=0):
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(runs):
        is_member = coins(rng, canaries)
        result = audit(mechanism.scores(rng, is_member), is_member, delta=DELTA)
        results.append(result.epsilon_lower_bound)
    return np.array(results)


def allowed_error(runs):
    return 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize(("audit", "mechanism"), CASES, ids=CASE_IDS)
def test_bound_is_valid(audit, mechanism):
    exceeded = bounds(audit, mechanism, runs=60) > mechanism.epsilon
    assert exceeded.mean() <= allowed_error(60)


@pytest.mark.slow
@pytest.mark.parametrize(("audit", "mechanism"), CASES, ids=CASE_IDS)
def test_bound_is_valid_over_many_runs(audit, mechanism):
    exceeded = bounds(audit, mechanism, runs=1000, seed=1) > mechanism.epsilon
    assert exceeded.mean() <= allowed_error(1000)


@pytest.mark.parametrize(
    ("audit", "mechanism", "published"),
    [
        (one_run, RESPONSE, 0.83),
        (one_run, GAUSSIAN[1], 1.44),
        (one_run, GAUSSIAN[2], 3.15),
        (one_run_fdp, GAUSSIAN[1], 1.99),
        (one_run_fdp, GAUSSIAN[2], 4.81),
    ],
)
def test_bound_is_as_high_as_this_method_reaches(audit, mechanism, published):
    values = bounds(audit, mechanism, runs=60, seed=2)
    assert values.mean() >= published - 2 * values.std() / math.sqrt(60)


def test_a_trainer_without_noise_is_flagged():
    """Scores that are membership itself, but for a trifle: any usual claim is refuted."""
    rng = np.random.default_rng(3)
    is_member = coins(rng, 1000)
    scores = is_member + 0.01 * rng.normal(size=1000)
    for audit in (one_run, one_run_fdp):
        result = audit(scores, is_member, delta=DELTA)
        assert result.epsilon_lower_bound > 4.5
        assert result.correct >= 0.99 * result.guesses
    # The reverse is no evidence of a leak in the direction the scores claim.
    assert one_run(-scores, is_member, delta=DELTA).epsilon_lower_bound == 0


@pytest.mark.parametrize("audit", [one_run, one_run_fdp])
class TestResult:
    def test_states_what_it_rests_on(self, audit):
        rng = np.random.default_rng(4)
        is_member = coins(rng, 500)
        scores = gaussian_scores(2.0)(rng, is_member)
        result = audit(scores, is_member, delta=DELTA, confidence=0.9)
        assert (result.confidence, result.delta, result.canaries) == (0.9, DELTA, 500)
        assert 0 < result.epsilon_lower_bound <= result.ceiling
        assert 0 < result.correct <= result.guesses <= 500
        assert "fair coin" in result.assumption

    def test_the_ceiling_is_reached_by_perfect_scores_and_grows_with_the_canaries(self, audit):
        ceilings = []
        for canaries in (50, 500, 5000):
            is_member = np.arange(canaries) % 2 == 0
            result = audit(is_member.astype(float), is_member, delta=DELTA)
            assert result.epsilon_lower_bound == result.ceiling
            ceilings.append(result.ceiling)
        assert 0 < ceilings[0] < ceilings[1] < ceilings[2]

    def test_less_confidence_gives_a_higher_bound(self, audit):
        rng = np.random.default_rng(5)
        is_member = coins(rng, 500)
        scores = gaussian_scores(1.0)(rng, is_member)
        low, high = (
            audit(scores, is_member, delta=DELTA, confidence=c).epsilon_lower_bound
            for c in (0.99, 0.5)
        )
        assert low < high

    def test_ties_do_not_follow_the_order_of_the_labels(self, audit):
        """With equal scores and the members listed first or last, a stable sort would leak."""
        is_member = np.arange(1000) < 500
        for labels in (is_member, ~is_member):
            assert audit(np.zeros(1000), labels, delta=DELTA).epsilon_lower_bound == 0

    def test_ties_are_broken_by_the_generator_given(self, audit):
        rng = np.random.default_rng(6)
        is_member = coins(rng, 1000)
        scores = randomised_response(2.0)(rng, is_member)
        rngs = [np.random.default_rng(seed) for seed in (1, 2, 3)]
        results = {audit(scores, is_member, delta=DELTA, rng=rng) for rng in rngs}
        assert len(results) > 1
        assert audit(scores, is_member, delta=DELTA) == audit(scores, is_member, delta=DELTA)

    def test_labels_that_no_coins_gave_are_refused(self, audit):
        with pytest.raises(ValueError, match="own fair coin, got 100 of 1000 in"):
            audit(np.arange(1000.0), np.arange(1000) < 100, delta=DELTA)

    @pytest.mark.parametrize(
        ("options", "message"), [({"delta": 1.0}, "`delta`"), ({"confidence": 95}, "`confidence`")]
    )
    def test_arguments_out_of_range_are_refused(self, audit, options, message):
        with pytest.raises(ValueError, match=message):
            audit([0.0, 1.0], [False, True], **({"delta": DELTA} | options))

    def test_bad_scores_are_refused(self, audit):
        with pytest.raises(ValueError, match="without NaN"):
            audit([0.0, np.nan], [False, True], delta=DELTA)

    def test_a_hundred_thousand_canaries_are_no_problem(self, audit):
        rng = np.random.default_rng(7)
        is_member = coins(rng, 100_000)
        result = audit(gaussian_scores(2.0)(rng, is_member), is_member, delta=DELTA)
        assert 3 < result.epsilon_lower_bound < gaussian_epsilon(2.0, DELTA)


def naive_steinke(epsilon, *, total, right, canaries, delta):
    """The p-value as printed: P[B >= v] + 2 m δ max_i P[v > B >= v - i] / i."""
    wins = stats.binom(total, special.expit(epsilon))
    excess = max(
        (sum(wins.pmf(k) for k in range(right - i, right)) / i for i in range(1, right + 1)),
        default=0.0,
    )
    return wins.sf(right - 1) + 2 * canaries * delta * excess


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize(("total", "right"), [(10, 10), (10, 7), (40, 31), (40, 20), (6, 0)])
def test_steinke_p_value_equals_the_naive_sum(delta, total, right):
    counts = auditing._Guesses(total, right, 100)
    for epsilon in (0.0, 0.3, 1.0, 4.0):
        naive = naive_steinke(epsilon, total=total, right=right, canaries=100, delta=delta)
        value = auditing._steinke_p_value(epsilon, counts, delta=delta)
        assert value == pytest.approx(naive, rel=1e-9)


@pytest.mark.parametrize("counts", [(1000, 700, 1000), (64, 64, 1000), (100_000, 90_000, 100_000)])
def test_steinke_p_value_grows_with_epsilon_while_it_can_refute(counts):
    counts = auditing._Guesses(*counts)
    values = [
        auditing._steinke_p_value(epsilon, counts, delta=DELTA) for epsilon in np.linspace(0, 6, 61)
    ]
    small = [value for value in values if value < 0.05]
    assert len(small) > 5
    assert small == values[: len(small)]
    assert np.all(np.diff(small) >= 0)


def naive_recursion(mu, *, total, right, canaries, level):
    """Mahloujifar et al. with arrays, written down as in the paper, without shortcuts."""
    r, h = np.zeros(right + 1), np.zeros(right + 1)
    r[right] = level * right / canaries
    h[right] = level * (total - right) / canaries
    for i in range(right - 1, -1, -1):
        h[i] = max(h[i + 1], stats.norm.cdf(stats.norm.ppf(r[i + 1]) - mu))
        r[i] = r[i + 1] + i / (total - i) * (h[i] - h[i + 1])
        if r[i] >= 1:
            return True
    return r[0] + h[0] >= total / canaries


@pytest.mark.parametrize(
    ("total", "right", "canaries"), [(20, 18, 20), (20, 20, 100), (50, 30, 60), (8, 0, 10)]
)
def test_gaussian_refutation_equals_the_naive_recursion(total, right, canaries):
    counts = auditing._Guesses(total, right, canaries)
    verdicts = []
    for mu in np.linspace(0, 4, 81):
        naive = naive_recursion(mu, total=total, right=right, canaries=canaries, level=0.05)
        verdicts.append(auditing._gaussian_refuted(mu, counts, level=0.05))
        assert verdicts[-1] == naive
    assert verdicts == sorted(verdicts, reverse=True)


def best_with_expected_counts(refutes, *, mu, canaries, limit):
    """Largest refuted parameter when exactly the expected number of guesses is right."""
    best = 0.0
    for share in np.geomspace(1e-4, 0.05, 25):

        def guessed(cut):
            return stats.norm.sf(cut - mu / 2) + stats.norm.sf(cut + mu / 2)

        cut = optimize.brentq(lambda cut, share=share: guessed(cut) - share, 0, 20)
        total = int(share * canaries)
        right = round(total * stats.norm.sf(cut - mu / 2) / guessed(cut))
        counts = auditing._Guesses(total, right, canaries)
        best = max(best, auditing._largest_refuted(refutes, [counts], limit=limit)[0])
    return best


def test_published_figures_with_expected_counts():
    """Mahloujifar et al. (2025), table 1, σ = 1: Steinke et al. 2.61, theirs 3.61.

    The number of canaries and of guesses behind each published figure is not known, hence 0.1.
    """

    def steinke(epsilon, counts):
        return auditing._steinke_p_value(epsilon, counts, delta=DELTA) < 0.05

    def gaussian(mu, counts):
        return auditing._gaussian_refuted(mu, counts, level=0.05)

    sizes = (100_000, 1_000_000)
    epsilon = max(best_with_expected_counts(steinke, mu=1, canaries=m, limit=20) for m in sizes)
    mu = max(best_with_expected_counts(gaussian, mu=1, canaries=m, limit=10) for m in sizes)
    assert epsilon == pytest.approx(2.61, abs=0.1)
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(3.61, abs=0.1)


def test_the_gaussian_hypothesis_is_named_because_other_mechanisms_break_it():
    """Randomised response with ε = 1 refutes Gaussian curves of a larger ε: no bound on its ε."""
    values = bounds(one_run_fdp, RESPONSE, runs=20)
    assert (values > RESPONSE.epsilon).mean() > 0.3
    result = one_run_fdp([0.0, 1.0], [False, True], delta=DELTA)
    assert result.assumption.startswith("ε under a Gaussian trade-off hypothesis")


class TestClopperPearson:
    def test_equals_the_formula(self):
        scores = np.array([0.0] * 3 + [1.0] * 97 + [0.0] * 95 + [1.0] * 5)
        is_member = np.arange(200) < 100
        result = clopper_pearson(scores, is_member, threshold=0.5, delta=1e-3)
        fnr = stats.beta.ppf(0.975, 4, 97)
        fpr = stats.beta.ppf(0.975, 6, 95)
        expected = max(math.log((1 - fnr - 1e-3) / fpr), math.log((1 - fpr - 1e-3) / fnr))
        assert result.epsilon_lower_bound == pytest.approx(expected)
        assert (result.guesses, result.correct) == (200, 192)

    def test_ceiling_with_a_thousand_runs_each(self):
        is_member = np.arange(2000) < 1000
        result = clopper_pearson(is_member * 1.0, is_member, threshold=0.5, delta=0.0)
        assert result.epsilon_lower_bound == result.ceiling == pytest.approx(5.6, abs=0.05)

    @pytest.mark.parametrize("mechanism", [NULL, RESPONSE, *GAUSSIAN], ids=lambda m: m.name)
    def test_is_valid(self, mechanism):
        rng = np.random.default_rng(8)
        runs, exceeded = 500, 0
        for _ in range(runs):
            is_member = coins(rng, 300)
            scores = mechanism.scores(rng, is_member)
            result = clopper_pearson(scores, is_member, threshold=0.7, delta=DELTA)
            exceeded += result.epsilon_lower_bound > mechanism.epsilon
        assert exceeded / runs <= allowed_error(runs)

    def test_a_useless_attack_certifies_nothing(self):
        is_member = np.arange(100) < 50
        result = clopper_pearson(np.zeros(100), is_member, threshold=0.5, delta=0.5)
        assert result.epsilon_lower_bound == 0
