"""Oracles: naive quadratic versions, closed forms for Gaussian scores, known coverage."""

import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from attacks import metrics


def gaussian_scores(rng, *, shift, members=500, non_members=500):
    scores = np.append(rng.normal(shift, 1, members), rng.normal(0, 1, non_members))
    return scores, np.arange(members + non_members) < members


def naive_auc(scores, is_member):
    pairs = [(a, b) for a in scores[is_member] for b in scores[~is_member]]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def naive_tpr_at_fpr(scores, is_member, fpr):
    """Largest TPR over every threshold whose FPR is allowed."""
    best = 0.0
    for threshold in [*scores, np.inf]:
        if np.mean(scores[~is_member] >= threshold) <= fpr + 1e-12:
            best = max(best, np.mean(scores[is_member] >= threshold))
    return best


@st.composite
def tied_scores(draw):
    scores = draw(st.lists(st.integers(0, 5), min_size=2, max_size=40))
    labels = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    return np.array(scores, dtype=float), np.array([True, False, *labels[2:]])


@given(tied_scores())
def test_auc_equals_the_naive_count_over_pairs(case):
    assert metrics.auc(*case) == pytest.approx(naive_auc(*case), abs=1e-12)


@given(tied_scores())
def test_auc_is_the_area_under_the_roc(case):
    curve = metrics.roc(*case)
    assert metrics.auc(*case) == pytest.approx(integrate.trapezoid(curve.tpr, curve.fpr), abs=1e-12)


@given(tied_scores())
def test_roc_points_are_the_rates_at_their_thresholds(case):
    scores, is_member = case
    curve = metrics.roc(scores, is_member)
    for fpr, tpr, threshold in zip(curve.fpr, curve.tpr, curve.thresholds, strict=True):
        assert fpr == pytest.approx(np.mean(scores[~is_member] >= threshold))
        assert tpr == pytest.approx(np.mean(scores[is_member] >= threshold))
    assert len(curve.fpr) == 1 + len(np.unique(scores))
    assert (curve.fpr[-1], curve.tpr[-1]) == (1, 1)


@given(tied_scores(), st.sampled_from([0.1, 0.25, 0.29, 0.5, 0.9]))
def test_tpr_at_fpr_equals_the_naive_search(case, fpr):
    point = metrics.operating_point(*case, fpr=fpr)
    if np.isnan(point.value):
        assert fpr * point.non_members < 1
    else:
        assert point.value == naive_tpr_at_fpr(*case, fpr)


@given(tied_scores())
def test_advantage_equals_the_naive_search(case):
    scores, is_member = case
    gains = [np.mean(scores[is_member] >= t) - np.mean(scores[~is_member] >= t) for t in scores]
    assert metrics.advantage(*case) == pytest.approx(max([0, *gains]), abs=1e-12)
    assert metrics.balanced_accuracy(*case) == pytest.approx((1 + max([0, *gains])) / 2)


@pytest.mark.parametrize("shift", [0.5, 1.5, 3.0])
def test_gaussian_scores_have_the_closed_form_auc_and_tpr(shift):
    case = gaussian_scores(
        np.random.default_rng(1), shift=shift, members=40_000, non_members=40_000
    )
    assert metrics.auc(*case) == pytest.approx(stats.norm.cdf(shift / np.sqrt(2)), abs=0.005)
    for fpr in (0.01, 0.1):
        truth = stats.norm.cdf(shift + stats.norm.ppf(fpr))
        assert metrics.tpr_at_fpr(*case, fpr=fpr) == pytest.approx(truth, abs=0.02)
    truth = 2 * stats.norm.cdf(shift / 2) - 1
    assert metrics.advantage(*case) == pytest.approx(truth, abs=0.01)


def test_separable_scores_and_their_reverse():
    scores, is_member = np.arange(10.0), np.arange(10) >= 5
    assert metrics.auc(scores, is_member) == 1
    assert metrics.auc(-scores, is_member) == 0
    assert metrics.advantage(scores, is_member) == 1
    assert metrics.advantage(-scores, is_member) == 0


