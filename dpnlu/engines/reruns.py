"""What was computed of a batch, in a form that can be computed again of another batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpnlu.engines.base import Engine, without_fillers
from dpnlu.engines.batches import by_example
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.independence import Answers, SmallerBatch
from dpnlu.engines.moment import Moment
from dpnlu.engines.refusals import check_losses, check_shape
from dpnlu.engines.user_gradients import shares
from dpnlu.gradients.calls import Call

Losses = Callable[[Any], Tensor]


def losses_for(engine: Engine, losses_of: Losses, batch: Any, count: int | None) -> Tensor:
    """The losses of a batch, computed where the engine sees it if it has to.

    Args:
        count: number of examples; None: as many as there are losses.
    """
    if isinstance(engine, BookKeeping):
        return engine.losses(losses_of, batch, count)
    losses = losses_of(batch)
    check_losses(losses, count)
    return losses


@dataclass(frozen=True)
class LossesRun:
    """A function that computed the losses of a batch; see `dpnlu.engines.independence.Run`.

    Attributes:
        losses_of: batch -> losses (B,).
        engine: that clips their gradients.
        moment: at which they were computed.
        count: number of examples; None: it was not known beforehand.
        kept: how many of them, the first ones, count; None: all.
        users: (B,) whose each example is, where users are clipped; None: examples are.
    """

    losses_of: Losses
    batch: Any
    engine: Engine
    moment: Moment
    count: int | None
    kept: int | None
    users: Tensor | None
    answers: Answers | None
    smaller: SmallerBatch | None

    def again(self, batch: Any) -> Answers:
        with self.moment.repeated():
            losses = self._losses(batch)
            if not isinstance(self.engine, BookKeeping):
                return Answers([losses.detach()[: self.kept]])
            losses = without_fillers(losses, self.kept)
            if self.users is not None:
                losses = shares(losses, self.users)
            norms = self.engine.norms(losses)
            return Answers([losses.detach(), norms], self.engine.exact_signature)

    def _losses(self, batch: Any) -> Tensor:
        if not self.engine.counts_forward_passes:
            return losses_for(self.engine, self.losses_of, batch, self.count)
        with torch.no_grad():  # no step is made on them
            losses = self.losses_of(batch)
        check_shape(losses, self.count)
        return losses


@dataclass(frozen=True)
class CompiledRun:
    """The same for losses whose gradients a compiled program clips: norms are not asked for."""

    losses_of: Losses
    batch: Any
    moment: Moment
    kept: int
    smaller: SmallerBatch | None
    answers: None = None

    def again(self, batch: Any) -> Answers:
        with torch.no_grad(), self.moment.repeated():
            return Answers([self.losses_of(batch)[: self.kept]])


@dataclass(frozen=True)
class CallRun:
    """The call of a module; see `dpnlu.engines.independence.Run`.

    Attributes:
        engine: that recorded it.
        moment: whose random numbers every run gets.
        count: number of examples.
    """

    call: Call
    engine: BookKeeping
    moment: Moment
    count: int
    answers: None = None
    smaller: None = None

    @property
    def batch(self) -> Any:
        """The arguments."""
        return self.call.args, self.call.kwargs

    def again(self, batch: Any) -> Answers:
        with self.moment.repeated():
            outputs, signature = self.engine.run(self.call, batch, self.count)
        exact = None if signature is None or signature.may_choose_rows else signature
        return Answers(by_example(outputs, self.count), exact)
