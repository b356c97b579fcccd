"""The plan's clipping rule, for the parameters of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from dpnlu.engines.outcome import ClippedSum, Together, WrittenOut
from dpnlu.engines.plain import norm_of
from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.plan import PrivacyPlan

T = TypeVar("T")

# A coefficient of one, as a quotient of equal numbers may be rounded.
_ONE = 1 - 1e-6
# How far a bound that changes may go from where it began.
_FARTHEST = 1e6


class Clipper:
    """Coefficients for the gradients of groups of parameters.

    Guarantee: coefficients times gradients have, all groups together, norm at most `bound`, if the
    norms that are given are upper bounds.

    Attributes:
        groups: the parameters of each; every trained parameter is in one.
        bound: C; an adaptive rule, or public examples, change it between logical batches.
        adaptation: how it follows what is released; None: it does not.
        public_quantile: of the norms of public examples, which it becomes; None: it does not.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: PrivacyPlan) -> None:
        """Divide the trained parameters, by name, into groups.

        Raises:
            ValueError: the plan's groups miss or repeat one; see `dpnlu.mechanism.clipping`.
        """
        rule = clipping_rule(plan.clipping)
        groups = rule.divide(parameters, plan.clipping_groups)
        self.groups = [[parameters[name] for name in group.names] for group in groups]
        self.bound = plan.max_grad_norm
        self.adaptation = rule.adaptation
        self.public_quantile = rule.public_quantile
        self._limits = plan.max_grad_norm / _FARTHEST, plan.max_grad_norm * _FARTHEST
        self._coefficients = rule.coefficients
        self._shares = [group.share for group in groups]

    @classmethod
    def of(cls, model: nn.Module, plan: PrivacyPlan) -> Clipper:
        """For the trainable parameters of a model."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return cls(named, plan)

    @property
    def is_divided(self) -> bool:
        """Whether there are several groups."""
        return len(self.groups) > 1

    def within_limits(self, bound: float) -> float:
        """The bound, no farther than may be from the one of the plan."""
        lowest, highest = self._limits
        return min(max(bound, lowest), highest)

    @property
    def bounds(self) -> list[float]:
        """Of each group; the root of the sum of their squares is `bound`."""
        return [share * self.bound for share in self._shares]

    def coefficients(self, norms: Tensor) -> Tensor:
        """(…, G, B) upper bounds of norms in each group -> coefficients of the same shape."""
        if not self.is_divided:
            return self._coefficients(norms, self.bound)
        return self._coefficients(norms, norms.new_tensor(self.bounds)[:, None])

    def of_group(self, place: int, norms: Tensor) -> Tensor:
        """(B,) upper bounds of norms in one group -> coefficients."""
        return self._coefficients(norms, self.bounds[place])

    def unclipped(self, coefficients: Tensor) -> Tensor | None:
        """(G, B) coefficients -> (B,) which units are left as they are; None: nobody asks."""
        return None if self.adaptation is None else (coefficients >= _ONE).all(0)

    def divided(self, values: Mapping[Tensor, T]) -> list[Mapping[Tensor, T]]:
        """Parameter -> value, for each group."""
        if not self.is_divided:
            return [values]
        return [{p: values[p] for p in group if p in values} for group in self.groups]

    def norms_of(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """(G,) norms of a gradient that is written out, rounded up."""
        return torch.stack([norm_of(list(some.values())) for some in self.divided(gradients)])

    def clipped(
        self, gradients: Mapping[Tensor, Tensor], coefficients: Sequence[float]
    ) -> ClippedSum:
        """A gradient that is written out, times a coefficient for each group."""
        parts = zip(self.divided(gradients), coefficients, strict=True)
        return Together([WrittenOut(some, coefficient) for some, coefficient in parts])