def test_infinite_scores_are_ranked():
    assert metrics.auc([np.inf, 0, -np.inf], [True, False, False]) == 1


def test_permuting_examples_changes_nothing():
    rng = np.random.default_rng(2)
    scores, is_member = gaussian_scores(rng, shift=1)
    order = rng.permutation(scores.size)
    assert metrics.auc(scores, is_member) == metrics.auc(scores[order], is_member[order])


def test_auc_on_noise_is_not_biased_as_the_hull_is():
    rng = np.random.default_rng(3)
    cases = [gaussian_scores(rng, shift=0, members=100, non_members=100) for _ in range(400)]
    areas = [metrics.auc(*case) for case in cases]
    assert np.mean(areas) == pytest.approx(0.5, abs=3 * np.std(areas) / 20)


def test_advantage_on_noise_has_the_documented_bias():
    rng = np.random.default_rng(4)
    values = [metrics.advantage(*gaussian_scores(rng, shift=0)) for _ in range(300)]
    assert np.mean(values) == pytest.approx(0.63 * np.sqrt(2 / 500), rel=0.1)


def auc_coverage(rng, *, shift, spread, members, non_members, trials):
    """Share of trials in which the interval holds the true AUC."""
    truth, hits = stats.norm.cdf(shift / np.sqrt(1 + spread**2)), 0
    is_member = np.arange(members + non_members) < members
    for _ in range(trials):
        scores = rng.normal(size=is_member.size) * np.where(is_member, spread, 1)
        scores += shift * is_member
        low, high = metrics.auc_interval(scores, is_member)
        assert 0 <= low <= metrics.auc(scores, is_member) <= high <= 1
        hits += low <= truth <= high
    return hits / trials


@pytest.mark.parametrize(
    ("shift", "spread", "members", "non_members"),
    [
        (0.0, 1, 20, 20),
        (0.0, 1, 200, 200),
        (1.0, 1, 20, 300),
        (1.0, 3, 20, 500),
        (3.5, 1, 20, 20),
        (3.5, 1, 20, 300),
        (3.5, 1, 200, 200),
    ],
)
def test_auc_interval_covers(shift, spread, members, non_members):
    rng, sizes = np.random.default_rng(5), {"members": members, "non_members": non_members}
    coverage = auc_coverage(rng, shift=shift, spread=spread, trials=200, **sizes)
    assert coverage >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5, 3.5])
@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize(("members", "non_members"), [(20, 20), (20, 500), (500, 500)])
def test_auc_interval_covers_for_unequal_spreads(shift, spread, members, non_members):
    rng, sizes = np.random.default_rng(6), {"members": members, "non_members": non_members}
    assert auc_coverage(rng, shift=shift, spread=spread, trials=1000, **sizes) >= 0.92


def test_auc_interval_is_not_too_wide():
    case = gaussian_scores(np.random.default_rng(7), shift=1, members=5000, non_members=5000)
    low, high = metrics.auc_interval(*case)
    assert high - low < 0.025
    low, high = metrics.auc_interval(*case, confidence=0.5)
    assert high - low < 0.01


@pytest.mark.parametrize("members", [1, 5, 100])
def test_auc_interval_of_separable_scores_is_no_point(members):
    scores, is_member = np.arange(2.0 * members), np.arange(2 * members) >= members
    low, high = metrics.auc_interval(scores, is_member)
    assert high == 1
    assert low < 1 - 0.5 / members
    low, high = metrics.auc_interval(-scores, is_member)
    assert low == 0
    assert high > 0.5 / members


