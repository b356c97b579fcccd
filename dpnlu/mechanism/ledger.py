"""The ledger: an append-only record of what was released, and the only source of "ε spent".

An entry is written and forced to disk before the update it stands for is applied. A run that is
killed in between can over-report what it spent, never under-report.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.confirmation import SecondOpinion, confirm
from dpnlu.accounting.events import SampledGaussian
from dpnlu.mechanism.durable import locked, sync, write_all
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.ranges import check_positive

# 1 did not say whether all releases are sampled.
_FORMAT, _FORMATS = 2, (1, 2)
_Parsed = TypeVar("_Parsed")


class LedgerError(ValueError):
    """A ledger that is missing, already there, in use, closed or changed; or no ledger at all."""


class Ledger:
    """Releases made under one plan, in memory and, if a path is given, on disk.

    Each line of the file is one JSON object: first the plan and which releases may follow, then one
    line per release. While it is open for writing no other process can open it so.

    Attributes:
        identity: a random name, by which what is kept elsewhere, a checkpoint say, knows the ledger
            it belongs to; empty in a file of a version that gave none.
    """

    def __init__(
        self, plan: PrivacyPlan, *, path: Path | None = None, sampled_only: bool = False
    ) -> None:
        """Start an empty ledger.

        Args:
            sampled_only: every release will be of a sampled batch. That tells what a line stood for
                that was cut off while being written; else it counts as the costlier release.

        Raises:
            LedgerError: `path` exists: what was spent must not be overwritten.
        """
        self.plan = plan
        self.sampled_only = sampled_only
        self.identity = secrets.token_hex(16)
        self._releases: list[SampledGaussian] = []
        self._bounds: list[float | None] = []
        self._is_as_planned = True
        self._path = path
        self._file: _File | None = None
        if path is None:
            return
        try:
            self._file = _File(path, new=True)
        except FileExistsError:
            raise LedgerError(_exists(path)) from None
        try:
            self._file.append(self._first_line())
            sync(path.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            self.close()
            raise

    @classmethod
    def resume(cls, path: Path) -> Ledger:
        """Open the ledger at `path` to continue it.

        A last line that was cut off while being written counts as one full release, the costliest
        it may have been: its update may have been applied.

        Raises:
            LedgerError: no such file, one that another process continues, or a line that is no
                entry of this ledger.
        """
        try:
            file = _File(path, new=False)
        except FileNotFoundError as error:
            raise LedgerError(f"Expected a ledger at {path}: {error.strerror}.") from None
        try:
            ledger, torn_at = _parse(file.read(), path)
            if torn_at is not None:
                last = len(ledger) - 1
                file.replace_end(torn_at, _release_line(last, ledger._releases[last], None))
        except BaseException:
            file.close()
            raise
        ledger._file = file
        return ledger

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger at `path`, for reading: the file is neither changed nor kept open.

        Raises:
            LedgerError: no such file, or a line that is no entry of this ledger.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"Expected a ledger at {path}: {error.strerror}.") from None
        return _parse(content, path)[0]

    @classmethod
    def copied(cls, content: bytes) -> Ledger:
        """A ledger in memory alone, from what `content` says of another."""
        ledger, _ = _parse(content, Path("another ledger"))
        ledger._path = None
        return ledger

    def content(self) -> bytes:
        """All that it holds, in the form of its file."""
        made = enumerate(zip(self._releases, self._bounds, strict=True))
        return b"".join([self._first_line(), *(_release_line(place, *one) for place, one in made)])

    @property
    def bound(self) -> float | None:
        """The clipping bound after the last release that told of one; None: none has."""
        return next((bound for bound in reversed(self._bounds) if bound is not None), None)

    def append(self, release: SampledGaussian, *, bound: float | None = None) -> None:
        """Record one release; on return it is on disk. Call before the update is applied.

        Args:
            bound: what the clipping bound is from now on, where it follows the releases.

        Raises:
            ValueError: it is not what the plan says of its step.
            LedgerError: the file was closed, or opened for reading; or it is not what this process
                left, because it was removed, replaced, cut off or written to.
            OSError: the disk is full. In all cases the update must not be applied.
        """
        self._check_planned(release)
        if self._path is not None:
            if self._file is None:
                raise LedgerError(
                    f"Expected an open ledger, got that of {self._path}, which was closed or "
                    "opened for reading: continue it by Ledger.resume."
                )
            self._file.append(_release_line(len(self), release, bound))
        self._add(release, bound)

    def __len__(self) -> int:
        """Number of releases made so far."""
        return len(self._releases)

    def epsilon(self, *, delta: float | None = None, accountant: str = "pld") -> float:
        """ε of all recorded releases, at the plan's δ unless another is given."""
        delta = self.plan.target_delta if delta is None else delta
        return epsilon(self._releases, delta=delta, accountant=accountant)

    def confirmed(self) -> SecondOpinion | None:
        """What a second accountant says of `epsilon()`; None: there is none that can tell.

        Raises:
            UnconfirmedError: it contradicts.
        """
        return confirm(self.epsilon(), self._releases, delta=self.plan.target_delta)

    def remaining_steps(self, plan: PrivacyPlan) -> int:
        """How many sampled releases may follow under `plan`, the ledger's own but for its steps.

        Guarantee: no more than are planned; and where something costlier than planned is recorded,
        so few that ε of the whole does not exceed ε of `plan`.
        """
        made = len(self)
        if self._is_as_planned or made >= plan.steps:
            return max(0, plan.steps - made)
        planned = [plan.event_at(step) for step in range(made, plan.steps)]

        def spent(more: int) -> float:
            return epsilon(self._releases + planned[:more], delta=plan.target_delta)

        possible = range(len(planned) + 1)
        return max(0, bisect_right(possible, plan.epsilon(), key=spent) - 1)

    def close(self) -> None:
        """Close the file; the record in memory stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _first_line(self) -> bytes:
        described = {"plan": self.plan.to_dict(), "sampled_only": self.sampled_only}
        return _line({"ledger": _FORMAT} | described | {"identity": self.identity})

    def _possible(self) -> list[SampledGaussian]:
        """The events that the plan allows next: sampled and, unless all are, not sampled."""
        kinds = (True,) if self.sampled_only else (True, False)
        return [self.plan.event_at(len(self), sampled=sampled) for sampled in kinds]

    def _check_planned(self, release: SampledGaussian) -> None:
        possible = self._possible()
        noise = possible[0].noise_multiplier
        # Another machine may round the schedule's powers otherwise.
        is_planned_noise = math.isclose(release.noise_multiplier, noise, rel_tol=1e-12)
        if is_planned_noise and replace(release, noise_multiplier=noise) in possible:
            return
        rates = " or ".join(f"{event.sample_rate:g}" for event in possible)
        raise ValueError(
            f"Expected release {len(self)} as the plan has it, one step with noise multiplier "
            f"{noise:g} and sample rate {rates}, got {release.steps} with "
            f"{release.noise_multiplier:g} and {release.sample_rate:g}: the record is kept for "
            "this plan alone."
        )

    def _costliest(self) -> SampledGaussian:
        """The costliest release that a line that was cut off may have stood for."""
        delta = self.plan.target_delta
        return max(self._possible(), key=lambda event: epsilon([event], delta=delta))

    def _add(self, release: SampledGaussian, bound: float | None = None) -> None:
        self._is_as_planned &= release == self.plan.event_at(len(self))
        self._releases.append(release)
        self._bounds.append(bound)


class _File:
    """A locked file that this process alone appends to, and whose length it checks each time."""

    def __init__(self, path: Path, *, new: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0)
        self._path = path.absolute()  # the process may go to another folder
        # Unbuffered: what could not be written must not be written later, unasked.
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            if not locked(self._number):
                raise LedgerError(
                    f"Expected {path} to be free, but another training is writing to it: wait "
                    "until it has ended, or stop it."
                )
            self._size = os.fstat(self._number).st_size
            self._check_untouched()
        except BaseException:
            self.close()
            raise

    @property
    def _number(self) -> int:
        return self._file.fileno()

    def read(self) -> bytes:
        return os.pread(self._number, self._size, 0)

    def append(self, line: bytes) -> None:
        """Add a line and force it to disk; on failure the file stays as it was."""
        self._check_untouched()
        before, after = self._size, self._size + len(line)
        try:
            os.lseek(self._number, 0, os.SEEK_END)
            write_all(self._number, line)
            os.fsync(self._number)
            self._size = after
            self._check_untouched()
        except BaseException:
            self._size = before
            with suppress(OSError):
                if before <= os.fstat(self._number).st_size <= after:  # else it is not ours alone
                    os.ftruncate(self._number, before)
            raise

    def replace_end(self, start: int, line: bytes) -> None:
        """Put a line in place of all from `start` on. A process killed in between leaves one or
        the other, or both, but never neither."""
        os.lseek(self._number, start, os.SEEK_SET)
        write_all(self._number, line)
        self._size = start + len(line)
        os.ftruncate(self._number, self._size)
        os.fsync(self._number)

    def close(self) -> None:
        self._file.close()

    def _check_untouched(self) -> None:
        """Raise LedgerError if another process changed the file: if it was removed, cut off or
        replaced, later releases would go unrecorded; a line added stands for unplanned ones."""
        here, there = os.fstat(self._number), None
        with suppress(OSError):
            there = self._path.stat()
        if there is None or not os.path.samestat(here, there):
            change = "it was removed, moved or replaced"
        elif here.st_size != self._size:
            change = f"it has {here.st_size} bytes instead of {self._size}"
        else:
            return
        raise LedgerError(
            f"Expected {self._path} as this training left it, but {change}: training stops before "
            "its next update; leave the ledger alone while it runs."
        )


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _release_line(number: int, release: SampledGaussian, bound: float | None) -> bytes:
    content = vars(release) | {"bound": bound}
    known = {name: value for name, value in content.items() if value is not None}
    return _line({"release": number} | known)


def _exists(path: Path) -> str:
    with suppress(OSError):
        if b"\n" not in path.read_bytes():
            return (
                f"Expected no file at {path}, found one that was started and records nothing: "
                "remove it, or choose another folder."
            )
    return f"Expected no file at {path}, found a ledger: resume it, or choose another folder."


def _parse(content: bytes, path: Path) -> tuple[Ledger, int | None]:
    """The ledger, not open; and where its last line starts if that was cut off."""
    # Every complete line ends in a line break.
    first, *lines = content.split(b"\n")
    if not lines:
        raise LedgerError(f"Expected {path} to begin with the plan of a ledger; it does not.")
    *lines, torn = lines
    ledger = _parsed(_started, first, f"line 1 of {path}")
    ledger._path = path
    parse = partial(_release, ledger=ledger)
    for number, line in enumerate(lines, start=2):
        ledger._add(*_parsed(parse, line, f"line {number} of {path}"))
    if not torn:
        return ledger, None
    ledger._add(ledger._costliest())
    return ledger, len(content) - len(torn)


def _parsed(parse: Callable[[dict[str, Any]], _Parsed], line: bytes, place: str) -> _Parsed:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("it is no JSON object.")
        return parse(entry)
    except (KeyError, TypeError, ValueError) as error:
        text = line[:60].decode(errors="replace")
        raise LedgerError(f"Expected {place} to be a ledger entry, got {text!r}: {error}") from None


def _started(entry: dict[str, Any]) -> Ledger:
    if entry.get("ledger") not in _FORMATS:
        raise ValueError("a ledger begins with its plan.")
    sampled_only = entry["ledger"] > 1 and entry["sampled_only"]
    if not isinstance(sampled_only, bool):
        raise ValueError("`sampled_only` is true or false.")
    ledger = Ledger(PrivacyPlan.from_dict(entry["plan"]), sampled_only=sampled_only)
    ledger.identity = str(entry.get("identity", ""))
    return ledger


def _release(entry: dict[str, Any], *, ledger: Ledger) -> tuple[SampledGaussian, float | None]:
    number, bound = len(ledger), entry.pop("bound", None)
    if bound is not None:
        check_positive("bound", bound)
    if entry.pop("release", None) != number:
        raise ValueError(f"release {number} should follow; was a line removed?")
    release = SampledGaussian(**entry)
    ledger._check_planned(release)
    return release, bound
