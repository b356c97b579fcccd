"""Clipping of micro-batches: their mean gradients, each as a whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dpnlu.engines.clipper import Clipper
from dpnlu.engines.outcome import ClipOutcome, OpenUnit, WrittenOut, buffer_like
from dpnlu.engines.plain import gradient_of
from dpnlu.mechanism.plan import PrivacyPlan


class Microbatch:
    """Clips the mean gradient of each micro-batch (eDP-SGD, Dupuy et al. 2022).

    One ordinary backward pass each. One example can turn its micro-batch's mean from any vector
    into any other, so the sensitivity is 2C, which the plan accounts for. So are users clipped who
    are larger than a physical batch; as each is a group by itself, theirs is C.
    """

    counts_forward_passes = False

    def __init__(
        self, model: nn.Module, plan: PrivacyPlan, *, clipper: Clipper | None = None
    ) -> None:
        """Nothing is computed yet.

        Args:
            clipper: of another engine of this training; None: one of its own.
        """
        self.clipper = clipper or Clipper.of(model, plan)
        self._plan = plan
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
        if unit is None:
            return self._clip_whole_batch(losses)
        if len(losses):
            self._extend(unit, losses, keep_graph=False)
        is_complete = closes_unit and unit.size > 0
        return self._closed(unit) if is_complete else ClipOutcome.nothing(losses)

    def _clip_whole_batch(self, losses: Tensor) -> ClipOutcome:
        """A logical batch in one piece: its examples are assigned here, independently."""
        assert self._plan.microbatches is not None
        if not len(losses):
            return ClipOutcome.nothing(losses)
        group = torch.randint(self._plan.microbatches, (len(losses),), device=losses.device)
        sums = {parameter: buffer_like(parameter).zero_() for parameter in self._parameters}
        outcomes = []
        for number in torch.unique(group):
            outcome = self._clip_group(losses[group == number])
            if outcome.total is not None:
                outcome.total.add_to(sums, scale=1.0)
            outcomes.append(replace(outcome, total=None))
        norms, finite = (torch.cat([getattr(o, n) for o in outcomes]) for n in ("norms", "finite"))
        counted = [o.unclipped for o in outcomes if o.unclipped is not None]
        return ClipOutcome(norms, finite, WrittenOut(sums), torch.cat(counted) if counted else None)

    def _clip_group(self, losses: Tensor) -> ClipOutcome:
        """A micro-batch in one piece, of a graph that others need as well."""
        unit = OpenUnit()
        self._extend(unit, losses, keep_graph=True)
        return self._closed(unit)

    def _extend(self, unit: OpenUnit, losses: Tensor, *, keep_graph: bool) -> None:
        """Examples join a micro-batch."""
        gradients = gradient_of(losses.sum(), self._parameters, keep_graph=keep_graph)
        unit.size += len(losses)
        if unit.sums:
            torch._foreach_add_(unit.sums, gradients)
        else:
            unit.sums = gradients

    def _closed(self, unit: OpenUnit) -> ClipOutcome:
        """The micro-batch is complete."""
        found, size = unit.emptied()
        sums: dict[Tensor, Tensor] = dict(zip(self._parameters, found, strict=True))
        norms = self.clipper.norms_of(sums) / size
        norm = norms.square().sum(0, keepdim=True).sqrt() if self.clipper.is_divided else norms
        finite = torch.isfinite(norm)
        coefficients = self.clipper.coefficients(norms[:, None])
        coefficients = torch.where(finite, coefficients, 0.0)
        unclipped = self.clipper.unclipped(coefficients.cpu())
        if not bool(finite):
            return ClipOutcome(norm, finite, None, unclipped)
        on_cpu = coefficients[:, 0].cpu().tolist()
        total = self.clipper.clipped(sums, [each / size for each in on_cpu])
        return ClipOutcome(norm, finite, total, unclipped)
