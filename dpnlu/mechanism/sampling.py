"""Batches as ids, never as data: Poisson sampling, and cutting into what fits in memory.

A *logical* batch stands behind one step; its size is random and may be 0. A *physical* batch is
what is computed at once; how a logical batch is cut changes neither ε nor the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpnlu.mechanism.plan import PrivacyPlan


@dataclass(frozen=True)
class LogicalBatch:
    """What is behind one step.

    Attributes:
        units: ids of each clipping group, (n,) integers each. Clipping of examples or users has one
            group, micro-batch clipping one per micro-batch; a group may be empty. Ids are those of
            the plan's unit, examples or users.
    """

    units: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class PhysicalBatch:
    """Examples that are computed together.

    Attributes:
        ids: (b,) ids, b >= 1.
        closes_unit: whether the clipping group is complete with this batch.
        closes_step: whether the logical batch is complete with this batch.
        fillers: how many ids, the last ones, are there for the size alone, and must not count.
        users: (b,) whose each example is, in numbers from 0 on of the users in this batch, all of
            whose chosen examples are in it; None: the unit is the example, or these are part of one
            user's, a clipping group.
    """

    ids: NDArray[np.int64]
    closes_unit: bool
    closes_step: bool
    fillers: int = 0
    users: NDArray[np.int64] | None = None


def logical_batches(plan: PrivacyPlan, *, rng: np.random.Generator) -> Iterator[LogicalBatch]:
    """Endless logical batches as the plan describes them.

    Guarantee: each of the ids 0 … num_examples - 1 enters each batch with probability
    `sample_rate`, independently of the others and of earlier batches; its micro-batch is
    likewise drawn independently. Truncation, if planned, keeps a uniformly random subset.

    Args:
        rng: decides who is in a batch. Amplification by sampling assumes that nobody knows it: do
            not publish its seed.
    """
    while True:
        ids = np.flatnonzero(rng.random(plan.num_examples) < plan.sample_rate)
        if plan.max_batch_size is not None and len(ids) > plan.max_batch_size:
            ids = np.sort(rng.choice(ids, plan.max_batch_size, replace=False))
        yield LogicalBatch(_groups(ids, plan.microbatches, rng))


def part_of(
    batch: LogicalBatch, *, rank: int, count: int, clipping_unit: str = "example"
) -> LogicalBatch:
    """The examples of a logical batch that one of `count` processes computes.

    Guarantee: the parts of all ranks are disjoint and make up the batch, and no clipping unit is in
    two of them.

    Args:
        rank: of the process, counted from 0.
        clipping_unit: of the plan: single examples are dealt out, or whole micro-batches.
    """
    if clipping_unit == "microbatch":
        return LogicalBatch(batch.units[rank::count])
    return LogicalBatch(tuple(unit[rank::count] for unit in batch.units))


def physical_batches(
    batch: LogicalBatch, *, size: int, fixed_size: bool = False
) -> list[PhysicalBatch]:
    """Cut a logical batch into pieces of at most `size` examples, group by group.

    Args:
        fixed_size: pieces of exactly `size`, the last filled up with further copies of its own
            examples; otherwise there are as few pieces as can be, of sizes that differ by one at
            most: a piece of three examples takes little less time than one of sixty.

    Returns:
        The pieces in order; none at all for an empty logical batch.
    """
    groups = [unit for unit in batch.units if len(unit)]
    pieces = []
    for number, unit in enumerate(groups, start=1):
        count = -(-len(unit) // size)
        ends = range(size, len(unit), size) if fixed_size else count
        for place, ids in enumerate(np.array_split(unit, ends), start=1):
            closes_unit = place == count
            closes_step = closes_unit and number == len(groups)
            fillers = size - len(ids) if fixed_size else 0
            ids = np.resize(ids, len(ids) + fillers)  # repeats them
            pieces.append(PhysicalBatch(ids, closes_unit, closes_step, fillers))
    return pieces


def _groups(
    ids: NDArray[np.int64], microbatches: int | None, rng: np.random.Generator
) -> tuple[NDArray[np.int64], ...]:
    if microbatches is None:
        return (ids,)
    group = rng.integers(microbatches, size=len(ids))
    return tuple(ids[group == number] for number in range(microbatches))
