"""Clipped sums out of per-example gradients: norms, coefficients, one weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpnlu.clipping import CLIPPING_RULES
from dpnlu.gradients import Gradients, GramCache, squared_norms
from dpnlu.plan import PrivacyPlan

# Parameter -> its uses, whose gradients add up.
Parts = Mapping[nn.Parameter, Sequence[Gradients]]


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


def gradient_norms(parts: Parts, losses: Tensor) -> Tensor:
    """(B,) norms of the gradients of all parameters together."""
    grams = GramCache()
    with full_precision(losses.device):
        squares = [squared_norms(uses, grams) for uses in parts.values() if uses]
        return sum(squares, losses.new_zeros(len(losses))).sqrt()


def weighted_sum(uses: Sequence[Gradients], weights: Tensor, like: Tensor) -> Tensor:
    """Σ_i weights[i] · gradient i, in the shape of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.zeros(like.shape, dtype=dtype, device=like.device)
    for use in uses:
        use.add_weighted_sum(weights, total)
    return total


def add_clipped(
    parts: Parts,
    norms: Tensor,
    losses: Tensor,
    plan: PrivacyPlan,
    *,
    into: Mapping[nn.Parameter, Tensor],
    scale: float,
) -> Clipped:
    """Clip each example's whole gradient, of all parameters together, and add them up.

    Args:
        norms: (B,) of these gradients.
        into: parameter -> the sum that is added to, in place.
        scale: of all that is added.
    """
    with full_precision(losses.device):
        finite = torch.isfinite(norms) & torch.isfinite(losses)
        coefficients = CLIPPING_RULES[plan.clipping](norms, plan.max_grad_norm) * scale
        clipped = Clipped(norms, finite)
        if clipped.non_finite:
            coefficients = torch.where(finite, coefficients, 0.0)
            parts = {
                parameter: [use.finite_rows(finite) for use in uses]
                for parameter, uses in parts.items()
            }
        for parameter, uses in parts.items():
            for use in uses:
                use.add_weighted_sum(coefficients, into[parameter])
    return clipped


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, under which norms would be those of rounded products."""
    with ExitStack() as stack:
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
