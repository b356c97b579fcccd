"""The blind baseline must pass fair splits and catch unfair ones, whatever gives them away."""

import numpy as np
import pytest

from attacks.blind import blind_baseline

WORDS = [f"word{k}" for k in range(200)]


def random_texts(rng, number, *, length=7):
    return [" ".join(rng.choice(WORDS, size=length)) for _ in range(number)]


def halves(number):
    return np.arange(2 * number) < number


def test_fair_splits_pass():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(40):
        is_member = rng.random(200) < 0.5
        labels = [str(k) for k in rng.integers(5, size=200)]
        verdicts.append(blind_baseline(random_texts(rng, 200), is_member, rng=rng, labels=labels))
    assert sum(verdict.suspicious for verdict in verdicts) <= 3
    assert np.mean([verdict.auc for verdict in verdicts]) == pytest.approx(0.5, abs=0.03)


def test_other_words_are_suspicious():
    rng = np.random.default_rng(1)
    others = [f"{text} please" if k % 2 else text for k, text in enumerate(random_texts(rng, 200))]
    verdict = blind_baseline(random_texts(rng, 200) + others, halves(200), rng=rng)
    assert verdict.suspicious
    assert verdict.auc > 0.65
    assert 0.5 < verdict.interval[0] < verdict.auc < verdict.interval[1]


def test_other_lengths_are_suspicious():
    rng = np.random.default_rng(2)
    texts = random_texts(rng, 200, length=6) + random_texts(rng, 200, length=8)
    assert blind_baseline(texts, halves(200), rng=rng).auc > 0.9


def test_other_labels_are_suspicious_only_when_they_are_given():
    rng = np.random.default_rng(3)
    texts, labels = random_texts(rng, 400), ["greet"] * 200 + ["book"] * 200
    assert blind_baseline(texts, halves(200), rng=rng, labels=labels).auc > 0.9
    assert not blind_baseline(texts, halves(200), rng=rng).suspicious


def test_the_same_generator_gives_the_same_verdict():
    texts = random_texts(np.random.default_rng(4), 100)
    first, second = (
        blind_baseline(texts, halves(50), rng=np.random.default_rng(5)) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_member": [True] * 20}, "2 <= folds <= 0"),
        (
            {"is_member": [True] * 3 + [False] * 17},
            "2 <= folds <= 3, the smaller side's size, got 5",
        ),
        ({"folds": 1}, "got 1"),
        ({"is_member": [True] * 19}, r"shape \(20,\), got \(19,\)"),
        ({"labels": ["a"] * 3}, "one label for each of 20 texts, got 3"),
        ({"confidence": 95}, "`confidence`"),
    ],
)
def test_bad_input_is_refused(change, message):
    rng = np.random.default_rng(6)
    arguments = {"texts": random_texts(rng, 20), "is_member": halves(10), "rng": rng} | change
    with pytest.raises(ValueError, match=message):
        blind_baseline(arguments.pop("texts"), arguments.pop("is_member"), **arguments)


@pytest.mark.parametrize("confidence", [5e-324, 1e-300, 1 - 2**-53])
def test_any_confidence_has_its_interval(confidence):
    is_member = np.arange(40) % 2 == 0
    texts = [f"say {number}" for number in range(40)]
    rng = np.random.default_rng(0)
    found = blind_baseline(texts, is_member, rng=rng, confidence=confidence)
    assert 0 <= found.interval[0] <= found.auc <= found.interval[1] <= 1


def test_texts_without_a_word_are_refused():
    for texts, said in (([""] * 20, "texts with words"), ([None] * 20, "sequence of strings")):
        with pytest.raises(ValueError, match=said):
            blind_baseline(texts, np.arange(20) % 2 == 0, rng=np.random.default_rng(0))
