"""The loader of a trainer that counts steps: one item for each logical batch, empty ones included.

Where `dpnlu.training.loader` hands out physical batches, one after the other, this hands out
logical ones, each of which hands out its physical batches. So whoever takes an item takes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from dpnlu.mechanism.sampling import PhysicalBatch, logical_batches
from dpnlu.training.cutting import Cutting, WhoseExamples
from dpnlu.training.loader import FewerExamples
from dpnlu.training.steps import Steps


class DrawnBatch:
    """A logical batch: iterated over once, it hands out its physical batches, each of which must be
    answered by a step. An empty one is released as it is iterated over.

    It shows nothing else: to `in` it is empty, so that a trainer that looks for labels or tokens to
    count finds none.
    """

    def __init__(self, steps: Steps, loop: object, data: Iterator[tuple[Any, ...]]) -> None:
        self._steps, self._loop, self._data = steps, loop, data

    def __contains__(self, key: object) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        is_empty = True
        for piece, batch, smaller in self._data:
            is_empty = False
            self._steps.announce(piece, batch, smaller)
            yield batch
            self._steps.check_answered(self._loop)
        if is_empty:
            self._steps.release_empty()


class LogicalLoader:
    """Logical batches of the steps that remain, in passes; see `PrivateTraining.logical_loader`."""

    def __init__(
        self,
        steps: Steps,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        rng: np.random.Generator,
        collate_fn: Callable[[list[Any]], Any] | None,
        users: WhoseExamples | None,
        physical_batch_size: int,
        num_workers: int,
    ) -> None:
        self._cut = Cutting(
            steps.mechanism.plan,
            dataset,
            users=users,
            size=physical_batch_size,
            fixed_size=False,
            rng=rng,
        )
        self._steps, self._rng = steps, rng
        self._dataset, self._collate = dataset, collate_fn or default_collate
        self._workers = num_workers
        steps.mechanism.processes.check_data(dataset)

    def __len__(self) -> int:
        """Number of logical batches in a whole pass: 1 / sample rate, which is public."""
        return self._steps.mechanism.plan.steps_per_epoch

    def __iter__(self) -> Iterator[DrawnBatch]:
        """What is left of the pass that the ledger stands in, up to the last planned step."""
        self._cut.check_size()
        ledger = self._steps.mechanism.ledger
        count = min(len(self) - len(ledger) % len(self), self._steps.remaining)
        loop = self._steps.begin_loop()
        mechanism = self._steps.mechanism
        drawn = logical_batches(mechanism.plan, rng=mechanism.processes.shared(self._rng))
        parts = (mechanism.processes.part_of(batch) for batch in islice(drawn, count))
        plan = [self._cut(part) for part in parts]
        data = iter(
            DataLoader(
                self._dataset,  # type: ignore[arg-type]
                batch_sampler=[piece.ids.tolist() for pieces in plan for piece in pieces],
                collate_fn=self._collate,
                num_workers=self._workers,
            )
        )
        try:
            for pieces in plan:
                yield DrawnBatch(self._steps, loop, self._with_data(pieces, data))
        finally:
            self._steps.end_loop(loop)

    def _with_data(
        self, pieces: Sequence[PhysicalBatch], data: Iterator[Any]
    ) -> Iterator[tuple[PhysicalBatch, Any, FewerExamples]]:
        for piece in pieces:
            smaller = FewerExamples(self._dataset, self._collate, piece.ids)
            yield piece, next(data), smaller
