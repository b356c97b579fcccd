"""What a clipping rule is.

A rule bounds what one clipping unit, an example, a micro-batch or a user, can contribute:
parameters are divided into groups, each with a share of the bound, and the part of a unit's
gradient that lies in a group is multiplied by a coefficient before it enters the sum.

Guarantee, of every rule: coefficient * norm <= share * bound in every group, up to one rounding,
for every norm >= 0; and the squares of the shares add up to 1. So the whole of a unit has norm at
most the bound C, from which `PrivacyPlan.sensitivity_under` follows for each adjacency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the rules need tensors, but nothing of torch itself
    from torch import Tensor

# Norms >= 0 and bounds > 0, of shapes that broadcast -> coefficients >= 0.
Coefficients = Callable[["Tensor", "float | Tensor"], "Tensor"]


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together.

    Attributes:
        names: of the parameters.
        share: of the bound, in (0, 1].
    """

    names: tuple[str, ...]
    share: float


# Trained parameters by name, and groups of names as the plan lists them -> groups.
Division = Callable[[Mapping[str, "Tensor"], "Sequence[Sequence[str]] | None"], list[Group]]


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """How a rule has its bound follow the gradients, by a noisy count of those it leaves unclipped.

    Attributes:
        quantile: the share of units that should not be clipped, in (0, 1).
        rate: how fast the bound follows, > 0.
        budget: the share of 1 / noise_multiplier² that the count costs, in (0, 1).
    """

    quantile: float
    rate: float
    budget: float

    def sum_factor(self) -> float:
        """By how much more noise the sum gets than if there were no count."""
        return 1 / math.sqrt(1 - self.budget)

    def count_std(self, noise_multiplier: float, *, sensitivity: float) -> float:
        """Standard deviation of the noise on the count.

        Guarantee: sum and count together are one Gaussian release with `noise_multiplier`, whose
        squared inverse is the sum of theirs (Andrew et al. 2021, theorem 1).

        Args:
            noise_multiplier: of both together.
            sensitivity: how far one unit can move the count.
        """
        return sensitivity * noise_multiplier / math.sqrt(self.budget)

    def next_bound(self, bound: float, unclipped: float) -> float:
        """The bound after a release: lower where more than the quantile are unclipped.

        Args:
            unclipped: share of the units that the bound did not clip; noisy, so of any value.
        """
        return bound * math.exp(-self.rate * (min(max(unclipped, 0.0), 1.0) - self.quantile))


def undivided(
    parameters: Mapping[str, Tensor], listed: Sequence[Sequence[str]] | None
) -> list[Group]:
    """All parameters together."""
    return [Group(tuple(parameters), 1.0)]


@dataclass(frozen=True, kw_only=True)
class ClippingRule:
    """How gradients are bounded.

    Attributes:
        coefficients: for norms and bounds.
        divide: parameters into groups.
        adaptation: of the bound, by what is released; None: it stays, or public examples tell it.
        public_quantile: of the norms of public examples' gradients, which is the bound of the next
            step; None: public examples do not tell it.
        takes_groups: whether the plan lists the groups.
    """

    coefficients: Coefficients
    divide: Division = undivided
    adaptation: Adaptation | None = None
    public_quantile: float | None = None
    takes_groups: bool = False


def number(text: str, *, low: float, high: float = math.inf) -> float:
    """The number that a text says.

    Raises:
        ValueError: it is none, or not between the limits, which are excluded.
    """
    value = float(text)
    if not low < value < high:
        raise ValueError
    return value
