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
from dpnlu.engines.inspection import TOLERANCE, Comparison
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import SquaredNorms
from dpnlu.gradients.rounding import full_precision

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


def scales(squares: Tensor, draws: Tensor, *, bound: float) -> Tensor:
    """(B,) random signs times powers of two, with which all examples count alike.

    Args:
        squares: (B,) squared norms of the examples' gradients, roughly.
        draws: (B,) random numbers in (0, 1).
        bound: shorter gradients count as if they were so long.
    """
    lengths = squares.detach().sqrt().clamp(min=bound)
    signs = torch.where(draws < 0.5, -1.0, 1.0)
    return (signs * torch.exp2(-torch.log2(lengths).round())).to(draws)


def gather(
    parts: Parts,
    norms: SquaredNorms,
    losses: Tensor,
    draws: Tensor,
    comparison: Comparison,
) -> Evidence:
    """What the comparison with plain automatic differentiation shows.

    Nothing here looks at a value, so that it can be traced.

    Args:
        parts: the per-example gradients of all parameters, and `norms` theirs.
        losses: (B,), B >= 1.
        draws: (B,) random numbers in (0, 1), for the examples whose norms are compared.
        comparison: of the gradients of a weighted sum.
    """
    with full_precision(losses.device):
        # What cancels inside one parameter's gradient is of the size of others'.
        lost = 1e3 * torch.finfo(losses.dtype).eps + 4 * comparison.coarsest
        size = lost * (comparison.weights.abs() * norms.values.sqrt()).sum()
        counts = torch.isfinite(norms.values) & (norms.values > 0)
        chosen = torch.where(counts, 2 * draws % 1, 0).topk(min(_NORMS, len(losses))).indices
        few = {p: [use.of(chosen) for use in uses] for p, uses in parts.items()}
        written_out = [_square(few, one) for one in torch.eye(len(chosen), device=chosen.device)]
    return Evidence(
        is_finite=torch.isfinite(norms.values).all() & torch.isfinite(losses).all(),
        errors=comparison.errors,
        tolerances=comparison.tolerances + size,
        norms=norms.values[chosen],
        slack=norms.slack[chosen] + TOLERANCE * norms.values[chosen],
        written_out=torch.stack(written_out),
    )


def _square(parts: Parts, one: Tensor) -> Tensor:
    """() the squared norm of one example's gradient, written out; `one` is (n,), 1 for it."""
    found = [
        weighted_sum(uses, one.to(_weight_dtype(parameter)), parameter).square().sum()
        for parameter, uses in parts.items()
    ]
    return torch.stack(found).sum()


def _weight_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
