"""Rounded outputs: what is left of a model's answers where it gives probabilities to few decimals.

A defence against those who only see answers. Whoever has the weights computes all decimals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attacks._validate import count
from attacks.signals import Predictions

# Of float64: more are no rounding.
MOST_DECIMALS = 15


def rounded(predictions: Predictions, *, decimals: int) -> Predictions:
    """The same predictions, their probabilities rounded.

    What was rounded to 0 is read as half a unit of the last decimal, the middle of what may have
    been there.

    Args:
        decimals: in [0, 15].

    Returns:
        Logits in float64, on the CPU, whose softmax are the rounded probabilities, scaled to sum to
        one; the labels, on the CPU.

    Raises:
        ValueError: decimals out of range.
    """
    check_decimals(decimals)
    return Predictions(
        intent_logits=_rounded(predictions.intent_logits, decimals),
        intents=None if predictions.intents is None else predictions.intents.cpu(),
        tag_logits=_rounded(predictions.tag_logits, decimals),
        tags=None if predictions.tags is None else predictions.tags.cpu(),
    )


def check_decimals(decimals: int) -> int:
    """Return the number of decimals, or raise ValueError unless it is in [0, 15]."""
    if count("decimals", decimals) > MOST_DECIMALS:
        raise ValueError(
            f"Expected at most {MOST_DECIMALS} decimals, got {decimals}: float64 has no more, so "
            "leave out the rounding."
        )
    return decimals


def _rounded(logits: Tensor | None, decimals: int) -> Tensor | None:
    """(…, K) logits -> the logarithms of rounded probabilities."""
    if logits is None:
        return None
    # On the CPU, as not every device has float64.
    probabilities = torch.round(logits.detach().cpu().double().softmax(-1), decimals=decimals)
    return probabilities.clamp(min=0.5 * 10.0**-decimals).log()
