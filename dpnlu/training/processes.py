"""What the steps of a training ask of the processes that take them, and the answers of one alone.

Several processes, each on its part of every logical batch, are `dpnlu.training.several_processes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dpnlu.mechanism.sampling import LogicalBatch


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What is in a logical batch. Private.

    Attributes:
        units: clipping units.
        non_finite: those left out because their gradient was not finite.
        unclipped: those that the bound left as they are, where it adapts.
    """

    units: int
    non_finite: int
    unclipped: int = 0


class Processes(Protocol):
    """The processes that train one model together. Each of them calls these in the same order.

    Attributes:
        count: how many there are.
    """

    count: int

    def check_data(self, dataset: Any) -> None:
        """Refuse data that are not the same, in the same order, for all processes."""

    def shared(self, rng: np.random.Generator) -> np.random.Generator:
        """What all processes draw logical batches from in the loop that begins."""

    def part_of(self, batch: LogicalBatch) -> LogicalBatch:
        """What this process computes of a logical batch."""

    def noisy_part_of(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """Contiguous views of the entries whose noise this process draws; others become zero."""

    def noisy(self, sums: Sequence[Tensor], add: Callable[[Sequence[Tensor]], None]) -> None:
        """Have noise added to sums that all processes have, once, in all of them."""

    def agree(self, release: int, counts: Counts, *, sampled: bool) -> Counts:
        """Go on when all processes have completed their parts of a logical batch, whose counts
        are returned.

        Args:
            release: its index, from 0.
            sampled: whether its examples were drawn as planned.
        """

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Have the sums of all processes' sums in place of this one's."""

    def from_first(self, value: float) -> float:
        """The number that the first process has, which drew the noise of it."""

    def record(self, append: Callable[[], None]) -> None:
        """Record a release; on return it is on disk, whichever process writes."""

    def compare(self, weights: Iterable[Tensor], *, releases: int, is_last: bool) -> None:
        """Refuse to go on if processes have come to different weights; they are compared after
        some releases, and the last."""

    def reporting(self) -> AbstractContextManager[None]:
        """In here an error ends the training of all processes, which are told of it."""

    def close(self) -> None:
        """They train no more."""


class OneProcess:
    """A process that trains alone."""

    count = 1

    def check_data(self, dataset: Any) -> None:
        """They are its own."""

    def shared(self, rng: np.random.Generator) -> np.random.Generator:
        return rng

    def part_of(self, batch: LogicalBatch) -> LogicalBatch:
        return batch

    def noisy_part_of(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        return sums

    def noisy(self, sums: Sequence[Tensor], add: Callable[[Sequence[Tensor]], None]) -> None:
        add(sums)

    def agree(self, release: int, counts: Counts, *, sampled: bool) -> Counts:
        return counts

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """They are complete."""

    def from_first(self, value: float) -> float:
        return value

    def record(self, append: Callable[[], None]) -> None:
        append()

    def compare(self, weights: Iterable[Tensor], *, releases: int, is_last: bool) -> None:
        """There is nothing to compare them with."""

    def reporting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        """It goes on by itself."""
