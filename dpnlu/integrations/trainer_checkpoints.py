"""Checkpoints of a Hugging Face trainer that are there whole or not at all.

The Trainer writes a checkpoint file by file into its place, and takes the newest folder for one to
resume from. Here it writes into a folder beside it, which is moved when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    rotate_checkpoints,
)

from dpnlu.integrations.trainer_privacy import FOLDER, has_begun, write_record
from dpnlu.mechanism.durable import make_directory, sync, sync_tree
from dpnlu.mechanism.ledger import Ledger

_STAGING, _OLD = "staging", "old"


class Staging:
    """Where a checkpoint is written before it is in its place.

    Attributes:
        place: the folder that the Trainer takes for its own meanwhile; None: none is written.
    """

    def __init__(self) -> None:
        self.place: str | None = None

    @contextmanager
    def begun(self, folder: Path) -> Iterator[Path]:
        """In here the Trainer writes into the folder that is yielded."""
        self.clear(folder)
        place = folder / FOLDER / _STAGING
        make_directory(place)
        self.place = str(place)
        try:
            yield place
        finally:
            self.place = None

    def clear(self, folder: Path) -> None:
        """Remove what is left of a checkpoint that was not completed."""
        for name in (_STAGING, _OLD):
            shutil.rmtree(folder / FOLDER / name, ignore_errors=True)


def complete(trainer: Trainer, ledger: Ledger, staging: Path, folder: Path) -> Path:
    """Move a staged checkpoint to its place among the others, of which old ones are removed.

    Returns:
        Its place.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    staged, final = staging / name, folder / name
    best = trainer.state.best_model_checkpoint
    if best is not None and Path(best).parent == staging:
        trainer.state.best_model_checkpoint = str(folder / Path(best).name)
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
    write_record(staged, ledger)
    sync_tree(staged)
    if final.exists():  # of the same step, and so of the same weights
        final.rename(folder / FOLDER / _OLD)
    staged.rename(final)
    sync(folder)
    for name in (_STAGING, _OLD):
        shutil.rmtree(folder / FOLDER / name, ignore_errors=True)
    os.utime(final)  # the newest of all: by this time they are sorted
    rotate_checkpoints(
        output_dir=str(folder),
        save_total_limit=trainer.args.save_total_limit,
        best_model_checkpoint=trainer.state.best_model_checkpoint,
        use_mtime=True,
    )
    return final


def checkpoint_for(asked: Any, folder: Path) -> Path | None:
    """The checkpoint to go on from; None: training begins, or goes on from the initial weights, as
    what a ledger without a checkpoint has spent stays spent.

    Args:
        asked: a path; True: the last one in the folder.

    Raises:
        ValueError: nothing has begun in the folder.
    """
    if not asked:
        return None
    if asked is not True:
        return Path(asked)
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]
    if found is None and not has_begun(folder):
        raise ValueError(
            f"Expected a training to resume in {folder}, found none: begin one by train()."
        )
    return None if found is None else Path(found)
