"""What privacy changed, against closed forms, hand-made models and loops in plain Python."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import comb
from typing import Any

import numpy as np
import pytest

from dpnlu.compare.answering import Retraining
from dpnlu.compare.breakdown import RANGES, Breakdown, by_frequency
from dpnlu.compare.calibration import BINS, calibration
from dpnlu.compare.changes import Verdicts, breakdowns_of, entry_of
from dpnlu.compare.flips import flips
from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Labels
from dpnlu.nlu.metrics import Answers


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- calibration -----------------------------------------------------------------------------

PERFECT = (np.repeat([0.6, 0.8], 10), np.array([1] * 6 + [0] * 4 + [1] * 8 + [0] * 2, bool))


def test_who_is_as_often_right_as_sure_has_no_calibration_error() -> None:
    found = calibration(*PERFECT, confidence=0.95, rng=_rng())
    assert found.ece == pytest.approx(0) == found.overconfidence
    assert found.accuracy == pytest.approx(0.7) == found.mean_confidence
    assert [(b.texts, b.confidence, b.accuracy) for b in found.bins] == [
        (10, pytest.approx(0.6), 0.6),
        (10, pytest.approx(0.8), 0.8),
    ]
    assert found.ece_interval[0] == 0
    assert found.overconfidence_interval[0] < 0 < found.overconfidence_interval[1]


def test_what_calibrated_models_show_by_chance_is_the_mean_deviation_of_binomials() -> None:
    found = calibration(*PERFECT, confidence=0.95, rng=_rng())

    def deviation(p: float, n: int = 10) -> float:
        return sum(comb(n, k) * p**k * (1 - p) ** (n - k) * abs(k - n * p) for k in range(n + 1))

    expected = (deviation(0.6) + deviation(0.8)) / 20
    assert found.ece_by_chance == pytest.approx(expected, rel=0.06)


def test_who_is_always_sure_and_half_the_time_wrong_is_off_by_a_half() -> None:
    right = np.arange(40) % 2 == 0
    found = calibration(np.ones(40), right, confidence=0.95, rng=_rng())
    assert found.ece == found.overconfidence == 0.5
    assert found.ece_by_chance == 0, "a calibrated model that is always sure is never wrong"
    assert found.ece_interval == pytest.approx(found.overconfidence_interval, abs=0.06)
    (only,) = found.bins
    assert (only.texts, only.accuracy) == (40, 0.5)


def test_opposite_errors_of_two_bins_add_up_to_the_error_and_cancel_in_the_mean() -> None:
    sure, right = np.repeat([0.25, 0.75], 50), np.repeat([True, False], 50)
    found = calibration(sure, right, confidence=0.95, rng=_rng())
    assert found.ece == pytest.approx(0.75)
    assert found.overconfidence == pytest.approx(0)


def test_the_calibration_error_is_that_of_a_loop_over_bins() -> None:
    rng = _rng()
    sure = rng.beta(4, 1, size=300)
    sure[:2] = 0, 1
    right = rng.random(300) < sure**2
    expected = 0.0
    for place in range(BINS):
        low, high = place / BINS, (place + 1) / BINS
        inside = [i for i, p in enumerate(sure) if low <= p < high or p == high == 1]
        if inside:
            gap = np.mean(sure[inside]) - np.mean(right[inside])
            expected += len(inside) / 300 * abs(gap)
    found = calibration(sure, right, confidence=0.95, rng=rng)
    assert found.ece == pytest.approx(expected)
    assert sum(entry.texts for entry in found.bins) == 300
    assert found.ece_interval[0] <= found.ece <= found.ece_interval[1]


def test_intervals_cover_the_error_of_the_model_about_as_often_as_they_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model that is sure of 0.9 and right with 0.8, wherever it is asked."""
    monkeypatch.setattr("dpnlu.compare.calibration._REPLICATES", 200)
    rng, errors, gaps, studies = _rng(), 0, 0, 60
    for _ in range(studies):
        right = rng.random(200) < 0.8
        found = calibration(np.full(200, 0.9), right, confidence=0.9, rng=rng)
        errors += found.ece_interval[0] <= 0.1 <= found.ece_interval[1]
        gaps += found.overconfidence_interval[0] <= 0.1 <= found.overconfidence_interval[1]
    assert errors >= 0.8 * studies and gaps >= 0.8 * studies
    assert min(errors, gaps) < studies, "intervals that always cover are too wide"


