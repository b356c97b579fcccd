"""The loader: Poisson-sampled logical batches as physical ones, for all steps that remain."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import PhysicalBatch, logical_batches, physical_batches


class Training(Protocol):
    """What a loader needs of the training whose batches it hands out."""

    plan: PrivacyPlan
    sampling_rng: np.random.Generator

    @property
    def remaining_steps(self) -> int:
        """Releases that the plan still allows."""

    def begin_loop(self) -> object:
        """Begin anew, with a loop that alone may hand out batches; returned is what stands for
        it."""

    def begin(
        self, batch: PhysicalBatch, data: Any, fewer: Callable[[], tuple[Any, int]] | None
    ) -> None:
        """A physical batch is about to be computed from its data; `fewer` makes one of fewer
        examples, and tells how many."""

    def check_answered(self, loop: object) -> None:
        """Refuse to go on with a loop that has been replaced, or whose last batch has no step."""

    def release_empty(self) -> None:
        """An empty logical batch: noise alone is released, and accounted."""

    def end_loop(self, loop: object) -> None:
        """The loop is over, or was broken off."""


class PrivateLoader:
    """Physical batches, until the plan's steps are taken; see `PrivateTraining.loader`."""

    def __init__(
        self,
        private: Training,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        collate_fn: Callable[[list[Any]], Any] | None,
        physical_batch_size: int | None,
        fixed_size: bool,
        num_workers: int,
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if size != private.plan.num_examples:
            raise ValueError(
                f"Expected the {private.plan.num_examples} examples of the plan, got a data set of "
                f"{size}: plan for the data set that is trained on."
            )
        if physical_batch_size is not None and physical_batch_size < 1:
            raise ValueError(f"Expected `physical_batch_size` >= 1, got {physical_batch_size}.")
        if fixed_size and physical_batch_size is None:
            raise ValueError(
                "Expected `physical_batch_size` for batches of a fixed size, got None: say how "
                "many examples to compute at once."
            )
        self._private = private
        self._dataset = dataset
        self._collate = collate_fn
        self._size, self._fixed = physical_batch_size or size, fixed_size
        self._workers = num_workers

    def __len__(self) -> int:
        """Number of logical batches to come; physical ones are not known beforehand."""
        return self._private.remaining_steps

    def __iter__(self) -> Iterator[Any]:
        private = self._private
        loop = private.begin_loop()
        plan: deque[list[PhysicalBatch]] = deque()
        data = iter(
            DataLoader(
                self._dataset,  # type: ignore[arg-type]
                batch_sampler=self._ids(plan),
                collate_fn=self._collate,
                num_workers=self._workers,
            )
        )
        try:
            for batch in self._batches(plan, data):
                yield batch
                private.check_answered(loop)
        finally:
            private.end_loop(loop)

    def _batches(self, plan: deque[list[PhysicalBatch]], data: Iterator[Any]) -> Iterator[Any]:
        """Data in the order in which `plan` announces it, empty logical batches included."""
        pieces: deque[PhysicalBatch] = deque()
        for batch in data:
            while not pieces:
                pieces.extend(self._next(plan))
            piece = pieces.popleft()
            self._private.begin(piece, batch, partial(self._fewer, piece.ids))
            yield batch
        while plan:
            self._next(plan)

    def _fewer(self, ids: NDArray[np.int64]) -> tuple[Any, int]:
        """Another batch, of one example less or, if there is but one, of two."""
        chosen = ids[:-1] if len(ids) > 1 else np.resize(ids, 2)
        collate = self._collate or default_collate
        return collate([self._dataset[number] for number in chosen.tolist()]), len(chosen)

    def _next(self, plan: deque[list[PhysicalBatch]]) -> list[PhysicalBatch]:
        """The next logical batch, in pieces; an empty one is released at once."""
        pieces = plan.popleft()
        if not pieces:
            self._private.release_empty()
        return pieces

    def _ids(self, plan: deque[list[PhysicalBatch]]) -> Iterator[list[int]]:
        """Ids of the physical batches; what they belong to is noted in `plan`."""
        batches = logical_batches(self._private.plan, rng=self._private.sampling_rng)
        for _ in range(self._private.remaining_steps):
            pieces = physical_batches(next(batches), size=self._size, fixed_size=self._fixed)
            plan.append(pieces)
            yield from (piece.ids.tolist() for piece in pieces)
