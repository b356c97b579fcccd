"""Several processes that train one model by `torch.distributed`, each on its part of every batch.

The way of a logical batch, on every rank:

1. All draw the same batch, from the random numbers of rank 0, and each computes its part of it.
2. They agree that all parts are complete, an empty one as well.
3. Clipped sums are added up. Each entry got its noise on one rank.
4. Rank 0 records the release; when it is on disk, it says so.
5. Every optimizer steps on the same gradient.

In 2 and 4 each rank hears of the errors of the others. A rank that has ended, or does not come
within the time-out, ends the training of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from dpnlu.mechanism.noise import equal_shares
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import LogicalBatch, part_of
from dpnlu.training.data_digest import digest_of
from dpnlu.training.processes import Counts

_Any = TypeVar("_Any")
# Smaller tensors are added up several at once: each time processes wait for each other.
_BUCKET = 2**20
# Weights are compared after the first releases, at growing distances, and then each time after
# so many.
_COMPARED_EVERY = 100
# Integers that processes tell each other at a meeting, the meeting included.
_TOLD = 6


class ProcessesError(RuntimeError):
    """Another process has ended, failed, or does something else; training ends on all of them.

    Nothing was applied that the ledger does not hold.
    """


class _Meeting(IntEnum):
    """Where processes meet; all of them at the same, or one to say that it failed."""

    FAILED = 0
    FACT = 1
    VALUE = 2
    TENSORS = 3
    DATA = 4
    LOOP = 5
    RELEASE = 6
    RECORD = 7
    WEIGHTS = 8


class SeveralProcesses:
    """The processes of the default group; see `dpnlu.training.processes.Processes`.

    Guarantee: all draw the same logical batches, whose parts are disjoint; the noise of each entry
    of their sum is drawn once; and no process applies a release before rank 0 has recorded it.

    Attributes:
        count: how many there are.
        rank: of this one, counted from 0.
    """

    def __init__(self, plan: PrivacyPlan, *, timeout: timedelta, splits_noise: bool) -> None:
        """All processes have to make one at the same time.

        Args:
            plan: the mechanism.
            timeout: how long to wait for others before training ends.
            splits_noise: each draws the noise of an equal share of the entries, all of them from
                entropy of their own; else rank 0 draws all of it.
        """
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._plan, self._splits_noise = plan, splits_noise
        self._control: Any = None
        self._sums: Any = None
        self._is_over = False
        self._waited(lambda: self._join(timeout))

    def _join(self, timeout: timedelta) -> None:
        """Make the groups, with all other processes."""
        # One for what they tell each other, so that whoever fails can say so while others add up
        # sums; on processors, where nobody has to wait for a device.
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._sums = dist.new_group(timeout=timeout)

    # ---- before training ---------------------------------------------------------------------

    def check_same(self, facts: Mapping[str, str], *, remedy: str) -> None:
        """Whether all processes have the same facts, by name.

        Raises:
            ProcessesError: some have others, or have failed.
        """
        for name, fact in facts.items():
            others = self._meet(_Meeting.FACT, _number(name), _number(fact))
            if different := [rank for rank, told in enumerate(others) if told != others[0]]:
                self._is_over = True
                raise ProcessesError(
                    f"Expected the same {name} on all ranks, got another on rank {different[0]} "
                    f"than on rank 0: {remedy}."
                )

    def from_first(self, value: _Any) -> _Any:
        """What rank 0 has."""
        self._meet(_Meeting.VALUE)
        found = [value]
        self._waited(lambda: dist.broadcast_object_list(found, src=0, group=self._control))
        return value if self.rank == 0 else found[0]

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Put what rank 0 has into these tensors, which have the same shapes everywhere."""
        self._meet(_Meeting.TENSORS)
        for tensor in tensors:
            # As bytes: not every backend knows every type.
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            if flat.numel():
                self._waited(partial(dist.broadcast, flat, src=0, group=self._sums))
                with torch.no_grad():
                    tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))

    def check_data(self, dataset: Any) -> None:
        """Raise ProcessesError unless all have the same examples at the same places, as far as a
        thousand of them tell; where an example is another each time, only their number."""
        key = "00" * 32  # of the digest nothing is kept
        with self.reporting():
            first, second = digest_of(dataset, key=key), digest_of(dataset, key=key)
            size = len(dataset)
        is_steady = int(first == second)
        told = self._meet(_Meeting.DATA, size, is_steady, _number(first))
        steady = {digest for _, is_steady, digest, *_ in told if is_steady}
        if len({size for size, *_ in told}) > 1 or len(steady) > 1:
            self._is_over = True
            raise ProcessesError(
                "Expected the same examples at the same places on all ranks, got others, or "
                "another order: an example that has two places could count twice; load the whole "
                "data set on every rank, and shuffle it nowhere."
            )

    # ---- a logical batch ---------------------------------------------------------------------

    def shared(self, rng: np.random.Generator) -> np.random.Generator:
        """Rank 0's generator, on the others a copy of it.

        It is shared anew by every loop: when a loop is broken off, some have drawn further ahead
        than others.
        """
        self._meet(_Meeting.LOOP)
        return self.from_first(rng)

    def part_of(self, batch: LogicalBatch) -> LogicalBatch:
        unit = self._plan.clipping_unit
        return part_of(batch, rank=self.rank, count=self.count, clipping_unit=unit)

    def noisy_part_of(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        for total in sums:
            total.zero_()
        shares = equal_shares(sums, self.count if self._splits_noise else 1)
        return shares[self.rank] if self.rank < len(shares) else []

    def noisy(self, sums: Sequence[Tensor], add: Callable[[Sequence[Tensor]], None]) -> None:
        if self.rank == 0:
            with self.reporting():
                add(sums)
        self.copy_first(sums)

    def agree(self, release: int, counts: Counts, *, sampled: bool) -> Counts:
        mine = (counts.units, counts.non_finite, counts.unclipped)
        told = self._meet(_Meeting.RELEASE, release, int(sampled), *mine)
        self._check_alike([one[:2] for one in told])
        units, non_finite, unclipped = (sum(one[place] for one in told) for place in (2, 3, 4))
        return Counts(units=units, non_finite=non_finite, unclipped=unclipped)

    def add_up(self, sums: Sequence[Tensor]) -> None:
        large = [total for total in sums if total.numel() >= _BUCKET]
        buckets = [torch.cat([t.view(-1) for t in bucket]) for bucket in _buckets(sums)]

        def wait_for_all() -> None:
            begun = [
                dist.all_reduce(total, group=self._sums, async_op=True)
                for total in (*large, *buckets)
            ]
            for work in begun:
                work.wait()

        self._waited(wait_for_all)
        for bucket, added in zip(_buckets(sums), buckets, strict=True):
            pieces = torch.split(added, [total.numel() for total in bucket])
            torch._foreach_copy_([total.view(-1) for total in bucket], list(pieces))

    def record(self, append: Callable[[], None]) -> None:
        if self.rank == 0:
            with self.reporting():
                append()
        self._meet(_Meeting.RECORD)
        if self.rank != 0:
            append()

    def compare(self, weights: Iterable[Tensor], *, releases: int, is_last: bool) -> None:
        if not (is_last or releases.bit_count() == 1 or releases % _COMPARED_EVERY == 0):
            return
        told = self._meet(_Meeting.WEIGHTS, releases, digest_of_tensors(weights))
        if any(one != told[0] for one in told):
            self._is_over = True
            raise ProcessesError(
                f"Expected the same weights on all ranks after release {releases}, got others: "
                "have optimizers, schedulers and learning rates be the same, and change weights on "
                "no rank alone."
            )

    # ---- errors ------------------------------------------------------------------------------

    @contextmanager
    def reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._report(error)
            raise

    def close(self) -> None:
        """Leave the groups, in which nobody can meet any more."""
        self._is_over = True
        for group in (self._control, self._sums):
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)
        self._control = self._sums = None

    def _report(self, error: Exception) -> None:
        """Tell the others, where they meet next, unless they know that it is over."""
        if self._is_over:
            return
        with suppress(ProcessesError):
            self._meet(_Meeting.FAILED, said=f"{type(error).__name__}: {error}")
        self._is_over = True

    def _meet(self, meeting: _Meeting, *told: int, said: str = "") -> list[list[int]]:
        """Wait for all processes, and hear what each of them tells, rank by rank.

        Args:
            said: why this process fails.

        Raises:
            ProcessesError: a process failed, has ended, or is somewhere else.
        """
        if self._is_over:
            raise ProcessesError(
                "Expected a training that goes on, got one that has ended on all ranks: begin "
                "anew, from the last checkpoint and with the ledger that there is."
            )
        mine = torch.zeros(_TOLD, dtype=torch.int64)
        mine[: 1 + len(told)] = torch.tensor([meeting, *told])
        all_told = [torch.empty_like(mine) for _ in range(self.count)]
        self._waited(lambda: dist.all_gather(all_told, mine, group=self._control))
        places = [int(one[0]) for one in all_told]
        if _Meeting.FAILED in places:
            raise ProcessesError(self._heard(said))
        self._check_alike(places)
        return [one[1:].tolist() for one in all_told]

    def _heard(self, said: str) -> str:
        """What those say that failed, which all processes know of."""
        self._is_over = True
        messages: list[Any] = [""] * self.count
        self._waited(lambda: dist.all_gather_object(messages, said, group=self._control))
        failed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(messages) if text)
        return f"Expected all ranks to go on, but training has ended on {failed}"

    def _check_alike(self, told: Sequence[Any]) -> None:
        """Raise ProcessesError unless all ranks have told the same."""
        if any(one != told[0] for one in told):
            self._is_over = True
            raise ProcessesError(
                "Expected all ranks to take the same steps, but they are at different places "
                f"({', '.join(map(str, told))}): begin, break off and end loops on all ranks alike."
            )

    def _waited(self, communicate: Callable[[], Any]) -> None:
        """Communicate, with an error that says what has become of the training."""
        try:
            communicate()
        except RuntimeError as error:
            self._is_over = True
            raise ProcessesError(
                "Expected all ranks to go on, but one has ended or did not come in time: training "
                "ends here; begin anew, from the last checkpoint and with the ledger that there "
                f"is ({str(error).splitlines()[0]})."
            ) from error


def digest_of_tensors(tensors: Iterable[Tensor]) -> int:
    """63 bits of the sums of all tensors' words: they tell weights that have gone different ways,
    not those whose places were exchanged."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        words = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8)
        found.update(int(words.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True))
    return int.from_bytes(found.digest()[:8], "little") >> 1


def _number(text: str) -> int:
    """63 bits of the digest of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _buckets(sums: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The small ones, of one type and device each time."""
    small = [total for total in sums if 0 < total.numel() < _BUCKET]
    for kind in dict.fromkeys((total.dtype, total.device) for total in small):
        bucket: list[Tensor] = []
        for total in small:
            if (total.dtype, total.device) != kind:
                continue
            if sum(one.numel() for one in bucket) >= _BUCKET:
                yield bucket
                bucket = []
            bucket.append(total)
        yield bucket
