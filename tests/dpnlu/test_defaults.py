"""Recommended recipes: what is asked for is taken, or refused, and never passed over."""

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
        latest = defaults.architecture(name, private=private)
        assert defaults.architecture(name, private=private, edition=2) == latest


def test_other_recommendations_are_refused() -> None:
    with pytest.raises(ValueError, match="`recipes` to be one of 1, 2, 3, got 4"):
        defaults.architecture("lstm", private=True, edition=4)
    with pytest.raises(ValueError, match="`recipes` to be one of 1, 2, 3, got 0"):
        defaults.recipe("lstm", private=True, epochs=None, batch_size=None, edition=0)
