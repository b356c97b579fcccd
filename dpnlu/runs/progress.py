"""Progress of long work, on standard error, with the time that remains."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called with what is being done, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def bars(*, quiet: bool) -> Iterator[OnProgress]:
    """Show a bar for each thing that is being done; if `quiet`, none, not of libraries either."""
    if quiet:
        with _no_bars_of_hugging_face():
            yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, object] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield show


@contextmanager
def _no_bars_of_hugging_face() -> Iterator[None]:
    """Silence them while data and weights are loaded, in this process and those it starts."""
    # Which the libraries look at when they are loaded themselves.
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    loaded = sys.modules.get("transformers.utils.logging")
    shown = loaded if loaded is not None and loaded.is_progress_bar_enabled() else None
    if shown is not None:
        shown.disable_progress_bar()
    try:
        yield
    finally:
        if shown is not None:
            shown.enable_progress_bar()
        for name in names:
            del os.environ[name]
        os.environ.update(before)
