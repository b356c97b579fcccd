"""The loader: Poisson-sampled logical batches as physical ones, for all steps that remain."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from dpnlu.mechanism.sampling import PhysicalBatch, logical_batches
from dpnlu.training.cutting import Cutting, WhoseExamples
from dpnlu.training.steps import Steps


@dataclass(frozen=True)
class FewerExamples:
    """Makes a batch like a physical one with another number of examples.

    Attributes:
        ids: (b,) of the physical batch.
    """

    dataset: Dataset[Any] | Sequence[Any]
    collate: Callable[[list[Any]], Any]
    ids: NDArray[np.int64]

    def make(self) -> tuple[Any, int]:
        """A batch of one example less or, if there is but one, of two; and their number."""
        chosen = self.ids[:-1] if len(self.ids) > 1 else np.resize(self.ids, 2)
        return self.collate([self.dataset[number] for number in chosen.tolist()]), len(chosen)


class PrivateLoader:
    """Physical batches, until the plan's steps are taken; see `PrivateTraining.loader`."""

    def __init__(
        self,
        steps: Steps,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        rng: np.random.Generator,
        collate_fn: Callable[[list[Any]], Any] | None,
        users: WhoseExamples | None,
        physical_batch_size: int | None,
        fixed_size: bool,
        num_workers: int,
    ) -> None:
        self._cut = Cutting(
            steps.mechanism.plan,
            dataset,
            users=users,
            size=physical_batch_size,
            fixed_size=fixed_size,
            rng=rng,
        )
        steps.mechanism.processes.check_data(dataset)
        self._steps, self._rng = steps, rng
        self._dataset, self._collate = dataset, collate_fn or default_collate
        self._workers = num_workers

    def __len__(self) -> int:
        """Number of logical batches to come; physical ones are not known beforehand."""
        return self._steps.remaining

    def __iter__(self) -> Iterator[Any]:
        steps = self._steps
        loop = steps.begin_loop()
        processes = steps.mechanism.processes
        rng = processes.shared(self._rng)
        plan: deque[list[PhysicalBatch]] = deque()
        data = iter(
            DataLoader(
                self._dataset,  # type: ignore[arg-type]
                batch_sampler=self._ids(plan, rng),
                collate_fn=self._collate,
                num_workers=self._workers,
            )
        )
        try:
            with processes.reporting():
                for batch in self._batches(plan, data):
                    yield batch
                    steps.check_answered(loop)
        finally:
            steps.end_loop(loop)

    def _batches(self, plan: deque[list[PhysicalBatch]], data: Iterator[Any]) -> Iterator[Any]:
        """Data in the order in which `plan` announces it, empty logical batches included."""
        pieces: deque[PhysicalBatch] = deque()
        for batch in data:
            while not pieces:
                pieces.extend(self._next(plan))
            piece = pieces.popleft()
            smaller = FewerExamples(self._dataset, self._collate, piece.ids)
            self._steps.announce(piece, batch, smaller)
            yield batch
        while plan:
            self._next(plan)

    def _next(self, plan: deque[list[PhysicalBatch]]) -> list[PhysicalBatch]:
        """The next logical batch, in pieces; an empty one is released at once."""
        pieces = plan.popleft()
        if not pieces:
            self._steps.release_empty()
        return pieces

    def _ids(
        self, plan: deque[list[PhysicalBatch]], rng: np.random.Generator
    ) -> Iterator[list[int]]:
        """Ids of the physical batches; what they belong to is noted in `plan`."""
        mechanism = self._steps.mechanism
        batches = logical_batches(mechanism.plan, rng=rng)
        for _ in range(self._steps.remaining):
            pieces = self._cut(mechanism.processes.part_of(next(batches)))
            plan.append(pieces)
            yield from (piece.ids.tolist() for piece in pieces)
