"""What trainers that step the optimizer themselves have in common: what was spent, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import PrivateTraining, privatize
from dpnlu.training.handover import Handover


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a trainer hands on to `privatize`; see there."""

    engine: str | None = None
    noise: torch.Generator | Literal["system"] | None = None
    sampling_rng: np.random.Generator | None = None
    verify: bool = True


class Spending:
    """What one trainer has spent.

    Attributes:
        ledger: of its last or present training; None: there was none.
        training: its present one; None: there is none.
    """

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.training: PrivateTraining | None = None
        self._last: PrivateTraining | None = None
        self._handover: Handover | None = None

    @property
    def steps_taken(self) -> int:
        """Releases that the last or present training has made."""
        return 0 if self._last is None else self._last.steps_taken

    @property
    def non_finite_units(self) -> int:
        """Clipping units left out so far because their gradient was not finite. Private."""
        return 0 if self._last is None else self._last.non_finite_units

    @property
    def gradients(self) -> Mapping[nn.Parameter, Tensor]:
        """The released sums of the last logical batch; see `PrivateTraining.gradients`."""
        return {} if self._last is None else self._last.gradients

    def epsilon(self, *, accountant: str = "pld") -> float:
        """ε spent so far, at the plan's δ, from the ledger; 0 before training."""
        return 0.0 if self.ledger is None else self.ledger.epsilon(accountant=accountant)

    def hand_over(self) -> None:
        """Leave what was released last as gradients; see `Handover.hand_over`."""
        assert self._handover is not None
        self._handover.hand_over()

    def _attach(
        self, model: nn.Module, optimizer: Optimizer, plan: PrivacyPlan, settings: EngineSettings
    ) -> None:
        """Begin to train the model; the trainer steps the optimizer."""
        assert self.ledger is not None
        self._handover = Handover(optimizer)
        self.training = self._last = privatize(
            model,
            self._handover,
            plan,
            engine=settings.engine,
            ledger=self.ledger,
            noise=settings.noise,
            sampling_rng=settings.sampling_rng,
            verify=settings.verify,
        )

    def _detach(self) -> None:
        """Leave the model as it was."""
        if self.training is not None:
            self.training.close()
        self.training = self._handover = None
