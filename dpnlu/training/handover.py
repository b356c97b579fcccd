"""An optimizer's place while somebody else, a trainer say, steps the optimizer itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Handover:
    """Takes each release where an optimizer would act on it, and hands it over when asked to.

    Guarantee: parameters have gradients between `hand_over` and the next step alone, and these are
    what was released.

    Attributes:
        optimizer: the one that somebody else steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Nothing is released yet."""
        self.optimizer = optimizer
        self._released: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    def step(self) -> None:
        """Take what was released, instead of updating weights by it."""
        parameters = (p for group in self.param_groups for p in group["params"])
        self._released = [(p, p.grad) for p in parameters if p.grad is not None]

    def hand_over(self) -> None:
        """Leave what was released last as gradients, for one step of the optimizer.

        Raises:
            RuntimeError: nothing was released since the last time.
        """
        if not self._released:
            raise RuntimeError(
                "Expected a release to hand over, got none: complete a logical batch first."
            )
        for parameter, total in self._released:
            parameter.grad = total
        self._released = []
