"""Whether the gradients that the tape finds are those of automatic differentiation.

A random weighted sum of all examples' gradients is compared with the gradient of the same weighted
losses, and the norms of some examples with those of gradients that are written out. This finds our
own mistakes. The guarantee does not rest on it, as an example's contribution is clipped by its own
norm whatever it is. That every use was seen (`dpnlu.engines.coverage`) and that examples are kept
apart (`dpnlu.engines.separation`) are questions of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpnlu.engines.clipped import Parts, weighted_sum
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Gradients, SquaredNorms
from dpnlu.gradients.rounding import full_precision, growth
from dpnlu.gradients.trace import back_propagate

# Error of a sum of gradients that passes as rounding inside an operation, relative to the sum of
# the norms of all its terms.
_TOLERANCE = 1e-4
# How many examples have their norms compared.
_NORMS = 3


@dataclass(frozen=True)
class Evidence:
    """What was compared on one batch.

    Attributes:
        is_finite: () whether all of it is finite. Infinities prove nothing: plain automatic
            differentiation spreads them over all examples.
        errors: (P,) of each parameter, the distance between the two gradients of a weighted sum of
            the losses.
        tolerances: (P,) what passes as rounding.
        norms: (n,) squared norms of some examples' gradients, as they are taken for clipping.
        slack: (n,) how far these may be off.
        written_out: (n,) the squared norms of those gradients written out.
    """

    is_finite: Tensor
    errors: Tensor
    tolerances: Tensor
    norms: Tensor
    slack: Tensor
    written_out: Tensor

    def proves(self, names: Sequence[str]) -> bool:
        """Whether the batch shows the gradients to be right.

        Args:
            names: of the parameters, in the order of `errors`.

        Returns:
            False where the batch shows neither that nor the opposite.

        Raises:
            UnsupportedLayerError: they are wrong.
        """
        if not bool(self.is_finite):
            return False
        excess = self.errors - self.tolerances
        if not bool((excess <= 0).all()):
            raise UnsupportedLayerError(
                f"Expected the gradient of {names[int(excess.argmax())]} that automatic "
                "differentiation finds, got another: a defect of dpnlu. Use engine='per_example', "
                "and report the model's layers."
            )
        off = (self.norms - self.written_out).abs() - self.slack
        if not bool((off <= 0).all()):
            norm, right = (
                float(values[int(off.argmax())]) ** 0.5 for values in (self.norms, self.written_out)
            )
            raise UnsupportedLayerError(
                f"Expected the norm {right:g} of an example's gradient, got {norm:g}: a defect of "
                "dpnlu. Use engine='per_example', and report the model's layers."
            )
        return True


def gather(
    parts: Parts,
    norms: SquaredNorms,
    losses: Tensor,
    draws: Tensor,
    *,
    arrived: Sequence[Tensor | None],
    bound: float,
) -> Evidence:
    """Compare with plain automatic differentiation, which needs the graph of the losses and frees
    it.

    Nothing here looks at a value, so that it can be traced.

    Args:
        parts: the per-example gradients of all parameters, and `norms` theirs.
        losses: (B,), B >= 1.
        draws: (B,) random numbers in (0, 1), for the signs of weights and for the examples whose
            norms are compared.
        arrived: what the gradients were made of.
        bound: on the norm of an example's gradient; longer ones count as if they were so long.
    """
    lengths = norms.values.detach().sqrt().clamp(min=bound)
    signs = torch.where(draws < 0.5, -1.0, 1.0)
    weights = (signs * torch.exp2(-torch.log2(lengths).round())).to(losses)
    expected = back_propagate((losses * weights).sum(), list(parts), retain_graph=False)
    coarsest = max((torch.finfo(g.dtype).eps for g in arrived if g is not None), default=0.0)
    errors, tolerances = [], []
    with full_precision(losses.device):
        # What cancels inside one parameter's gradient is of the size of others'.
        lost = 1e3 * torch.finfo(losses.dtype).eps + 4 * coarsest
        size = lost * (weights.abs() * norms.values.sqrt()).sum()
        for (parameter, uses), right in zip(parts.items(), expected, strict=True):
            errors.append(_distance(weighted_sum(uses, weights, parameter), right))
            tolerances.append(size + _tolerance(uses, weights, errors[-1], coarsest))
        counts = torch.isfinite(norms.values) & (norms.values > 0)
        chosen = torch.where(counts, 2 * draws % 1, 0).topk(min(_NORMS, len(losses))).indices
        written_out = [
            _square(parts, torch.arange(len(losses), device=one.device) == one) for one in chosen
        ]
    return Evidence(
        is_finite=torch.isfinite(norms.values).all() & torch.isfinite(losses).all(),
        errors=torch.stack(errors),
        tolerances=torch.stack(tolerances),
        norms=norms.values[chosen],
        slack=norms.slack[chosen] + _TOLERANCE * norms.values[chosen],
        written_out=torch.stack(written_out),
    )


def _square(parts: Parts, one: Tensor) -> Tensor:
    """() the squared norm of one example's gradient, written out; `one` is (B,)."""
    found = [
        weighted_sum(uses, one.to(_weight_dtype(parameter)), parameter).square().sum()
        for parameter, uses in parts.items()
    ]
    return torch.stack(found).sum()


def _weight_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _distance(found: Tensor, expected: Tensor | None) -> Tensor:
    distance: Tensor = (found if expected is None else found.sub_(expected)).norm()
    return distance


def _tolerance(uses: Sequence[Gradients], weights: Tensor, like: Tensor, coarsest: float) -> Tensor:
    """() what rounding may do to a parameter's gradient.

    Args:
        coarsest: distance from 1 to the next number, of the coarsest gradients that were used.
    """
    total = like.new_zeros(())
    for use in uses:
        share = _TOLERANCE + growth(len(weights) * (use.terms + 1), like.dtype) + 4 * coarsest
        total = total + share * (weights.abs() * use.sizes()).sum()
    return total
