"""The farm: trains many models through an injected function, and keeps what they say.

Reference models are small and many, so they are trained side by side, one thread each. Every
finished model's signals are on disk before the next begins: an interrupted farm goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
# The number of a model -> what was measured on it. Must be importable, to reach other processes.
Train = Callable[[int], Mapping[str, NDArray[Any]]]

_MANIFEST = "manifest.json"


def grow(
    train: Train,
    *,
    count: int,
    directory: Path,
    key: Mapping[str, Any],
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Arrays]:
    """Train models 0 … count - 1 and return what was measured on each.

    Args:
        train: trains one model and measures it.
        directory: where results are kept; models found there are not trained again, and a larger
            `count` adds to them.
        key: all that results depend on besides the number of the model, as JSON.
        workers: processes; None: one per core; 1: none besides this one.
        progress: told how many are finished, and of how many.

    Raises:
        ValueError: the directory holds results that depend on something else.
    """
    _check_manifest(directory, key)
    missing = [number for number in range(count) if not _path(directory, number).exists()]
    done = count - len(missing)
    for number, arrays in _trained(train, missing, workers or os.cpu_count() or 1):
        save_arrays(_path(directory, number), arrays)
        done += 1
        if progress is not None:
            progress(done, count)
    return [load_arrays(_path(directory, number)) for number in range(count)]


def _trained(
    train: Train, numbers: list[int], workers: int
) -> Iterator[tuple[int, Mapping[str, NDArray[Any]]]]:
    """Results as they come."""
    if workers == 1 or len(numbers) <= 1:
        yield from ((number, train(number)) for number in numbers)
        return
    # Processes are spawned: a forked one inherits the state of a thread pool without its threads.
    context = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(numbers)), context, initializer=_one_thread) as pool:
        futures = {pool.submit(train, number): number for number in numbers}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _check_manifest(directory: Path, key: Mapping[str, Any]) -> None:
    manifest = directory / _MANIFEST
    content = json.dumps(key, indent=1, sort_keys=True)
    if manifest.exists():
        if manifest.read_text(encoding="utf-8") != content:
            raise ValueError(
                f"Expected {directory} to hold models of this very study, found others: choose "
                "another folder, or remove this one."
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    partial = manifest.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(manifest)


def _path(directory: Path, number: int) -> Path:
    return directory / f"model-{number:04d}.npz"


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays to an npz file, which is there whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def load_arrays(path: Path) -> Arrays:
    """Read what `save_arrays` wrote; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
