"""Clipped sums out of per-example gradients: norms, coefficients, one weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients.forms import (
    Gradients,
    GramCache,
    SquaredNorms,
)
from dpnlu.gradients.rounding import full_precision, growth, underflow
from dpnlu.gradients.uses import norms_written_out, squared_norms
from dpnlu.mechanism.clipping import CLIPPING_RULES
from dpnlu.mechanism.plan import PrivacyPlan

# Parameter -> its uses, whose gradients add up.
Parts = Mapping[Tensor, Sequence[Gradients]]
_Rule = Callable[[Tensor, float], Tensor]

# What rounding may cost an example of its coefficient before its norm is taken more exactly.
_LOOSE = 0.01


@dataclass(frozen=True)
class Clipped:
    """What became of the clipping units of one call. Private: never log it.

    Attributes:
        norms: (U,) gradient norms before clipping.
        finite: (U,) bool; units that are not were left out.
    """

    norms: Tensor
    finite: Tensor

    @classmethod
    def nothing(cls, losses: Tensor) -> Clipped:
        """Of a batch without examples."""
        return cls(losses.new_zeros(0), losses.new_zeros(0, dtype=torch.bool))

    @property
    def non_finite(self) -> int:
        """How many units were left out."""
        return len(self.finite) - int(self.finite.sum())

    def first(self, count: int) -> Clipped:
        """The same of the first units alone."""
        return Clipped(self.norms[:count], self.finite[:count])


def gradient_norms(parts: Parts, losses: Tensor) -> SquaredNorms:
    """(B,) squared norms of the gradients of all parameters together."""
    grams = GramCache()
    with full_precision(losses.device):
        found = [squared_norms(uses, grams) for uses in parts.values() if uses]
        return _added(found, losses.new_zeros(len(losses)))


def _added(found: Sequence[SquaredNorms], zeros: Tensor) -> SquaredNorms:
    """Of several tensors together."""
    total = SquaredNorms(zeros, zeros)
    for norms in found:
        total += norms
    dtype = total.values.dtype
    # This sum is rounded too; what underflow leaves is far below any bound that makes sense.
    lost = growth(len(found) + 8, dtype) * total.values + 16 * underflow(dtype)
    return SquaredNorms(total.values, total.slack + lost)


def weighted_sum(uses: Sequence[Gradients], weights: Tensor, like: Tensor) -> Tensor:
    """Σ_i weights[i] · gradient i, in the shape of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.zeros(like.shape, dtype=dtype, device=like.device)
    for use in uses:
        use.add_weighted_sum(weights, total)
    return total


def add_clipped(
    parts: Parts,
    norms: SquaredNorms,
    losses: Tensor,
    plan: PrivacyPlan,
    *,
    into: Mapping[Any, Tensor],
    scale: float,
) -> Clipped:
    """Clip each example's whole gradient, of all parameters together, and add them up.

    Guarantee: coefficient times gradient, as the factors of `parts` define it, has norm at most
    `plan.max_grad_norm` (1 + 1e-5), whatever was lost to rounding in the norms; for clipping takes
    upper bounds of them.

    Args:
        norms: (B,) of these gradients.
        into: parameter -> the sum that is added to, in place.
        scale: of all that is added.
    """
    with full_precision(losses.device):
        clipped = Clipped(
            norms.values.sqrt(), torch.isfinite(norms.values) & torch.isfinite(losses)
        )
        coefficients = scale * _coefficients(parts, norms, clipped, plan)
        if clipped.non_finite:
            coefficients = torch.where(clipped.finite, coefficients, 0.0)
            parts = {
                parameter: [use.finite_rows(clipped.finite) for use in uses]
                for parameter, uses in parts.items()
            }
        for parameter, uses in parts.items():
            for use in uses:
                use.add_weighted_sum(coefficients, into[parameter])
    return clipped


def _coefficients(parts: Parts, norms: SquaredNorms, clipped: Clipped, plan: PrivacyPlan) -> Tensor:
    """(B,) clip coefficients for upper bounds of the norms.

    Where the bound is so far above the norm that it costs the example more than a percent of its
    coefficient, its gradient is written out, for a closer one.
    """
    rule, bound = CLIPPING_RULES[plan.clipping], plan.max_grad_norm
    coefficients = rule(_upper(norms), bound)
    is_loose = coefficients < (1 - _LOOSE) * rule(clipped.norms, bound)
    examples = (is_loose & clipped.finite).nonzero()[:, 0]
    if len(examples):
        found = [norms_written_out(uses, examples) for uses in parts.values() if uses]
        closer = _added(found, norms.values.new_zeros(len(examples)))
        coefficients[examples] = rule(_upper(closer), bound)
    return coefficients


def _upper(norms: SquaredNorms) -> Tensor:
    """(B,) norms that are not exceeded."""
    return (norms.values + norms.slack).sqrt()