@pytest.mark.parametrize(
    ("sure", "right", "says"),
    [
        (np.zeros(0), np.zeros(0, bool), "at least one"),
        (np.zeros(3), np.zeros(2, bool), "shapes"),
        (np.array([0.5, np.nan]), np.zeros(2, bool), "diverged"),
        (np.array([0.5, 1.5]), np.zeros(2, bool), r"in \[0, 1\]"),
    ],
)
def test_what_is_no_confidence_is_refused(sure: np.ndarray, right: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calibration(sure, right, confidence=0.95, rng=_rng())


# ---- flips -----------------------------------------------------------------------------------


def test_flips_of_five_texts_by_hand() -> None:
    before = np.array([True, True, False, False, True])
    after = np.array([True, False, True, False, True])
    differ = np.array([False, True, True, True, False])  # the fourth: wrong twice, differently
    found = flips((before, after), differ, confidence=0.95)
    assert (found.negative, found.positive, found.disagreement) == (0.2, 0.2, 0.6)
    assert found.negative_interval[0] < 0.2 < found.negative_interval[1]
    back = flips((after, before), differ, confidence=0.95)
    assert (back.negative_interval, back.positive_interval) == (
        found.positive_interval,
        found.negative_interval,
    )


def test_flips_add_up_to_the_change_of_accuracy() -> None:
    rng = _rng()
    before, after = rng.random(100) < 0.9, rng.random(100) < 0.7
    found = flips((before, after), before != after, confidence=0.95)
    assert found.positive - found.negative == pytest.approx(after.mean() - before.mean())
    assert found.positive + found.negative == pytest.approx(found.disagreement)


def test_a_model_never_flips_against_itself() -> None:
    right = np.array([True, False])
    found = flips((right, right), np.zeros(2, bool), confidence=0.95)
    assert found.negative == found.positive == found.disagreement == 0
    assert found.negative_interval[1] > 0.5, "two texts say little"


def test_flips_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="got equal ones"):
        flips((np.array([True]), np.array([False])), np.array([False]), confidence=0.95)
    with pytest.raises(ValueError, match="at least one"):
        flips((np.zeros(0, bool), np.zeros(0, bool)), np.zeros(0, bool), confidence=0.95)
    with pytest.raises(ValueError, match="shapes"):
        flips((np.zeros(2, bool), np.zeros(3, bool)), np.zeros(2, bool), confidence=0.95)


# ---- breakdown -------------------------------------------------------------------------------


def test_shares_by_class_by_hand() -> None:
    breakdown = Breakdown(
        names=("rare", "unasked", "common"),
        training=(3, 7, 500),
        classes=np.array([0, 2, 2, 0, 2, 2]),
    )
    right = np.array([False, True, True, True, True, False])
    ordinary = np.array([True, True, True, True, True, True])
    rare, common = breakdown.shares(right, ordinary=ordinary, confidence=0.95)
    assert (rare["name"], rare["training"], rare["test"], rare["right"]) == ("rare", 3, 2, 0.5)
    assert (common["name"], common["test"], common["right"]) == ("common", 4, 0.75)
    assert (rare["change"], common["change"]) == (-0.5, -0.25)
    assert rare["change_interval"][0] < -0.5 < rare["change_interval"][1]
    assert "change" not in breakdown.shares(right, confidence=0.95)[0]


def test_frequencies_fall_into_ranges_that_leave_none_out() -> None:
    asked = [0, 1, 4, 5, 19, 20, 99, 100, 10**9]
    found = by_frequency(asked)
    assert [found.names[place] for place in found.classes] == [
        *("none", "1 to 4", "1 to 4", "5 to 19", "5 to 19"),
        *("20 to 99", "20 to 99", "over 99", "over 99"),
    ]
    assert found.names == tuple(name for _, name in RANGES)


def _example(text: str, intent: str | None, tags: str, number: int = 0) -> Example:
    tokens = tuple(text.split())
    return Example(
        id=f"test-{number}",
        text=text,
        tokens=tokens,
        tags=tuple(tags.split()),
        intent=intent,
        split="test",
    )


LABELS = Labels(("ask", "play"), ("B-city", "B-song", "I-city", "O"))
TEST = (
    _example("weather in New York", "ask", "O O B-city I-city", 0),
    _example("Play hello", "play", "O B-song", 1),
)


def test_breakdowns_count_what_training_had() -> None:
    training = (
        _example("play hello hello", "play", "O B-song B-song", 2),
        _example("play york", "play", "O B-city", 3),
    )
    found = breakdowns_of(TEST, training, LABELS)
    assert found["intents"].names == ("ask", "play")
    assert found["intents"].training == (0, 2)
    assert found["slots"].names == ("city", "song")
    assert found["slots"].training == (1, 2)
    words = found["rarest_word"]
    # "weather" never; "Play" in two texts, "hello" in one, however often it says so.
    assert [words.names[place] for place in words.classes] == ["none", "1 to 4"]
    assert "intents" not in breakdowns_of(TEST, training, Labels((), LABELS.tags))


def _grouped(*groups: str | None) -> tuple[Example, ...]:
    """The two texts in turn, and to which group each belongs."""
    return tuple(
        replace(TEST[number % 2], id=f"test-{number}", group=group)
        for number, group in enumerate(groups)
    )


def _by_group(test: tuple[Example, ...], intents: list[int], before: list[int]) -> dict[str, Any]:
    found = breakdowns_of(test, _grouped("a", "a", "c", None), LABELS)
    own, ordinary = (Verdicts.of(_answers(said, None), test, LABELS) for said in (intents, before))
    return entry_of(own, ordinary, found, confidence=0.95, seed=0)


