"""The directory of one training: whether it is ours, and what it holds before and after its end.

run.json                  what was asked for, and a fingerprint of the data
ledger.jsonl              what was released so far
checkpoint.safetensors    the weights, from the first step on

Whatever was interrupted is recognised by what is there. Without a release and a checkpoint nothing
has happened yet, and training starts anew. With the configuration of a model, which is written
last, the directory holds a finished one; then `run.json` and the checkpoint are removed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpnlu.mechanism.durable import (
    locked,
    make_directory,
    partial_of,
    remove,
    remove_partials,
    write_json,
)
from dpnlu.mechanism.ledger import Ledger, LedgerError
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.fingerprint import Fingerprint
from dpnlu.runs.model_directory import (
    CHECKPOINT,
    LEDGER,
    RUN,
    ModelDirectoryError,
    is_model,
    read_json,
)

# Relative; how far apart two versions may calibrate the noise of one plan.
_CALIBRATION = 0.01


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training was started with.

    Attributes:
        settings: what was asked for, as JSON.
        fingerprint: of the data; None: an earlier version, which took none, started it.
        physical_batch_size: that was found to fit into memory; None: it was not asked for.
    """

    settings: dict[str, Any]
    fingerprint: Fingerprint | None
    physical_batch_size: int | None = None


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Make the directory, if there is none, and keep other processes out of it.

    Raises:
        ValueError: another training is going on in it, or it is no directory.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(_occupied(directory))
    make_directory(directory)
    file = os.open(directory, os.O_RDONLY)
    try:
        if not locked(file):
            raise ValueError(
                f"Expected {directory} to be free, but another training is going on in it: wait "
                "until it has ended, or choose another folder."
            )
        yield
    finally:
        os.close(file)


def recognised(directory: Path, record: str) -> Any:
    """The content of the record, a JSON file, by which a directory is known to be ours.

    Returns:
        None: it is empty, but for what a process left that was killed while it wrote the record.

    Raises:
        ValueError: something else is in it.
    """
    names = {path.name for path in directory.iterdir()} - {partial_of(directory / record).name}
    if record in names:
        with suppress(ModelDirectoryError):
            if (content := read_json(directory / record)) is not None:
                return content
    if names:
        raise ValueError(_occupied(directory))
    return None


def interrupted_run(directory: Path, *, resume: bool) -> Run | None:
    """The training that is to be resumed, if any; what is left of a mere start is removed.

    Returns:
        None: training starts anew.

    Raises:
        ValueError: a finished model is there, something else, or a training that is not to be
            resumed.
    """
    if is_model(directory) and not (resume and (directory / RUN).exists()):
        raise ValueError(f"Expected no model in {directory}, found a finished one: choose another.")
    content = recognised(directory, RUN)
    if content is None:
        return None
    run = _parsed(content, directory)
    has_started = (directory / CHECKPOINT).exists() or _has_releases(directory)
    if not has_started and not is_model(directory):
        remove(directory / LEDGER)
        return None
    if not resume:
        raise ValueError(
            f"Expected {directory} to be empty, found an unfinished training: add --resume to "
            "resume it, or choose another folder."
        )
    return run


def record_run(directory: Path, run: Run) -> None:
    """Make the directory that of this training."""
    content = asdict(run)
    if run.physical_batch_size is None:
        del content["physical_batch_size"]
    write_json(directory / RUN, content)


def new_ledger(directory: Path, plan: PrivacyPlan) -> Ledger:
    """The ledger of a training that starts, whose batches are all drawn by the loader."""
    return Ledger(plan, path=directory / LEDGER, sampled_only=True)


def resumed_ledger(directory: Path, plan: PrivacyPlan) -> Ledger:
    """The ledger of a training that is resumed.

    Args:
        plan: what would be planned today; noise that was calibrated slightly differently is kept.

    Raises:
        LedgerError: it is missing, made for another plan, or has spent more than was planned.
    """
    ledger = Ledger.resume(directory / LEDGER)
    try:
        _check_resumed(ledger, plan, directory / LEDGER)
    except LedgerError:
        ledger.close()
        raise
    return ledger


def _check_resumed(ledger: Ledger, plan: PrivacyPlan, path: Path) -> None:
    recorded, noise = ledger.plan, plan.noise_multiplier
    is_alike = math.isclose(recorded.noise_multiplier, noise, rel_tol=_CALIBRATION)
    if not is_alike or replace(recorded, noise_multiplier=noise) != plan:
        raise LedgerError(
            f"Expected {path} to begin with the plan of this training, with noise multiplier "
            f"{noise:.4g} and {plan.steps} steps, got another: it was changed, or planned by "
            "another version; restore it, or train anew in another folder."
        )
    # A line that was cut off may have stood for a release without sampling.
    if (spent := ledger.epsilon()) > (planned := recorded.epsilon()):
        raise LedgerError(
            f"Expected ε = {planned:.4g} at most in {path}, got {spent:.4g}: more may have been "
            "spent than was asked for, and no model is saved; train anew in another folder."
        )


def check_unchanged(directory: Path, ledger: Ledger) -> None:
    """Raise LedgerError unless the file, which was closed, still holds what the ledger does."""
    path = directory / LEDGER
    if (found := len(Ledger.read(path))) != len(ledger):
        raise LedgerError(
            f"Expected the {len(ledger)} releases of this training in {path}, got {found}: it was "
            "changed, and the model is not saved; train anew in another folder."
        )


def tidy(directory: Path) -> None:
    """Remove what a finished model does not need; last `run.json`, by which this can be resumed."""
    remove_partials(directory)
    remove(directory / CHECKPOINT)
    remove(directory / RUN)


def _parsed(content: Any, directory: Path) -> Run:
    """What `record_run` wrote, or an earlier version."""
    try:
        if "settings" in content:
            return Run(
                settings=content["settings"],
                fingerprint=Fingerprint(**content["fingerprint"]),
                physical_batch_size=content.get("physical_batch_size"),
            )
        if {"data", "model", "epsilon"} <= content.keys():  # before there were fingerprints
            return Run(settings=content, fingerprint=None)
    except (AttributeError, KeyError, TypeError):
        pass
    raise ValueError(_occupied(directory))


def _has_releases(directory: Path) -> bool:
    """Whether the ledger has anything behind its first line."""
    path = directory / LEDGER
    return path.is_file() and bool(path.read_bytes().partition(b"\n")[2])


def _occupied(directory: Path) -> str:
    return f"Expected {directory} to be empty, found something else: choose another folder."
