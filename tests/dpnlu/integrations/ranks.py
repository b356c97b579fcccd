"""Processes that train together, for tests: they are started once, and then told what to do."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed as dist

# Of a machine on which everything else runs as well.
PATIENCE = 240.0


@dataclass(frozen=True)
class Failed:
    """What a rank says instead of an answer.

    Attributes:
        kind: of the error.
    """

    kind: str
    message: str


class Ranks:
    """Some processes of a gloo group, on this machine.

    Tasks are functions of a module, whose first argument is the rank.
    """

    def __init__(self, count: int = 2) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.dpnlu.integrations.rank_tasks"])  # imported once
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, store, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def begin(self, task: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Have all ranks begin a task."""
        for pipe in self._pipes:
            pipe.send((task, arguments, named))

    def answer(self, rank: int) -> Any:
        """What a rank answers; None: it has ended."""
        if not self._pipes[rank].poll(PATIENCE):
            raise TimeoutError(f"rank {rank} has not answered within {PATIENCE} s")
        try:
            return self._pipes[rank].recv()
        except EOFError:
            return None

    def call(self, task: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """What all ranks answer."""
        self.begin(task, *arguments, **named)
        return [self.answer(rank) for rank in range(len(self._pipes))]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            task, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(task(rank, *arguments, **named))
        except Exception as error:
            pipe.send(Failed(type(error).__name__, str(error)))