def test_groups_are_a_breakdown_of_the_texts_that_have_one() -> None:
    """Ten of a, five of them wrong since; ten of b, always right; one of c; two of none."""
    test = _grouped(*("a",) * 10, *("b",) * 10, "c", None, None)
    gold = [number % 2 for number in range(23)]
    entry = _by_group(test, [0] * 10 + gold[10:], gold)
    worst, *others = entry["breakdown"]["groups"]
    assert [row["name"] for row in others] == ["b", "c"]
    asked = {key: worst[key] for key in ("name", "training", "test", "right", "change")}
    assert asked == {"name": "a", "training": 2, "test": 10, "right": 0.5, "change": -0.5}
    assert [(row["training"], row["test"], row["change"]) for row in others] == [
        *((0, 10, 0), (1, 1, 0)),
    ]
    gap = entry["group_gap"]
    assert (gap["lowest"], gap["highest"], gap["gap"], gap["change"]) == ("a", "b", 0.5, 0.5)
    swapped = _grouped(*("b",) * 10, *("a",) * 10, "c", None, None)
    other = _by_group(swapped, [0] * 10 + gold[10:], gold)
    same = {key: other["group_gap"][key] for key in ("lowest", "highest", "gap", "change")}
    assert same == {"lowest": "b", "highest": "a", "gap": 0.5, "change": 0.5}
    assert [row["name"] for row in other["breakdown"]["groups"]] == ["b", "a", "c"]
    kept = {"intents", "slots", "rarest_word"} & set(entry["breakdown"])
    assert all(other["breakdown"][kind] == entry["breakdown"][kind] for kind in kept)


def test_without_groups_in_the_test_nothing_is_said_of_them() -> None:
    entry = _by_group(_grouped(*(None,) * 20), [0] * 20, [0] * 20)
    assert "groups" not in entry["breakdown"] and "group_gap" not in entry
    few = _by_group(_grouped("a", *(None,) * 19), [0] * 20, [0] * 20)
    assert len(few["breakdown"]["groups"]) == 1 and "group_gap" not in few


def test_a_model_that_has_diverged_is_counted_and_has_no_calibration() -> None:
    said = replace(_answers([0, 0], None), confidence=np.full(2, np.nan))
    own = Verdicts.of(said, TEST, LABELS)
    found = entry_of(own, None, breakdowns_of(TEST, TEST, LABELS), confidence=0.95, seed=0)
    assert "calibration" not in found
    assert [row["right"] for row in found["breakdown"]["intents"]] == [0, 1]


def _answers(intents: list[int] | None, tags: list[str] | None) -> Answers:
    return Answers(
        intents=None if intents is None else np.array(intents),
        confidence=None if intents is None else np.full(len(intents), 0.75),
        tags=None if tags is None else np.array([LABELS.tags.index(tag) for tag in tags]),
    )


def test_verdicts_are_of_intents_and_whole_slots() -> None:
    said = _answers([0, 0], ["O", "O", "I-city", "I-city", "O", "B-city"])
    found = Verdicts.of(said, TEST, LABELS)
    assert found.texts.tolist() == [True, False]
    assert found.spans is not None
    assert found.spans.tolist() == [True, False], "a slot may begin with I-, its label counts"
    half = _answers([0, 1], ["O", "O", "B-city", "O", "O", "B-song"])
    assert Verdicts.of(half, TEST, LABELS).spans.tolist() == [False, True]
    assert Verdicts.of(_answers([0, 1], None), TEST, LABELS).spans is None


def test_without_intents_a_text_is_right_if_every_tag_is() -> None:
    found = Verdicts.of(
        _answers(None, ["O", "O", "B-city", "I-city", "O", "O"]), TEST, Labels((), LABELS.tags)
    )
    assert found.texts.tolist() == [True, False]
    assert found.confidence is None
    assert found.said == [["O", "O", "B-city", "I-city"], ["O", "O"]]


def test_every_pair_of_models_of_two_texts_is_counted_right() -> None:
    for first, second in product(product(range(2), repeat=2), repeat=2):
        one, other = (Verdicts.of(_answers(list(a), None), TEST, LABELS) for a in (first, second))
        differ = np.array([a != b for a, b in zip(one.said, other.said, strict=True)])
        found = flips((one.texts, other.texts), differ, confidence=0.95)
        gold = (0, 1)
        lost = sum(a == g != b for a, b, g in zip(first, second, gold, strict=True))
        assert found.negative == lost / 2


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["test_intents", "train_seconds", None])
def test_a_retraining_is_read_as_it_was_written(lost: str | None) -> None:
    written = Retraining(answers=_answers([0, 1], None), train_seconds=2.5).to_arrays()
    if lost is not None:
        kept = {"train_seconds"} if lost == "test_intents" else set(written) - {lost}
        with pytest.raises(ValueError, match="remove the file"):
            Retraining.from_arrays({name: written[name] for name in kept})
        return
    read = Retraining.from_arrays(written)
    assert read.answers.intents.tolist() == [0, 1] and read.answers.tags is None
    assert read.train_seconds == 2.5
