"""What clipping a physical batch comes to: norms, and a sum that waits to be added to a buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.rounding import full_precision
from dpnlu.gradients.together import add_weighted_sums


class ClippedSum(Protocol):
    """A sum of clipped gradients, each at most `max_grad_norm` long."""

    def add_to(self, buffers: Mapping[Any, Tensor], *, scale: float) -> None:
        """Add scale times the sum, in place.

        Args:
            buffers: parameter -> what is added to.
        """


@dataclass(frozen=True)
class ClipOutcome:
    """What became of the clipping units of one call. Private: never log it.

    Attributes:
        norms: (U,) gradient norms before clipping.
        finite: (U,) bool, on the CPU; units that are not were left out.
        total: the sum of their clipped gradients; None: there are none.
        unclipped: (U,) bool, on the CPU, which of them the bound left as they are; None: the
            clipping rule does not ask.
    """

    norms: Tensor
    finite: Tensor
    total: ClippedSum | None
    unclipped: Tensor | None = None

    @classmethod
    def nothing(cls, losses: Tensor) -> ClipOutcome:
        """Of a call that completes no clipping unit."""
        return cls(losses.new_zeros(0), losses.new_zeros(0, dtype=torch.bool), None)

    @property
    def non_finite(self) -> int:
        """How many units were left out."""
        return len(self.finite) - int(self.finite.sum())

    def first(self, count: int | None) -> ClipOutcome:
        """The same without the units after the first `count`, which add nothing."""
        unclipped = None if self.unclipped is None else self.unclipped[:count]
        return ClipOutcome(self.norms[:count], self.finite[:count], self.total, unclipped)


def buffer_like(parameter: Tensor) -> Tensor:
    """Memory for a sum of gradients, not filled; contiguous, in float32 at least."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)


@dataclass(frozen=True)
class WeightedGradients:
    """Σ_i coefficients[i] · gradient i, in the form in which the gradients were found.

    Attributes:
        parts: parameter -> its uses, whose gradients add up; finite where the coefficient is 0.
        coefficients: (B,).
    """

    parts: Mapping[Tensor, Sequence[Gradients]]
    coefficients: Tensor

    def add_to(self, buffers: Mapping[Any, Tensor], *, scale: float) -> None:
        with full_precision(self.coefficients.device):
            pairs = [(use, buffers[p]) for p, uses in self.parts.items() for use in uses]
            add_weighted_sums(pairs, scale * self.coefficients)


@dataclass(frozen=True)
class WrittenOut:
    """A coefficient times tensors of the parameters' shapes.

    Attributes:
        values: parameter -> tensor.
    """

    values: Mapping[Any, Tensor]
    coefficient: float = 1.0

    def add_to(self, buffers: Mapping[Any, Tensor], *, scale: float) -> None:
        into = [buffers[parameter] for parameter in self.values]
        torch._foreach_add_(into, list(self.values.values()), alpha=scale * self.coefficient)


@dataclass(frozen=True)
class Together:
    """Several sums, each of some of the parameters."""

    sums: Sequence[ClippedSum]

    def add_to(self, buffers: Mapping[Any, Tensor], *, scale: float) -> None:
        for one in self.sums:
            one.add_to(buffers, scale=scale)


@dataclass
class OpenUnit:
    """The gradient of a clipping unit that is larger than a physical batch, as far as computed.

    Attributes:
        sums: of the gradients so far, parameter by parameter; none at all before the first.
        size: number of examples so far.
    """

    sums: list[Tensor] = field(default_factory=list)
    size: int = 0

    def emptied(self) -> tuple[list[Tensor], int]:
        """Sums and size; the next unit begins with none."""
        found = self.sums, self.size
        self.sums, self.size = [], 0
        return found
