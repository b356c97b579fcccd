"""The ledger: an append-only record of what was released, and the only source of "ε spent".

An entry is written, flushed and forced to disk before the update it stands for is applied. A run
that is killed in between can over-report what it spent, never under-report.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dpnlu.accounting import SampledGaussian, epsilon
from dpnlu.plan import PrivacyPlan

_FORMAT = 1


class LedgerError(ValueError):
    """A ledger file that is missing, already there, or not what a ledger looks like."""


class Ledger:
    """Releases made under one plan, in memory and, if a path is given, on disk.

    Each line of the file is one JSON object: first the plan, then one line per release.
    """

    def __init__(self, plan: PrivacyPlan, *, path: Path | None = None) -> None:
        """Start an empty ledger.

        Raises:
            LedgerError: `path` exists: what was spent must not be overwritten.
        """
        if path is not None and path.exists():
            raise LedgerError(
                f"Expected no file at {path}, found a ledger: resume it, or choose another folder."
            )
        self.plan = plan
        self._releases: list[SampledGaussian] = []
        self._file: IO[str] | None = None
        if path is not None:
            self._file = path.open("a", encoding="utf-8")
            try:
                self._write({"ledger": _FORMAT, "plan": plan.to_dict()})
            except OSError:
                self.close()
                path.unlink(missing_ok=True)
                raise

    @classmethod
    def resume(cls, path: Path) -> Ledger:
        """Continue the ledger at `path`.

        A last line that was cut off while being written counts as one full release: its update may
        have been applied.

        Raises:
            LedgerError: no such file, or a line that is no ledger entry.
        """
        plan, releases, torn = _read(path)
        ledger = cls(plan)
        ledger._releases = releases
        ledger._file = path.open("a", encoding="utf-8")
        if torn:
            _cut_torn_line(path)
            ledger.append(plan.event_at(len(releases)))
        return ledger

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger at `path`, for reading: the file is neither changed nor kept open.

        Raises:
            LedgerError: no such file, or a line that is no ledger entry.
        """
        plan, releases, torn = _read(path)
        ledger = cls(plan)
        ledger._releases = releases + ([plan.event_at(len(releases))] if torn else [])
        return ledger

    def append(self, release: SampledGaussian) -> None:
        """Record one release; on return it is on disk. Call before the update is applied.

        Raises:
            OSError: the disk is full or the file is gone; the update must then not be applied.
        """
        if self._file is not None:
            self._write(
                {"release": len(self._releases)}
                | {name: value for name, value in vars(release).items() if value is not None}
            )
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

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _read(path: Path) -> tuple[PrivacyPlan, list[SampledGaussian], bool]:
    """Plan, releases, and whether the last line was cut off."""
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise LedgerError(f"Expected a ledger at {path}: {error.strerror}.") from None
    torn = lines[-1] != ""  # every complete line ends in a line break
    complete = lines[:-1]
    entries = [_entry(line, path, number) for number, line in enumerate(complete, start=1)]
    if not entries or entries[0].get("ledger") != _FORMAT:
        raise LedgerError(f"Expected {path} to begin with the plan of a ledger; it does not.")
    try:
        plan = PrivacyPlan.from_dict(entries[0]["plan"])
        releases = [_release(entry) for entry in entries[1:]]
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"Expected {path} to hold ledger entries: {error}") from None
    return plan, releases, torn


def _entry(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise LedgerError(f"Expected a JSON object in line {number} of {path}, got {line[:60]!r}.")
    return entry


def _release(entry: dict[str, Any]) -> SampledGaussian:
    return SampledGaussian(**{name: value for name, value in entry.items() if name != "release"})


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    with path.open("rb+") as file:
        file.truncate(content.rfind(b"\n") + 1)
