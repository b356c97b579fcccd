"""What every engine does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpnlu.engines.clipper import Clipper
from dpnlu.engines.outcome import ClipOutcome, OpenUnit


class Engine(Protocol):
    """Finds and clips gradients.

    Attributes:
        clipper: the plan's clipping rule for the model's parameters.
        counts_forward_passes: of each that keeps a graph the losses must be stepped on.
    """

    clipper: Clipper
    counts_forward_passes: bool

    def clip(
        self,
        losses: Tensor,
        *,
        kept: int | None = None,
        unit: OpenUnit | None = None,
        closes_unit: bool = True,
        users: Tensor | None = None,
    ) -> ClipOutcome:
        """Clip the gradients of some losses; what is added to a logical batch is in the outcome.

        Args:
            losses: (B,), each depending on its own example only, of all that were computed.
            kept: how many of them count, the first ones; the gradients of the others are left out.
                None: all of them.
            unit: what there is of the clipping unit that the examples belong to, where the plan
                clips more than an example at once; continued here, and emptied where it closes.
                None: they are a whole logical batch, and the engine forms the units.
            closes_unit: whether the clipping unit is complete with these examples.
            users: (B,) whose each example is, as numbers 0 … U - 1 that all occur; a clipping unit
                is then the mean loss of a user's examples. None: it is an example, or what `unit`
                says.
        """


def without_fillers(losses: Tensor, kept: int | None) -> Tensor:
    """The losses with constants, whose gradients are zero, in place of those that do not count."""
    if kept is None or kept == len(losses):
        return losses
    return torch.where(torch.arange(len(losses), device=losses.device) < kept, losses, 0.0)
