"""Clipping of micro-batches: their mean gradients, each as a whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpnlu.engines.outcome import ClipOutcome, OpenUnit, WrittenOut, buffer_like
from dpnlu.engines.plain import gradient_of, norm_of
from dpnlu.mechanism.clipping import CLIPPING_RULES
from dpnlu.mechanism.plan import PrivacyPlan


class Microbatch:
    """Clips the mean gradient of each micro-batch (eDP-SGD, Dupuy et al. 2022).

    One ordinary backward pass each. One example can turn its micro-batch's mean from any vector
    into any other, so the sensitivity is 2C, which the plan accounts for. So are users clipped who
    are larger than a physical batch; as each is a group by itself, theirs is C.
    """

    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
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
        norms, finite = [], []
        for number in torch.unique(group):
            outcome = self._clip_group(losses[group == number])
            if outcome.total is not None:
                outcome.total.add_to(sums, scale=1.0)
            norms.append(outcome.norms)
            finite.append(outcome.finite)
        return ClipOutcome(torch.cat(norms), torch.cat(finite), WrittenOut(sums))

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
        sums, size = unit.emptied()
        norm = norm_of(sums) / size
        finite = torch.isfinite(norm)
        if not bool(finite):
            return ClipOutcome(norm[None], finite[None], None)
        rule = CLIPPING_RULES[self._plan.clipping]
        coefficient = float(rule(norm[None], self._plan.max_grad_norm)) / size
        total = WrittenOut(dict(zip(self._parameters, sums, strict=True)), coefficient)
        return ClipOutcome(norm[None], finite[None], total)
