"""Per-example clipping by a loop over the examples: slow, for any differentiable model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpnlu.engines.clipper import Clipper
from dpnlu.engines.outcome import ClipOutcome, OpenUnit, WrittenOut, buffer_like
from dpnlu.engines.plain import gradient_of, nothing_accumulated
from dpnlu.engines.user_gradients import user_losses
from dpnlu.mechanism.plan import PrivacyPlan


class PerExample:
    """One backward pass per example: slow, and right by construction.

    Examples that are not finite may spread through the computations that a batch shares. As it
    cannot tell whom they spoilt, this engine stops at a batch of several where that happened.
    """

    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self.clipper = Clipper.of(model, plan)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def clip(
        self,
        losses: Tensor,
        *,
        kept: int | None = None,
        unit: OpenUnit | None = None,
        closes_unit: bool = True,
        users: Tensor | None = None,
    ) -> ClipOutcome:
        losses = losses[:kept]
        if users is not None:
            losses = user_losses(losses, users)
        if not len(losses):
            return ClipOutcome.nothing(losses)
        sums = {parameter: buffer_like(parameter).zero_() for parameter in self._parameters}
        is_alone = len(losses) == 1
        found = [self._clip_one(loss, sums, is_alone=is_alone) for loss in losses]
        norms, coefficients = (torch.stack(each) for each in zip(*found, strict=True))
        finite = torch.isfinite(norms) & torch.isfinite(losses)
        return ClipOutcome(
            norms, finite, WrittenOut(sums), self.clipper.unclipped(coefficients.T.cpu())
        )

    def _clip_one(
        self, loss: Tensor, sums: dict[nn.Parameter, Tensor], *, is_alone: bool
    ) -> tuple[Tensor, Tensor]:
        """Add the clipped gradient of one example to the sums; returned are its norm, (), and its
        coefficient in each group, (G,)."""
        with nothing_accumulated(self._parameters):
            found = gradient_of(loss, self._parameters, keep_graph=True)
        gradients: dict[Tensor, Tensor] = dict(zip(self._parameters, found, strict=True))
        norms = self.clipper.norms_of(gradients)
        norm = norms.square().sum().sqrt() if self.clipper.is_divided else norms[0]
        if not (is_alone or bool(torch.isfinite(norm))):
            raise RuntimeError(
                "Expected finite gradients: engine 'per_example' cannot tell an infinite one "
                "from those it spreads to; use engine='book_keeping', or one example at a time."
            )
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            return norm, torch.zeros_like(norms)
        coefficients = self.clipper.coefficients(norms[:, None])[:, 0]
        self.clipper.clipped(gradients, coefficients.cpu().tolist()).add_to(sums, scale=1.0)
        return norm, coefficients
