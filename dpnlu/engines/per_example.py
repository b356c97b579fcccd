"""Per-example clipping by a loop over the examples: slow, for any differentiable model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.engines.clipped import Clipped
from dpnlu.engines.plain import gradient_of, norm_of, nothing_accumulated
from dpnlu.mechanism.clipping import CLIPPING_RULES
from dpnlu.mechanism.plan import PrivacyPlan


class PerExample:
    """One backward pass per example: slow, and right by construction.

    Examples that are not finite may spread through the computations that a batch shares. As it
    cannot tell whom they spoilt, this engine stops at a batch of several where that happened.
    """

    takes_whole_batches = False
    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self._plan = plan

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        pass

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped:
        parameters = list(into)
        rule = CLIPPING_RULES[self._plan.clipping]
        norms, finite = [], []
        for loss in losses:
            with nothing_accumulated(parameters):
                gradients = gradient_of(loss, parameters, keep_graph=True)
            norm = norm_of(gradients)
            norms.append(norm)
            if len(losses) > 1 and not bool(torch.isfinite(norm)):
                raise RuntimeError(
                    "Expected finite gradients: engine 'per_example' cannot tell an infinite one "
                    "from those it spreads to; use engine='book_keeping', or one example at a time."
                )
            finite.append(torch.isfinite(norm) & torch.isfinite(loss))
            if not bool(finite[-1]):
                continue
            coefficient = rule(norm[None], self._plan.max_grad_norm)[0] * scale
            for parameter, gradient in zip(parameters, gradients, strict=True):
                into[parameter].add_(gradient * coefficient)
        return (
            Clipped(torch.stack(norms), torch.stack(finite)) if norms else Clipped.nothing(losses)
        )

    def weights_changed(self) -> None:
        pass

    def close(self) -> None:
        pass
