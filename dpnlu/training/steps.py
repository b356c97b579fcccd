"""The steps of one training, in which the loader and the handle take turns.

The loader announces physical batches, the handle answers each with clipped gradients. Here is kept
which logical batch is open, which physical batch is due, and which loop may hand them out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.independence import SmallerBatch
from dpnlu.mechanism.sampling import PhysicalBatch
from dpnlu.training.logical_batch import LogicalBatch, Mechanism


class Derived(Protocol):
    """Holds what was derived from weights."""

    def weights_changed(self) -> None:
        """Weights are not what they were."""


class Steps:
    """One logical batch after the other, and at most one at a time.

    Attributes:
        mechanism: of all logical batches.
        taken: how many were released.
        non_finite_units: clipping units left out so far. Private.
        due: the physical batch whose clipped gradients come next; None: none was announced.
        smaller: makes a batch of fewer examples than the one that is due; None: nobody can.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        *,
        recorder: BookKeeping | None,
        derived: Sequence[Derived],
    ) -> None:
        """Nothing is open.

        Args:
            recorder: is told of every physical batch before its forward pass.
            derived: is told whenever the optimizer has stepped.
        """
        self.mechanism = mechanism
        self.taken = self.non_finite_units = 0
        self.due: PhysicalBatch | None = None
        self.smaller: SmallerBatch | None = None
        self._recorder, self._derived = recorder, derived
        #: The one that is open, or the last one.
        self._batch: LogicalBatch | None = None
        self._loop: object | None = None
        self._is_closed = self._has_warned = self._is_in_step = False

    @property
    def remaining(self) -> int:
        """Releases with which ε does not pass the plan's; see `Ledger.remaining_steps`."""
        return self.mechanism.ledger.remaining_steps(self.mechanism.plan)

    @property
    def released(self) -> Mapping[nn.Parameter, Tensor]:
        """The sums of the last logical batch, until the next one begins; see `LogicalBatch`."""
        return {} if self._batch is None else self._batch.released

    def prepare(self) -> None:
        """Compute what public examples say of the next logical batch, before any private example of
        it is computed."""
        if self._lacks_public:
            assert self.mechanism.public is not None
            self.mechanism.public.prepare()

    # ---- for the loader ----------------------------------------------------------------------

    def begin_loop(self) -> object:
        """Begin anew, with a loop that alone may hand out batches; returned is what stands for it.

        What was begun and not completed is abandoned.
        """
        self._abandon()
        self._loop = object()
        return self._loop

    def announce(
        self, batch: PhysicalBatch, data: Any = None, smaller: SmallerBatch | None = None
    ) -> None:
        """A physical batch is about to be computed from its data."""
        if self._batch is not None and not self._batch.is_open:
            self._batch = None  # its memory is for the activations
        self.prepare()
        self.due, self.smaller = batch, smaller
        if self._recorder is not None:
            self._recorder.expect(len(batch.ids), data)

    def check_answered(self, loop: object) -> None:
        """Refuse to go on with a loop that has been replaced, or whose last batch has no step."""
        if self._loop is not loop:
            raise RuntimeError(
                "Expected the loop over the loader that was begun last, and in which no step "
                "failed: begin a new one, `for batch in private.loader(...)`."
            )
        if self.due is not None:
            raise RuntimeError(
                "Expected private.step(losses) once for every batch of the loader, but the last "
                "batch was left without."
            )

    def release_empty(self) -> None:
        """An empty logical batch: noise alone is released, and accounted."""
        self._release(self._opened(), sampled=True)

    def end_loop(self, loop: object) -> None:
        """The loop is over, or was broken off."""
        if self._loop is loop:
            self._abandon()

    # ---- for the handle ----------------------------------------------------------------------

    def check_may_be_unsampled(self) -> None:
        """Nothing is due: whether examples may be stepped on that no loader handed out."""
        if self.mechanism.processes.count > 1:
            raise RuntimeError(
                "Expected batches of private.loader, of which each rank gets its part, got others: "
                "what is handed over on several ranks may be the same examples."
            )
        if self._loop is not None:
            raise RuntimeError(
                "Expected one private.step(losses) for each batch of the loader, got a second: its "
                "examples would count twice. Sum up an example's losses, or leave the loop first."
            )
        if self.mechanism.plan.unit == "user":
            raise RuntimeError(
                "Expected batches of private.loader, which knows whose each example is, got "
                "others: step on the loader's, inside the loop."
            )
        if not self._has_warned:
            warnings.warn(
                "private.step was called outside private.loader: no sampling took place, so these "
                "releases are accounted without amplification by sampling.",
                stacklevel=4,
            )
            self._has_warned = True

    def check_prepared(self) -> None:
        """Losses are there: whether those of public examples, whose turn is before, were, too."""
        if self._lacks_public:
            raise RuntimeError(
                "Expected losses of a batch of private.loader beside public examples, got some "
                "that were computed before those of the public ones: hand the function that "
                "computes them to private.stepper."
            )

    @contextmanager
    def step(self, due: PhysicalBatch | None) -> Iterator[LogicalBatch]:
        """In here the physical batch that is due is added to its logical batch, and checked. At the
        end, if it was the last one, that is released. What fails in here, for whatever reason, ends
        the loop, and the logical batch is abandoned.

        Args:
            due: for which gradients were computed; None: examples that no loader handed out, which
                are a whole logical batch.

        Raises:
            RuntimeError: another step was made meanwhile, or no logical batch may begin.
            ValueError: see `Mechanism.check_ready`.
            NonFiniteBatchError, LedgerError, OSError: see `LogicalBatch.release`.
        """
        if self._is_in_step or self.due is not due:
            raise RuntimeError(
                "Expected one private.step(losses) for each batch, got one inside another: its "
                "examples would count twice. Call it outside the function that computes losses."
            )
        batch, is_added = self._opened(), False
        self._is_in_step = True
        try:
            yield batch
            self.due, self.smaller, is_added = None, None, True
            if due is None or due.closes_step:
                self._release(batch, sampled=due is not None)
        except BaseException:
            # A release that failed has ended its logical batch, and the loop may go on.
            if batch.is_open or not is_added:
                self._abandon()
            raise
        finally:
            self._is_in_step = False

    def weights_changed(self) -> None:
        """Weights are not what they were."""
        for derived in self._derived:
            derived.weights_changed()

    def close(self) -> None:
        """No step is taken from now on; what is open is abandoned."""
        self._is_closed = True
        if self._batch is not None and self._batch.is_open:
            self._batch.abandon()

    # ------------------------------------------------------------------------------------------

    @property
    def _lacks_public(self) -> bool:
        """Whether a logical batch cannot begin before public examples are computed."""
        public = self.mechanism.public
        is_open = self._batch is not None and self._batch.is_open
        return public is not None and not is_open and not public.is_prepared

    def _opened(self) -> LogicalBatch:
        """The logical batch that is open, or a new one."""
        if self._is_closed:
            raise RuntimeError("Expected an open training, got a closed one: call privatize anew.")
        if self._batch is None or not self._batch.is_open:
            self.prepare()
            self._batch = LogicalBatch(self.mechanism)
        return self._batch

    def _release(self, batch: LogicalBatch, *, sampled: bool) -> None:
        self.non_finite_units += batch.non_finite
        try:
            batch.release(sampled=sampled)
        finally:
            self.weights_changed()
        self.taken += 1

    def _abandon(self) -> None:
        """Forget the loop and what is not released."""
        self._loop = self.due = self.smaller = None
        if self._batch is not None and self._batch.is_open:
            self._batch.abandon()
        if self._recorder is not None:
            self._recorder.expect(None)
