"""How far groups lie apart, by hand, against closed forms, and how often intervals hold."""

from __future__ import annotations

import tracemalloc
from math import comb, sqrt

import numpy as np
import pytest

from dpnlu.compare.breakdown import Breakdown
from dpnlu.compare.group_gap import GroupGap, group_gap


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _verdicts(*counts: tuple[int, int]) -> np.ndarray:
    """(right, wrong) of one group after the other."""
    return np.concatenate([np.repeat([True, False], pair) for pair in counts])


def _groups(*sizes: int, names: str = "abcdefghij", without: int = 0) -> Breakdown:
    """Groups of these sizes, one after the other, then texts without one."""
    return Breakdown(
        names=tuple(names[: len(sizes)]),
        training=(0,) * len(sizes),
        classes=np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(without, -1)]),
    )


def _gap(groups: Breakdown, right: np.ndarray, ordinary: np.ndarray | None = None) -> GroupGap:
    found = group_gap(groups, right, ordinary=ordinary, confidence=0.95, rng=_rng())
    assert found is not None
    return found


def test_the_gap_of_three_groups_by_hand() -> None:
    """Nine texts are too few to be a group, and texts without one are in none."""
    groups = _groups(10, 20, 10, 9, without=12)
    private = _verdicts((9, 1), (8, 12), (5, 5), (0, 9), (0, 12))  # 0.9, 0.4, 0.5
    ordinary = _verdicts((8, 2), (18, 2), (10, 0), (9, 0), (12, 0))  # 0.8, 0.9, 1.0
    found = _gap(groups, private, ordinary)
    assert (found.highest, found.lowest) == ("a", "b")
    assert found.gap == pytest.approx(0.5)
    assert found.change == pytest.approx(0.5 - 0.2)
    assert found.change_interval is not None
    assert found.change_interval[0] < 0.3 < found.change_interval[1]
    alone = _gap(groups, ordinary)
    assert (alone.highest, alone.lowest, alone.gap) == ("c", "a", pytest.approx(0.2))
    assert alone.change is None
    assert set(alone.to_dict()) == {"highest", "lowest", "gap", "gap_by_chance"}


def test_other_groups_of_the_same_texts_have_another_gap() -> None:
    private, ordinary = _verdicts((20, 0), (10, 10)), np.ones(40, bool)
    found = _gap(_groups(20, 20), private, ordinary)
    assert (found.lowest, found.gap, found.change) == ("b", 0.5, 0.5)
    other = Breakdown(names=("a", "b"), training=(0, 0), classes=np.arange(40) % 2)
    mixed = _gap(other, private, ordinary)
    assert (mixed.gap, mixed.change) == (0, 0)
    swapped = _gap(_groups(20, 20, names="ba"), private, ordinary)
    assert (swapped.lowest, swapped.gap) == ("a", 0.5)


def test_the_order_of_texts_does_not_matter() -> None:
    groups, order = _groups(20, 30), np.random.default_rng(1).permutation(50)
    private, ordinary = _verdicts((15, 5), (12, 18)), _verdicts((18, 2), (27, 3))
    mixed = Breakdown(names=groups.names, training=(0, 0), classes=groups.classes[order])
    assert _gap(mixed, private[order], ordinary[order]) == _gap(groups, private, ordinary)


def test_groups_that_are_alike_are_named_in_order() -> None:
    found = _gap(_groups(10, 10, 10), np.ones(30, bool))
    assert (found.lowest, found.highest, found.gap, found.gap_by_chance) == ("a", "c", 0, 0)


@pytest.mark.parametrize("sizes", [(10,), (9, 100), (9, 9, 9), (10, 0)])
def test_one_group_alone_has_no_gap(sizes: tuple[int, ...]) -> None:
    groups = _groups(*sizes, without=20)
    right = np.ones(len(groups.classes), bool)
    assert group_gap(groups, right, confidence=0.95, rng=_rng()) is None


def test_the_interval_of_groups_far_apart_is_that_of_independent_paired_differences() -> None:
    """Of many texts, where the same two groups are the extremes in every draw."""
    ordinary = _verdicts((380, 20), (320, 80))
    private = np.concatenate([_verdicts((340, 60)), _verdicts((200, 200))])
    found = _gap(_groups(400, 400), private, ordinary)
    differences = private.astype(float) - ordinary
    error = sqrt(sum(part.var() / 400 for part in (differences[:400], differences[400:])))
    assert found.change == pytest.approx(0.85 - 0.5 - (0.95 - 0.8))
    assert found.change_interval == pytest.approx(
        (found.change - 1.96 * error, found.change + 1.96 * error), abs=0.15 * error
    )


def test_runs_are_compared_on_the_same_texts() -> None:
    """Two models that are right about the same texts differ less than two that are as often."""
    ordinary = _verdicts((90, 10), (60, 40))
    other = np.concatenate([_verdicts((90, 10))[::-1], _verdicts((60, 40))[::-1]])
    same, unlike = (_gap(_groups(100, 100), right, ordinary) for right in (ordinary, other))
    assert same.change == unlike.change == 0
    assert same.change_interval is not None and unlike.change_interval is not None
    assert same.change_interval[0] < 0 < same.change_interval[1]
    assert np.ptp(same.change_interval) < 0.5 * np.ptp(unlike.change_interval)


def test_a_few_texts_that_are_all_right_are_no_certainty() -> None:
    right = np.ones(20, bool)
    found = _gap(_groups(10, 10), right, right)
    assert (found.gap, found.change) == (0, 0)
    assert found.change_interval is not None
    assert found.change_interval[0] < -0.05 and found.change_interval[1] > 0.05


def test_two_groups_that_are_alike_lie_apart_by_chance_as_two_binomials_do() -> None:
    found = _gap(_groups(12, 20), _verdicts((6, 6), (18, 2)))  # 24 of 32 together
    p = 24 / 32

    def weight(n: int, k: int) -> float:
        return comb(n, k) * p**k * (1 - p) ** (n - k)

    expected = sum(
        weight(12, a) * weight(20, b) * abs(a / 12 - b / 20) for a in range(13) for b in range(21)
    )
    assert found.gap_by_chance == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("worse", [0.1, 0.4])
def test_intervals_hold_the_change_about_as_often_as_they_say(
    worse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four groups of 60 texts, whose answers private training spoils with chance 0.1, and those
    of a fourth perhaps more often."""
    monkeypatch.setattr("dpnlu.compare.group_gap._REPLICATES", 300)
    rng, groups, held, studies = _rng(), _groups(60, 60, 60, 60), 0, 100
    spoilt = np.repeat([0.1, 0.1, 0.1, worse], 60)
    change = 0.9 * (worse - 0.1)
    for _ in range(studies):
        ordinary = rng.random(240) < 0.9
        private = ordinary & (rng.random(240) >= spoilt)
        found = group_gap(groups, private, ordinary=ordinary, confidence=0.9, rng=rng)
        assert found is not None and found.change_interval is not None
        held += found.change_interval[0] <= change <= found.change_interval[1]
    assert held >= 0.83 * studies
    if worse > 0.1:  # groups alike have wider ones: which are best and worst is all chance
        assert held < studies, "intervals that always hold are too wide"


def test_as_many_groups_as_people_fit_into_memory() -> None:
    tracemalloc.start()
    groups, right = _groups(*(10,) * 400, names="x" * 400), _rng().random(4000) < 0.5
    _gap(groups, right, right)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22, "2000 draws of 400 groups take 24 MiB and more if all are kept"
