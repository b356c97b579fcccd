"""Clipping of per-example gradients: norms and coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dpnlu.engines.clipper import Clipper
from dpnlu.engines.outcome import ClipOutcome, ClippedSum, Together, WeightedGradients
from dpnlu.gradients.forms import Gradients, SquaredNorms
from dpnlu.gradients.rounding import full_precision
from dpnlu.gradients.together import added, norms_of_all
from dpnlu.gradients.uses import norms_written_out

# Parameter -> its uses, whose gradients add up.
Parts = Mapping[Tensor, Sequence[Gradients]]

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
    parts: Parts,
    norms: SquaredNorms | None,
    losses: Tensor,
    clipper: Clipper,
    *,
    sums: Callable[[Tensor], ClippedSum] | None = None,
) -> ClipOutcome:
    """Clip each example's gradient, that of each group of parameters as a whole.

    Guarantee: coefficients times gradients, as the factors of `parts` define them, have norm at
    most `clipper.bound` (1 + 1e-5), whatever was lost to rounding in the norms; for clipping takes
    upper bounds of them.

    Args:
        norms: (B,) of these gradients, all parameters together; None: they are not known. They
            are taken anew where there are several groups.
        sums: (G, B) coefficients -> Σ coefficient · gradient of these gradients; asked where all
            are finite. None: it is made of `parts`.
    """
    with full_precision(losses.device):
        divided = clipper.divided(parts)
        if norms is None or clipper.is_divided:
            found = [gradient_norms(some, losses) for some in divided]
        else:
            found = [norms]
        finite, coefficients = _decided(divided, found, losses, clipper)
        lengths = torch.stack([one.values for one in found]).sum(0).sqrt()
        of_groups = coefficients.to(lengths)
        if sums is not None and bool(finite.all()):
            total = sums(of_groups)
        else:
            total = _summed(divided, of_groups, finite)
    return ClipOutcome(lengths, finite, total, clipper.unclipped(coefficients))


def _summed(divided: Sequence[Parts], coefficients: Tensor, finite: Tensor) -> ClippedSum:
    """The sum of the finite gradients, (B,) on the CPU, times their coefficients (G, B)."""
    kept = None if bool(finite.all()) else finite.to(coefficients.device)
    sums = [
        WeightedGradients(_finite_rows(some, kept), of_group)
        for some, of_group in zip(divided, coefficients, strict=True)
    ]
    return sums[0] if len(sums) == 1 else Together(sums)


def _finite_rows(parts: Parts, kept: Tensor | None) -> Parts:
    """The gradients with zeros in place of those that are not kept; None: all are."""
    if kept is None:
        return parts
    return {p: [use.finite_rows(kept) for use in uses] for p, uses in parts.items()}


def _decided(
    divided: Sequence[Parts], norms: Sequence[SquaredNorms], losses: Tensor, clipper: Clipper
) -> tuple[Tensor, Tensor]:
    """(B,) which gradients are finite, and (G, B) clip coefficients for upper bounds of their norms
    in each group, 0 for the others; on the CPU, which waits for the device only once.

    Where the bound is so far above the norm that it costs the example more than a percent of its
    coefficient, its gradient is written out, for a closer one.
    """
    groups = len(norms)
    columns = [one.values for one in norms] + [one.slack for one in norms]
    rows = torch.stack((*columns, losses.detach())).cpu()
    values, slack = rows[:groups], rows[groups:-1]
    finite = torch.isfinite(values).all(0) & torch.isfinite(rows[-1])
    ideal, coefficients = clipper.coefficients(torch.stack((values, values + slack)).sqrt_())
    loose = (coefficients < (1 - _LOOSE) * ideal) & finite
    for place in loose.any(1).nonzero()[:, 0].tolist():
        examples = loose[place].nonzero()[:, 0].to(norms[place].values.device)
        found = [norms_written_out(uses, examples) for uses in divided[place].values() if uses]
        closer = _upper(added(found, norms[place].values[examples]))
        coefficients[place, loose[place]] = clipper.of_group(place, closer).to(coefficients)
    return finite, torch.where(finite, coefficients, 0.0)


def _upper(norms: SquaredNorms) -> Tensor:
    """(B,) norms that are not exceeded."""
    return (norms.values + norms.slack).sqrt()
