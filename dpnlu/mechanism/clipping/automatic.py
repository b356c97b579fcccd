"""Automatic clipping: every unit is scaled to nearly the bound (Bu et al. 2023, AUTO-S)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dpnlu.mechanism.clipping.rule import ClippingRule, number

if TYPE_CHECKING:
    from torch import Tensor

# γ of the paper; and a limit below which a coefficient would leave the range of float32.
_STABILITY, _SMALLEST = 0.01, 1e-8


def automatic(norms: Tensor, bounds: float | Tensor, stability: float = _STABILITY) -> Tensor:
    """Coefficients C / (norm + γ).

    Guarantee: coefficient * norm <= bound, up to one rounding, for every norm >= 0.

    Args:
        norms: (…, B) norms of the units' gradients, >= 0.
        bounds: C > 0; here only a scale, since the optimizer sees coefficients and noise grow
            together with it.
        stability: γ > 0; the larger, the less small gradients are scaled up.

    Returns:
        (…, B) coefficients >= 0, above 1 for norms below C - γ.
    """
    return bounds / (norms + stability)


def make(values: Sequence[str]) -> ClippingRule:
    """The rule `automatic`, or `automatic:γ`."""
    if not values:
        return ClippingRule(coefficients=automatic)
    (stability,) = values
    value = number(stability, low=_SMALLEST)
    return ClippingRule(coefficients=partial(automatic, stability=value))
