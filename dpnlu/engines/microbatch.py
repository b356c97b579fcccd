"""Clipping of micro-batches: their mean gradients, each as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.engines.clipped import Clipped
from dpnlu.engines.plain import gradient_of, norm_of
from dpnlu.mechanism.clipping import CLIPPING_RULES
from dpnlu.mechanism.plan import PrivacyPlan


@dataclass
class _Unit:
    """The micro-batch that is being added up."""

    sums: list[Tensor] = field(default_factory=list)
    size: int = 0


class Microbatch:
    """Clips the mean gradient of each micro-batch (eDP-SGD, Dupuy et al. 2022).

    One ordinary backward pass each. One example can turn its micro-batch's mean from any vector
    into any other, so the sensitivity is 2C, which the plan accounts for.
    """

    takes_whole_batches = False
    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self._plan = plan
        self._unit = _Unit()

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        if batch_size is None:
            self._unit = _Unit()  # the one before was broken off

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped | None:
        if closes_unit is None:
            return self._add_whole_batch(losses, into, scale)
        if len(losses):
            self._extend_unit(losses, list(into), keep_graph=False)
        return self._close_unit(into, scale) if closes_unit else None

    def _add_whole_batch(
        self, losses: Tensor, into: Mapping[nn.Parameter, Tensor], scale: float
    ) -> Clipped:
        """A logical batch in one piece: its examples are assigned here, independently."""
        assert self._plan.microbatches is not None
        group = torch.randint(self._plan.microbatches, (len(losses),), device=losses.device)
        closed = []
        for number in torch.unique(group):
            self._extend_unit(losses[group == number], list(into), keep_graph=True)
            closed.append(self._close_unit(into, scale))
        if not closed:
            return Clipped.nothing(losses)
        return Clipped(
            torch.cat([unit.norms for unit in closed]), torch.cat([unit.finite for unit in closed])
        )

    def _extend_unit(
        self, losses: Tensor, parameters: list[nn.Parameter], *, keep_graph: bool
    ) -> None:
        gradients = gradient_of(losses.sum(), parameters, keep_graph=keep_graph)
        unit = self._unit
        unit.size += len(losses)
        if unit.sums:
            torch._foreach_add_(unit.sums, gradients)
        else:
            unit.sums = gradients

    def _close_unit(self, into: Mapping[nn.Parameter, Tensor], scale: float) -> Clipped:
        unit, self._unit = self._unit, _Unit()
        norm = norm_of(unit.sums) / unit.size
        clipped = Clipped(norm[None], torch.isfinite(norm)[None])
        if clipped.non_finite:
            return clipped
        rule = CLIPPING_RULES[self._plan.clipping]
        coefficient = float(rule(norm[None], self._plan.max_grad_norm)) * scale / unit.size
        torch._foreach_add_(list(into.values()), unit.sums, alpha=coefficient)
        return clipped

    def weights_changed(self) -> None:
        pass

    def close(self) -> None:
        self._unit = _Unit()
