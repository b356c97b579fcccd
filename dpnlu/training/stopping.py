"""When ordinary training ends before its last epoch: once the validation loss no longer falls.

In private training when to stop would be read from data that ε does not cover, so it has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class EarlyStopping:
    """Watches a model from epoch to epoch.

    Attributes:
        model: what is trained.
        loss: the loss on validation examples, of the model as it is.
        patience: epochs without a lower one after which training ends.
        lowest: the lowest so far.
        since: epochs since then.
    """

    model: nn.Module
    loss: Callable[[], float]
    patience: int
    lowest: float = math.inf
    since: int = 0
    _best: dict[str, Tensor] = field(default_factory=dict)

    def ends_here(self) -> bool:
        """Look at the model after an epoch; a loss that is no number is not lower."""
        loss = self.loss()
        if loss < self.lowest:
            self.lowest, self.since = loss, 0
            self._best = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        else:
            self.since += 1
        return self.since >= self.patience

    def restore(self) -> None:
        """Give the model the weights of the lowest loss; none, if it was never a number."""
        if self._best:
            with torch.no_grad():
                self.model.load_state_dict(self._best)
