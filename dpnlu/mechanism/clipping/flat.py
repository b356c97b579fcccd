"""Flat clipping: what is longer than the bound is scaled down to it (Abadi et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpnlu.mechanism.clipping.rule import ClippingRule

if TYPE_CHECKING:
    from torch import Tensor


def flat(norms: Tensor, bounds: float | Tensor) -> Tensor:
    """Coefficients that scale down what is longer than the bound.

    Guarantee: coefficient * norm <= bound, up to one rounding, for every norm >= 0, including 0
    and infinity (whose coefficient is 0).

    Args:
        norms: (…, B) norms of the units' gradients, >= 0.
        bounds: C > 0, of a shape that broadcasts.

    Returns:
        (…, B) coefficients in [0, 1].
    """
    return bounds / norms.clamp(min=bounds)


def make(values: Sequence[str]) -> ClippingRule:
    """The rule `flat`."""
    if values:
        raise ValueError
    return ClippingRule(coefficients=flat)
