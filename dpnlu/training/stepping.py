"""One step, in two phases: the engine clips, and the logical batch is added to and released."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpnlu.engines.base import Engine
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.independence import Answers, Independence, Run
from dpnlu.engines.microbatch import Microbatch
from dpnlu.engines.moment import Moments
from dpnlu.engines.refusals import check_losses
from dpnlu.engines.reruns import CallRun, CompiledRun, LossesRun, losses_for
from dpnlu.mechanism.sampling import PhysicalBatch
from dpnlu.training.logical_batch import LogicalBatch
from dpnlu.training.steps import Steps

if TYPE_CHECKING:
    from dpnlu.engines.compiled import CompiledClipping  # loads torch's compiler


class Stepping:
    """Answers the physical batches of a training, one after the other.

    Guarantee: nothing of a batch is released before its checks are passed.
    """

    def __init__(self, engine: Engine, steps: Steps, *, independence: Independence | None) -> None:
        """Nothing is computed yet.

        Args:
            engine: clips.
            steps: what is answered, and where clipped gradients go.
            independence: of examples, which it checks; None: it is not checked.
        """
        self._engine, self._steps, self._independence = engine, steps, independence
        #: Of users who are larger than a physical batch: what counts of them is their sum alone.
        self._whole = Microbatch(
            steps.mechanism.model, steps.mechanism.plan, clipper=engine.clipper
        )
        self._recorder = engine if isinstance(engine, BookKeeping) else None
        self._moments = Moments(steps.mechanism.model)

    def by_losses(self, losses: Tensor) -> bool:
        """See `PrivateTraining.step`."""
        due = self._steps.due
        check_losses(losses, None if due is None else len(due.ids))
        if due is None:
            self._steps.check_may_be_unsampled()
        self._steps.check_prepared()
        recorder, count = self._recorder, len(losses)
        calls = [] if recorder is None else recorder.calls
        with self._steps.step(due) as batch:
            self._clip(losses, due, batch)
            if recorder is not None and calls and self._is_to_be_exchanged(count, due):
                runs = [CallRun(call, recorder, self._moments.now(), count) for call in calls]
                self._check_independence(runs, count)
        return due is None or due.closes_step

    def by_function(self, losses_of: Callable[[Any], Tensor], data: Any) -> bool:
        """See `PrivateTraining.stepper`."""
        due = self._steps.due
        if due is None:
            self._steps.check_may_be_unsampled()
        self._steps.prepare()
        size = None if due is None else len(due.ids)
        moment = self._moments.now()
        losses = losses_for(self._engine, losses_of, data, size)
        self._moments.notice(moment)
        with self._steps.step(due) as batch:
            norms = self._clip(losses, due, batch)
            losses = losses.detach()  # two graphs at once would be twice the memory
            if self._is_to_be_exchanged(len(losses), due):
                run = LossesRun(
                    losses_of=losses_of,
                    batch=data,
                    engine=self._engine,
                    moment=moment,
                    count=size,
                    kept=None if due is None else len(due.ids) - due.fillers,
                    users=_users(due, losses.device),
                    answers=self._answers(losses, norms, due),
                    smaller=self._steps.smaller,
                )
                self._check_independence([run], len(losses))
        return due is None or due.closes_step

    def by_program(self, clipping: CompiledClipping, data: Any) -> bool:
        """See `PrivateTraining.compile`."""
        due = self._steps.due
        if due is None:
            raise RuntimeError(
                "Expected one compiled step for each batch of private.loader, got another: "
                "call it inside the loop, with the loop's batch."
            )
        self._steps.prepare()
        count, kept = len(due.ids), len(due.ids) - due.fillers
        moment = self._moments.now()
        with self._steps.step(due) as batch:
            batch.add(clipping.clip(data, count=count, kept=kept))
            if self._is_to_be_exchanged(count, due):
                smaller = self._steps.smaller
                run = CompiledRun(clipping.losses_of, data, moment, kept, smaller)
                self._check_independence([run], count)
        return due.closes_step

    def _clip(self, losses: Tensor, due: PhysicalBatch | None, batch: LogicalBatch) -> Tensor:
        """Clip the gradients of the examples that are due, and add them to the logical batch.

        Returns:
            (U,) norms of the clipping units that are complete; all else of the clip outcome takes
            memory, and ends here.
        """
        if due is None:
            outcome = self._engine.clip(losses)
        else:
            outcome = self._engine_for(due).clip(
                losses,
                kept=len(losses) - due.fillers,
                unit=batch.unit,
                closes_unit=due.closes_unit,
                users=_users(due, losses.device),
            )
        batch.add(outcome)
        return outcome.norms

    def _answers(self, losses: Tensor, norms: Tensor, due: PhysicalBatch | None) -> Answers | None:
        """What is known of the examples that count; None: too little, as norms are those of
        users."""
        if due is not None and due.users is not None:
            return None
        losses = losses.detach()[: len(norms)]
        if self._recorder is None:
            return Answers([losses])
        return Answers([losses, norms], self._recorder.exact_signature)

    def _engine_for(self, due: PhysicalBatch) -> Engine:
        """What clips a physical batch.

        Raises:
            RuntimeError: a user does not fit into it, and the engine's hooks cannot pass over one.
        """
        if not self._is_part(due):
            return self._engine
        if self._engine.counts_forward_passes:
            raise RuntimeError(
                "Expected engine='book_keeping' or 'per_example' for users with more examples than "
                f"a physical batch, of {len(due.ids)}, got another: raise `physical_batch_size`, "
                "or lower the examples per user."
            )
        return self._whole

    def _is_part(self, due: PhysicalBatch | None) -> bool:
        """Whether a physical batch is part of one user, who is clipped when complete."""
        return due is not None and due.users is None and self._steps.mechanism.plan.unit == "user"

    def _is_to_be_exchanged(self, count: int, due: PhysicalBatch | None) -> bool:
        """Whether to check of the last batch, of `count` examples, that they are independent; those
        of one user need not be."""
        if self._independence is None or self._is_part(due):
            return False
        signature = None if self._recorder is None else self._recorder.signature
        return self._independence.is_due(signature, count)

    def _check_independence(self, runs: Sequence[Run], count: int) -> None:
        """Check it by exchanging examples in the runs that led to the batch's losses."""
        assert self._independence is not None
        recorder = self._recorder
        self._independence.check(
            runs,
            count=count,
            signature=None if recorder is None else recorder.signature,
            coarsest=torch.finfo(torch.float32).eps if recorder is None else recorder.coarsest,
        )


def _users(due: PhysicalBatch | None, device: torch.device) -> Tensor | None:
    """(B,) whose each example of a physical batch is; None: examples are clipped."""
    return None if due is None or due.users is None else torch.from_numpy(due.users).to(device)
