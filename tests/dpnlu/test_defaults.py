"""Recommended recipes: what is asked for is taken, or refused, and never passed over."""

from dataclasses import replace

import pytest

from dpnlu.nlu.classifier import Architecture
from dpnlu.runs import recipes as defaults

NAMES = ["lstm", "encoder:somewhere"]
KINDS = pytest.mark.parametrize("private", [True, False], ids=["private", "ordinary"])


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_for_takes_the_place_of_what_is_recommended(name: str, private: bool) -> None:
    recommended = defaults.recipe(name, private=private, epochs=None, batch_size=None)
    assert recommended.epochs >= 5
    asked = defaults.recipe(name, private=private, epochs=0.5, batch_size=7)
    assert asked.epochs == 0.5
    assert asked.batch_size == (7 if private else recommended.batch_size)
    assert asked.learning_rate == recommended.learning_rate


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_zero_is_not_nothing(name: str, private: bool) -> None:
    with pytest.raises(ValueError, match="`epochs`"):
        defaults.recipe(name, private=private, epochs=0, batch_size=None)
    with pytest.raises(ValueError, match="`batch_size`"):
        defaults.recipe(name, private=private, epochs=None, batch_size=0)


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_first_recommendations_are_kept(name: str, private: bool) -> None:
    """What an earlier version began goes on as it was: model, batch size and steps."""
    found = defaults.architecture(name, private=private, edition=1)
    assert found == Architecture(
        name=name,
        dropout=0.0 if private else 0.5 if name == "lstm" else 0.1,
        freeze_encoder=private and name != "lstm",
    )
    first = defaults.recipe(name, private=private, epochs=None, batch_size=None, edition=1)
    sizes = {"lstm": (64, 512), "encoder:somewhere": (32, 2048)}
    assert first.batch_size == sizes[name][private]
    latest = defaults.architecture(name, private=private)
    assert latest.slot_loss == "chain" and found.slot_loss == "words"
    assert latest.word_window == (1 if private and name == "lstm" else None)
    assert defaults.architecture(name, private=private, slot_loss="words").slot_loss == "words"


def test_the_second_recommendations_are_kept() -> None:
    """… of the private BiLSTM, which alone have changed since."""
    found = defaults.architecture("lstm", private=True, edition=2)
    assert found == Architecture(name="lstm", slot_loss="chain")
    second = defaults.recipe("lstm", private=True, epochs=None, batch_size=None, edition=2)
    assert (second.epochs, second.batch_size) == (15, 1024)
    for name, private in (("lstm", False), ("encoder:somewhere", True)):
        later = defaults.architecture(name, private=private, edition=5)
        assert defaults.architecture(name, private=private, edition=2) == later


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_third_and_fourth_recommendations_are_kept(name: str, private: bool) -> None:
    """The fourth changed the private BiLSTM with few texts, the fifth private heads alone."""
    wanted = {"private": private, "epochs": None, "batch_size": None}
    third, fourth, fifth = (
        defaults.recipe(name, **wanted, units=500, edition=edition) for edition in (3, 4, 5)
    )
    for edition in (3, 4):
        found = defaults.architecture(name, private=private, edition=edition)
        assert found == defaults.architecture(name, private=private, edition=5)
    assert third == defaults.recipe(name, **wanted, edition=3)
    assert (fourth == third) != (private and name == "lstm")
    assert (fifth == fourth) != (private and name != "lstm")
    if private and name != "lstm":
        assert (fourth.epochs, fourth.learning_rate) == (20, 1e-2)
        assert (fifth.epochs, fifth.learning_rate) == (40, 5e-3)


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_fifth_recommendations_are_kept(name: str, private: bool) -> None:
    """The sixth lets private heads alone read means over words, and intents begin with names."""
    fifth, latest = (
        defaults.architecture(name, private=private, edition=edition) for edition in (5, 6)
    )
    assert latest == defaults.architecture(name, private=private)
    heads_alone = private and name != "lstm"
    assert latest == replace(fifth, reads_intent_names=heads_alone, reads_word_means=heads_alone)
    wanted = {"private": private, "epochs": None, "batch_size": None, "units": 500}
    assert defaults.recipe(name, **wanted, edition=5) == defaults.recipe(name, **wanted)


@pytest.mark.parametrize("units", [1, 3, 20, 500, 4095, 4096, 5000, 13_084, 10**6])
def test_few_texts_get_as_many_steps_as_many(units: int) -> None:
    found = defaults.recipe("lstm", private=True, epochs=None, batch_size=None, units=units)
    assert found.batch_size == max(1, min(1024, units // 4))
    steps = found.epochs * units / found.batch_size
    assert steps >= 383 - 1e-9 and (found.epochs == 30 or steps == pytest.approx(383))


def test_of_few_texts_what_is_asked_for_is_taken() -> None:
    few = {"private": True, "units": 500}
    assert defaults.recipe("lstm", epochs=3, batch_size=None, **few).epochs == 3
    asked = defaults.recipe("lstm", epochs=None, batch_size=400, **few)
    assert asked.batch_size == 400 and asked.epochs == pytest.approx(383 * 400 / 500)
    zero = {"epochs": None, "batch_size": 0} | few
    with pytest.raises(ValueError, match="`batch_size`"):
        defaults.recipe("lstm", **zero)


def test_other_recommendations_are_refused() -> None:
    with pytest.raises(ValueError, match="`recipes` to be one of 1, 2, 3, 4, 5, 6, got 7"):
        defaults.architecture("lstm", private=True, edition=7)
    with pytest.raises(ValueError, match="`recipes` to be one of 1, 2, 3, 4, 5, 6, got 0"):
        defaults.recipe("lstm", private=True, epochs=None, batch_size=None, edition=0)
