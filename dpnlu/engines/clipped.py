"""Clipping of per-example gradients: norms and coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dpnlu.engines.outcome import ClipOutcome, WeightedGradients
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


def clip_gradients(
    parts: Parts, norms: SquaredNorms, losses: Tensor, plan: PrivacyPlan
) -> ClipOutcome:
    """Clip each example's whole gradient, of all parameters together.

    Guarantee: coefficient times gradient, as the factors of `parts` define it, has norm at most
    `plan.max_grad_norm` (1 + 1e-5), whatever was lost to rounding in the norms; for clipping takes
    upper bounds of them.

    Args:
        norms: (B,) of these gradients.
    """
    with full_precision(losses.device):
        lengths = norms.values.sqrt()
        finite = torch.isfinite(norms.values) & torch.isfinite(losses)
        coefficients = _coefficients(parts, norms, lengths, finite, plan)
        if not bool(finite.all()):
            coefficients = torch.where(finite, coefficients, 0.0)
            parts = {
                parameter: [use.finite_rows(finite) for use in uses]
                for parameter, uses in parts.items()
            }
    return ClipOutcome(lengths, finite, WeightedGradients(parts, coefficients))


def _coefficients(
    parts: Parts, norms: SquaredNorms, lengths: Tensor, finite: Tensor, plan: PrivacyPlan
) -> Tensor:
    """(B,) clip coefficients for upper bounds of the norms.

    Where the bound is so far above the norm that it costs the example more than a percent of its
    coefficient, its gradient is written out, for a closer one.
    """
    rule, bound = CLIPPING_RULES[plan.clipping], plan.max_grad_norm
    coefficients = rule(_upper(norms), bound)
    is_loose = coefficients < (1 - _LOOSE) * rule(lengths, bound)
    examples = (is_loose & finite).nonzero()[:, 0]
    if len(examples):
        found = [norms_written_out(uses, examples) for uses in parts.values() if uses]
        closer = _added(found, norms.values.new_zeros(len(examples)))
        coefficients[examples] = rule(_upper(closer), bound)
    return coefficients


def _upper(norms: SquaredNorms) -> Tensor:
    """(B,) norms that are not exceeded."""
    return (norms.values + norms.slack).sqrt()
