"""The ledger: an append-only record of what was released, and the only source of "ε spent".

An entry is written and forced to disk before the update it stands for is applied. A run that is
killed in between can over-report what it spent, never under-report.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dpnlu.accounting import SampledGaussian, epsilon
from dpnlu.plan import PrivacyPlan

_FORMAT = 1
_Parsed = TypeVar("_Parsed")


class LedgerError(ValueError):
    """A ledger that is missing, already there, closed, or not what a ledger looks like."""


class Ledger:
    """Releases made under one plan, in memory and, if a path is given, on disk.

    Each line of the file is one JSON object: first the plan, then one line per release.
    """

    def __init__(self, plan: PrivacyPlan, *, path: Path | None = None) -> None:
        """Start an empty ledger.

        Raises:
            LedgerError: `path` exists: what was spent must not be overwritten.
        """
        self.plan = plan
        self._releases: list[SampledGaussian] = []
        self._path = path
        self._file: FileIO | None = None
        if path is None:
            return
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise LedgerError(
                f"Expected no file at {path}, found a ledger: resume it, or choose another folder."
            ) from None
        self._file = _opened(path)
        try:
            self._write(_line({"ledger": _FORMAT, "plan": plan.to_dict()}))
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    @classmethod
    def resume(cls, path: Path) -> Ledger:
        """Continue the ledger at `path`.

        A last line that was cut off while being written counts as one full release, the costliest
        it may have been: its update may have been applied.

        Raises:
            LedgerError: no such file, or a line that is no ledger entry.
        """
        ledger, torn_at = _read(path)
        if torn_at is not None:
            last = len(ledger) - 1
            _overwrite_end(path, torn_at, _release_line(last, ledger._releases[last]))
        ledger._file = _opened(path)
        return ledger

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger at `path`, for reading: the file is neither changed nor kept open.

        Raises:
            LedgerError: no such file, or a line that is no ledger entry.
        """
        return _read(path)[0]

    def append(self, release: SampledGaussian) -> None:
        """Record one release; on return it is on disk. Call before the update is applied.

        Raises:
            ValueError: it is more than one step.
            LedgerError: the file was closed, or opened for reading.
            OSError: the disk is full or the file is gone; the update must then not be applied.
        """
        if release.steps != 1:
            raise ValueError(f"Expected one release of one step, got {release.steps} steps.")
        if self._path is not None:
            self._write(_release_line(len(self), release))
        self._releases.append(release)

    def __len__(self) -> int:
        """Number of releases made so far."""
        return len(self._releases)

    def epsilon(self, *, delta: float | None = None, accountant: str = "pld") -> float:
        """ε of all recorded releases, at the plan's δ unless another is given."""
        delta = self.plan.target_delta if delta is None else delta
        return epsilon(self._releases, delta=delta, accountant=accountant)

    def close(self) -> None:
        """Close the file; the record in memory stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        """Add a line and force it to disk; on failure the file stays as it was."""
        if self._file is None:
            raise LedgerError(
                f"Expected an open ledger, got that of {self._path}, which was closed or opened "
                "for reading: continue it by Ledger.resume."
            )
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(size)
            raise


def _opened(path: Path) -> FileIO:
    # Unbuffered: what could not be written must not be written later, unasked.
    return path.open("ab", buffering=0)


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _release_line(number: int, release: SampledGaussian) -> bytes:
    known = {name: value for name, value in vars(release).items() if value is not None}
    return _line({"release": number} | known)


def _read(path: Path) -> tuple[Ledger, int | None]:
    """The ledger, not open; and where its last line begins if that was cut off."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"Expected a ledger at {path}: {error.strerror}.") from None
    # Every complete line ends in a line break.
    first, *lines = content.split(b"\n")
    if not lines:
        raise LedgerError(f"Expected {path} to begin with the plan of a ledger; it does not.")
    *lines, torn = lines
    ledger = Ledger(_parsed(_plan, first, f"line 1 of {path}"))
    ledger._path = path
    for number, line in enumerate(lines):
        parse = partial(_release, number=number)
        ledger._releases.append(_parsed(parse, line, f"line {number + 2} of {path}"))
    if not torn:
        return ledger, None
    ledger._releases.append(_costliest(ledger.plan, len(ledger)))
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


def _plan(entry: dict[str, Any]) -> PrivacyPlan:
    if entry.get("ledger") != _FORMAT:
        raise ValueError("a ledger begins with its plan.")
    return PrivacyPlan.from_dict(entry["plan"])


def _release(entry: dict[str, Any], number: int) -> SampledGaussian:
    if entry.pop("release", None) != number:
        raise ValueError(f"release {number} should follow; was a line removed?")
    release = SampledGaussian(**entry)
    if release.steps != 1:
        raise ValueError("one line is one release, of one step.")
    return release


def _costliest(plan: PrivacyPlan, number: int) -> SampledGaussian:
    """The costliest release that a line that was cut off may have stood for."""
    events = [plan.event_at(number, sampled=sampled) for sampled in (True, False)]
    return max(events, key=lambda event: epsilon([event], delta=plan.target_delta))


def _overwrite_end(path: Path, start: int, line: bytes) -> None:
    """Put a line in place of all from `start` on. A process killed in between leaves one or the
    other, or both, but never neither."""
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        file.write(line)
        file.truncate()
        os.fsync(file.fileno())
