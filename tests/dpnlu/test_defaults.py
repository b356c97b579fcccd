"""Recommended recipes: what is asked for is taken, or refused, and never passed over."""

import pytest

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
