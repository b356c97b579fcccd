"""Untargeted extraction: which values of a public list a model has seen, without any canary.

The attacker takes a list of values, names for example, and phrases of the kind that was trained on,
puts each value into each phrase, and ranks the values by how much likelier than usual the model
finds the label that says so. What he claims first is what he is surest of: the measure is the
precision of his first k claims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from attacks._validate import Bools, Floats, count, floats, open_unit, scores_and_members
from attacks.intervals import binomial_interval

# Of a sum of shares that is a whole number.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How many of the first k values had been trained on.

    Attributes:
        k: claims.
        hits: of these, right ones; with ties at the last place their mean, so it may be fractional.
        precision: hits / k.
        interval: its Clopper-Pearson interval, as if claims were independent; of fractional hits
            the lower limit is that of the next smaller number, the upper that of the next larger.
        chance: `precision` of a random order, the share of all values that had been trained on.
    """

    k: int
    hits: float
    precision: float
    interval: tuple[float, float]
    chance: float


def value_scores(losses: ArrayLike, reference_losses: ArrayLike | None = None) -> Floats:
    """Score values by their losses in common phrases; higher = more likely trained on.

    Every phrase counts the same: its losses are centred over the values, so that what is hard about
    the phrase itself does not count, and then averaged.

    Args:
        losses: `(V, C)`, of V values in C phrases.
        reference_losses: `(V, C)`, those of a model that never saw the data: what any model finds
            likely does not count. None: there is none, and common values will look as if they had
            been trained on.

    Returns:
        `(V,)`.

    Raises:
        ValueError: other shapes, NaN or infinities.
    """
    values = _finite("losses", losses)
    if reference_losses is not None:
        reference = _finite("reference_losses", reference_losses)
        if reference.shape != values.shape:
            raise ValueError(
                f"Expected `reference_losses` of shape {values.shape}, got {reference.shape}: ask "
                "both models for the same values in the same phrases."
            )
        values = values - reference
    scores: Floats = -(values - values.mean(axis=0)).mean(axis=1)
    return scores


def precision_at(
    scores: ArrayLike, was_trained_on: ArrayLike, *, ks: Sequence[int], confidence: float = 0.95
) -> tuple[Precision, ...]:
    """Measure how many of the highest scores belong to values that were trained on.

    Args:
        scores: `(V,)`, as `value_scores` returns them.
        was_trained_on: `(V,)`, the truth.
        ks: numbers of claims, each in [1, V].
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: values all of which were trained on, or none, or a number out of range.
    """
    values, truth = scores_and_members(scores, was_trained_on)
    confidence = open_unit("confidence", confidence)
    return tuple(_precision(values, truth, _claims(k, len(values)), confidence) for k in ks)


def _precision(values: Floats, truth: Bools, k: int, confidence: float) -> Precision:
    last = np.sort(values)[-k]
    sure, tied = values > last, values == last
    # Of values that tie at the last place any may be claimed.
    hits = float(truth[sure].sum() + (k - sure.sum()) * truth[tied].mean())
    down, up = math.floor(hits + _ROUNDING), math.ceil(hits - _ROUNDING)
    return Precision(
        k=k,
        hits=hits,
        precision=hits / k,
        interval=(
            binomial_interval(down, k, confidence=confidence)[0],
            binomial_interval(up, k, confidence=confidence)[1],
        ),
        chance=float(truth.mean()),
    )


def _claims(k: int, most: int) -> int:
    if count("k", k, least=1) > most:
        raise ValueError(f"Expected k in [1, {most}], got {k}: there are no more values to claim.")
    return k


def _finite(name: str, losses: ArrayLike) -> Floats:
    values = floats(name, losses, dimensions=2)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"Expected `{name}` as finite numbers (V, C), got shape {values.shape} with "
            f"{int((~np.isfinite(values)).sum())} that are not: leave out what the model cannot "
            "read."
        )
    return values
