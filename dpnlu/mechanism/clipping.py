"""Clipping rules: norms (B,) -> coefficients (B,).

A rule bounds what one clipping unit, an example, a micro-batch or a user, can contribute: each
unit's gradient is multiplied by its coefficient before it enters the sum. A new rule is one
function here and one line in `CLIPPING_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the rules need tensors, but nothing of torch itself
    from torch import Tensor

# Stability constant of automatic clipping, as in Bu et al. (2023).
_AUTOMATIC_STABILITY = 0.01


def flat(norms: Tensor, max_grad_norm: float) -> Tensor:
    """Coefficients that scale down what is longer than the bound (Abadi et al. 2016).

    Guarantee: coefficient * norm <= max_grad_norm, up to one rounding, for every norm >= 0,
    including 0 and infinity (whose coefficient is 0).

    Args:
        norms: (B,) norms of the units' gradients, >= 0.
        max_grad_norm: the bound C > 0.

    Returns:
        (B,) coefficients in [0, 1].
    """
    return max_grad_norm / norms.clamp(min=max_grad_norm)


def automatic(norms: Tensor, max_grad_norm: float) -> Tensor:
    """Coefficients that scale every unit to nearly C: C / (norm + 0.01) (Bu et al. 2023, AUTO-S).

    Guarantee: coefficient * norm < max_grad_norm for every norm >= 0.

    Args:
        norms: (B,) norms of the units' gradients, >= 0.
        max_grad_norm: the bound C > 0; here only a scale, since the optimizer sees
            coefficients and noise grow together with it.

    Returns:
        (B,) coefficients >= 0, above 1 for norms below C.
    """
    return max_grad_norm / (norms + _AUTOMATIC_STABILITY)


CLIPPING_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "flat": flat,
    "automatic": automatic,
}
