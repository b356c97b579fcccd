"""The farm: trains many models through an injected function, and keeps what they say.

Reference models are small and many, so they are trained side by side, one thread each. Every
finished model's signals are on disk before the next begins: an interrupted farm goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks._validate import count as whole_number

Arrays = dict[str, NDArray[Any]]
# The number of a model -> what was measured on it. Must be importable, to reach other processes.
Train = Callable[[int], Mapping[str, NDArray[Any]]]

_MANIFEST = "manifest.json"


class WorkerDiedError(RuntimeError):
    """A process that trained models was killed; the models that were finished are kept."""


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
        ValueError: the directory holds results that depend on something else, or ones that cannot
            be read; or a number is out of range.
        WorkerDiedError: a process was killed.
    """
    count = whole_number("count", count)
    workers = os.cpu_count() or 1 if workers is None else whole_number("workers", workers, least=1)
    _check_manifest(directory, key)
    missing = [number for number in range(count) if not _path(directory, number).exists()]
    done = count - len(missing)
    with closing(_trained(train, missing, workers)) as results:
        for number, arrays in results:
            save_arrays(_path(directory, number), arrays)
            done += 1
            if progress is not None:
                progress(done, count)
    return [load_arrays(_path(directory, number)) for number in range(count)]


def _trained(
    train: Train, numbers: list[int], workers: int
) -> Generator[tuple[int, Mapping[str, NDArray[Any]]]]:
    """Results as they come. No process outlives this generator, nor the process it runs in."""
    if workers == 1 or len(numbers) <= 1:
        yield from ((number, train(number)) for number in numbers)
        return
    # Processes are spawned: a forked one inherits the state of a thread pool without its threads.
    context = get_context("spawn")
    # Whatever ends this process closes its end, and the workers end when they see that.
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        min(workers, len(numbers)), context, initializer=_begin, initargs=(lifeline,)
    )
    try:
        with _interrupts_held_back():
            futures = {pool.submit(train, number): number for number in numbers}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise WorkerDiedError(
            "Expected every worker to finish its models, but one was killed, perhaps for want of "
            "memory: run the same again to go on from the models that are finished."
        ) from None
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        lifeline.close()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Have the processes that are started within never see Ctrl-C, which a terminal sends to all:
    it is this process that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(lifeline: Connection) -> None:
    """In a worker: end with the lifeline, and compute in one thread."""
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with(lifeline: Connection) -> None:
    lifeline.poll(None)
    os._exit(1)


def _check_manifest(directory: Path, key: Mapping[str, Any]) -> None:
    manifest = directory / _MANIFEST
    content = json.dumps(key, indent=1, sort_keys=True, allow_nan=False)
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
    """Read what `save_arrays` wrote; nothing is unpickled.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    content = BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile and numpy answer damage in many ways
        raise ValueError(
            f"Expected {path} to hold arrays, found it damaged ({error}): remove it to have it "
            "made anew."
        ) from None
