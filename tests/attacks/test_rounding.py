"""Rounded outputs: what is seen is what the rounded probabilities say, and no more."""

import math

import pytest
import torch

from attacks.rounding import rounded
from attacks.signals import Predictions, collect


def _said(batch: int = 5) -> Predictions:
    torch.manual_seed(0)
    return Predictions(
        intent_logits=torch.randn(batch, 4) * 3,
        intents=torch.arange(batch) % 4,
        tag_logits=torch.randn(batch, 3, 5) * 3,
        tags=torch.randint(-1, 5, (batch, 3)),
    )


@pytest.mark.parametrize("decimals", [0, 1, 3])
def test_probabilities_are_those_that_are_shown(decimals: int) -> None:
    said = _said()
    seen = rounded(said, decimals=decimals)
    for before, after in (
        (said.intent_logits, seen.intent_logits),
        (said.tag_logits, seen.tag_logits),
    ):
        shown = [
            [round(p, decimals) for p in row]
            for row in before.double().softmax(-1).flatten(0, -2).tolist()
        ]
        for row, found in zip(shown, after.exp().flatten(0, -2).tolist(), strict=True):
            for value, probability in zip(row, found, strict=True):
                least = 0.5 * 10.0**-decimals
                assert probability == pytest.approx(max(value, least), rel=1e-9)


def test_many_decimals_change_next_to_nothing() -> None:
    said = _said()
    before = collect(torch.nn.Identity(), lambda _: said, [None])
    after = collect(torch.nn.Identity(), lambda _: rounded(said, decimals=12), [None])
    assert after.loss == pytest.approx(before.loss, abs=1e-6)


def test_what_is_shown_as_nought_is_finite() -> None:
    said = Predictions(intent_logits=torch.tensor([[100.0, 0.0]]), intents=torch.tensor([1]))
    seen = rounded(said, decimals=2)
    assert collect(torch.nn.Identity(), lambda _: seen, [None]).loss[0] == pytest.approx(
        -math.log(0.005 / 1.005)
    )
    assert seen.tag_logits is None and seen.tags is None


@pytest.mark.parametrize("decimals", [-1, 16, 1.5, None])
def test_decimals_out_of_range_are_refused(decimals: object) -> None:
    with pytest.raises(ValueError, match="decimals"):
        rounded(_said(), decimals=decimals)
