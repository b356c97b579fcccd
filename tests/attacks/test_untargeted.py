"""Untargeted extraction: who was trained on comes first where the model says so, else by chance."""

import numpy as np
import pytest

from attacks.untargeted import precision_at, value_scores

TRUTH = np.arange(60) % 3 == 0


def test_what_the_phrase_makes_hard_does_not_count() -> None:
    rng = np.random.default_rng(0)
    losses = rng.random((60, 1)) - 2.0 * TRUTH[:, None] + 1e3 * rng.random((1, 7))
    (found,) = precision_at(value_scores(losses), TRUTH, ks=[20])
    assert found.precision == 1.0 and found.hits == 20
    assert found.chance == pytest.approx(1 / 3)


def test_what_any_model_finds_likely_does_not_count() -> None:
    """Common values look trained on, until a model that never saw them is asked as well."""
    rng = np.random.default_rng(0)
    common = 10.0 * rng.random((60, 1))
    losses = -common - 0.5 * TRUTH[:, None] + np.zeros((60, 4))
    reference = -common + np.zeros((60, 4))
    (alone,) = precision_at(value_scores(losses), TRUTH, ks=[20])
    (calibrated,) = precision_at(value_scores(losses, reference), TRUTH, ks=[20])
    assert alone.precision < 0.7 < calibrated.precision == 1.0


def test_a_model_that_knows_nothing_is_right_by_chance() -> None:
    rng = np.random.default_rng(0)
    hits = [
        precision_at(value_scores(rng.random((60, 5))), TRUTH, ks=[10])[0].hits for _ in range(2000)
    ]
    # Drawn without replacement: hypergeometric, of variance k p (1 - p) (V - k) / (V - 1).
    deviation = np.sqrt(10 / 3 * 2 / 3 * 50 / 59 / len(hits))
    assert abs(np.mean(hits) - 10 / 3) < 4 * deviation


def test_ties_count_as_the_mean_of_their_orders() -> None:
    (all_tied,) = precision_at(np.zeros(60), TRUTH, ks=[10])
    assert all_tied.hits == pytest.approx(10 / 3)
    low, high = all_tied.interval
    assert low < all_tied.precision < high
    scores = np.array([3.0, 2.0, 2.0, 1.0])
    (two,) = precision_at(scores, [False, True, False, True], ks=[2])
    assert two.hits == 0.5


def test_intervals_hold_the_precision_however_few_the_claims() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(0, 3, size=60).astype(float)
        for found in precision_at(scores, TRUTH, ks=[1, 2, 59, 60]):
            assert found.interval[0] <= found.precision <= found.interval[1]
    assert found.precision == pytest.approx(found.chance)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: precision_at([1.0, 2.0], [True, False], ks=[3]), r"k in \[1, 2\], got 3"),
        (lambda: precision_at([1.0, 2.0], [True, False], ks=[0]), "k"),
        (lambda: precision_at([1.0, 2.0], [True, True], ks=[1]), "members and non-members"),
        (lambda: value_scores([[1.0, np.inf]]), "1 that are not"),
        (lambda: value_scores(np.zeros((0, 3))), "finite numbers"),
        (lambda: value_scores([[1.0], [2.0]], [[1.0, 2.0]]), "same values in the same phrases"),
    ],
)
def test_bad_input_is_refused(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