def test_tpr_below_the_resolution_of_the_data_is_nan_and_says_why():
    case = gaussian_scores(np.random.default_rng(8), shift=2, non_members=99)
    point = metrics.operating_point(*case, fpr=0.01)
    assert np.isnan(point.value)
    assert np.isnan(point.interval).all()
    assert "undefined with 99 non-members: score at least 100" in point.caution
    with pytest.warns(UserWarning, match="undefined with 99"):
        assert np.isnan(metrics.tpr_at_fpr(*case, fpr=0.01))


def test_tpr_from_few_false_positives_comes_with_a_warning():
    case = gaussian_scores(np.random.default_rng(8), shift=2, non_members=300)
    with pytest.warns(UserWarning, match="rests on 3 false positive"):
        value = metrics.tpr_at_fpr(*case, fpr=0.01)
    assert 0 < value < 1
    case = gaussian_scores(np.random.default_rng(8), shift=2, non_members=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.tpr_at_fpr(*case, fpr=0.01)


def test_tied_scores_never_help():
    """All examples tie: no threshold separates, so the TPR at a small FPR is zero."""
    scores, is_member = np.zeros(2000), np.arange(2000) < 1000
    low, high = metrics.auc_interval(scores, is_member)
    assert low < 0.5 < high
    point = metrics.operating_point(scores, is_member, fpr=0.1)
    assert (point.value, point.true_positives, point.false_positives) == (0, 0, 0)
    assert metrics.auc(scores, is_member) == 0.5


def test_a_rounding_error_costs_no_false_positive():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    scores, is_member = np.append(np.arange(100.0), [70.5]), np.arange(101) == 100
    point = metrics.operating_point(scores, is_member, fpr=0.29)
    assert (point.value, point.false_positives) == (1, 29)


def test_operating_point_is_consistent():
    scores, is_member = gaussian_scores(np.random.default_rng(9), shift=2, non_members=1000)
    point = metrics.operating_point(scores, is_member, fpr=0.05)
    assert point.false_positives == 50 == np.sum(scores[~is_member] > point.threshold)
    assert point.true_positives == np.sum(scores[is_member] > point.threshold)
    reference = stats.binomtest(point.true_positives, point.members).proportion_ci(0.95, "exact")
    assert point.interval == pytest.approx(tuple(reference))
    assert point.caution == ""


def test_band_holds_the_curve_and_each_point_has_its_exact_interval():
    scores, is_member = gaussian_scores(np.random.default_rng(10), shift=1, members=60)
    curve, band = metrics.roc(scores, is_member), metrics.roc_band(scores, is_member)
    assert np.array_equal(band.fpr, curve.fpr)
    assert ((band.low <= band.tpr) & (band.tpr <= band.high)).all()
    middle = np.argmin(np.abs(curve.tpr - 0.5))
    reference = stats.binomtest(round(curve.tpr[middle] * 60), 60).proportion_ci(0.95, "exact")
    assert (band.low[middle], band.high[middle]) == pytest.approx(tuple(reference))


MEASURES = [
    metrics.auc,
    metrics.auc_interval,
    metrics.roc,
    metrics.roc_band,
    metrics.advantage,
    metrics.balanced_accuracy,
    partial(metrics.tpr_at_fpr, fpr=0.5),
    partial(metrics.operating_point, fpr=0.5),
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("scores", "is_member", "message"),
    [
        ([1.0, np.nan], [True, False], "without NaN, got 1 of 2"),
        ([1.0, 2.0], [True, True], "2 members among 2"),
        ([1.0, 2.0], [False, False], "0 members among 2"),
        ([1.0, 2.0], [True, False, True], r"shape \(2,\), got \(3,\)"),
        ([[1.0, 2.0]], [[True, False]], "1 dimension"),
        ([1.0, 2.0], [0.3, 0.7], "truth values, got float64"),
        ([], np.array([], dtype=bool), "0 members among 0"),
    ],
)
def test_bad_input_is_refused(measure, scores, is_member, message):
    with pytest.raises(ValueError, match=message):
        measure(scores, is_member)


def test_labels_may_be_zeros_and_ones():
    assert metrics.auc([1, 2], [0, 1]) == 1
