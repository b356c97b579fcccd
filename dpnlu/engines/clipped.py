"""Clipping of per-example gradients: norms and coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dpnlu.engines.outcome import ClipOutcome, WeightedGradients
from dpnlu.gradients.forms import Gradients, SquaredNorms
from dpnlu.gradients.rounding import full_precision
from dpnlu.gradients.together import added, norms_of_all
from dpnlu.gradients.uses import norms_written_out
from dpnlu.mechanism.clipping import CLIPPING_RULES
from dpnlu.mechanism.plan import PrivacyPlan

# Parameter -> its uses, whose gradients add up.
Parts = Mapping[Tensor, Sequence[Gradients]]
_Rule = Callable[[Tensor, float], Tensor]

# What rounding may cost an example of its coefficient before its norm is taken more exactly.
_LOOSE = 0.01


def gradient_norms(parts: Parts, losses: Tensor) -> SquaredNorms:
    """(B,) squared norms of the gradients of all parameters together."""
    with full_precision(losses.device):
        return norms_of_all([uses for uses in parts.values() if uses], losses.detach())


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
        finite, coefficients = _decided(parts, norms, losses, plan)
        if not bool(finite.all()):
            kept = finite.to(losses.device)
            parts = {
                parameter: [use.finite_rows(kept) for use in uses]
                for parameter, uses in parts.items()
            }
        weighted = WeightedGradients(parts, coefficients.to(norms.values))
    return ClipOutcome(norms.values.sqrt(), finite, weighted)


def _decided(
    parts: Parts, norms: SquaredNorms, losses: Tensor, plan: PrivacyPlan
) -> tuple[Tensor, Tensor]:
    """(B,) which gradients are finite, and clip coefficients for upper bounds of their norms, 0
    for the others; on the CPU, which waits for the device only once.

    Where the bound is so far above the norm that it costs the example more than a percent of its
    coefficient, its gradient is written out, for a closer one.
    """
    rule, bound = CLIPPING_RULES[plan.clipping], plan.max_grad_norm
    rows = torch.stack((norms.values, losses.detach(), norms.slack)).cpu()
    finite = torch.isfinite(rows[:2]).all(0)
    values, slack = rows[0], rows[2]
    ideal, coefficients = rule(torch.stack((values, values + slack)).sqrt_(), bound)
    loose = (coefficients < (1 - _LOOSE) * ideal) & finite
    if bool(loose.any()):
        examples = loose.nonzero()[:, 0].to(norms.values.device)
        found = [norms_written_out(uses, examples) for uses in parts.values() if uses]
        closer = added(found, norms.values[examples])
        coefficients[loose] = rule(_upper(closer), bound).to(coefficients)
    return finite, torch.where(finite, coefficients, 0.0)


def _upper(norms: SquaredNorms) -> Tensor:
    """(B,) norms that are not exceeded."""
    return (norms.values + norms.slack).sqrt()
