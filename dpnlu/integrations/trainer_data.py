"""The training data of a Hugging Face trainer: as it would load them, drawn, and what tells them
from others."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer
from transformers.utils.import_utils import is_datasets_available

from dpnlu.training.cutting import read_users
from dpnlu.training.data_digest import digest_of
from dpnlu.training.logical_loader import DrawnBatch


def training_data(trainer: Trainer) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The data set, and what makes a batch of its examples, without the columns that the model does
    not take where the trainer removes them."""
    dataset, collate = trainer.train_dataset, trainer.data_collator
    if is_datasets_available():
        import datasets

        if isinstance(dataset, datasets.Dataset):
            return trainer._remove_unused_columns(dataset, description="training"), collate
    return dataset, trainer._get_collator_with_removed_columns(collate, description="training")


class Passes:
    """What the Trainer takes for its loader: passes over logical batches, of public length."""

    def __init__(self, trainer: Any) -> None:
        """Find out whose the examples are, by the data set with all of its columns.

        Args:
            trainer: a private one.
        """
        self._trainer = trainer
        self.dataset = trainer.train_dataset
        users = trainer.private.settings.users
        self._users = None if users is None else read_users(self.dataset, users)

    def __len__(self) -> int:
        return int(self._trainer.private.plan.steps_per_epoch)

    def __iter__(self) -> Iterator[DrawnBatch]:
        private = self._trainer.private
        if private.training is None:
            raise RuntimeError("Expected a training to draw batches for: call trainer.train().")
        dataset, collate = training_data(self._trainer)
        loader = private.training.logical_loader(
            dataset,
            collate_fn=collate,
            users=self._users,
            physical_batch_size=private.settings.physical_batch_size,
            num_workers=self._trainer.args.dataloader_num_workers,
        )
        left = private.last_step - len(private.ledger)
        return islice(iter(loader), max(0, left))


def fingerprint(dataset: Dataset[Any] | Sequence[Any], *, key: str | None = None) -> dict[str, str]:
    """A keyed digest of the size and of at most 1000 examples, evenly spread, in their order.

    Guarantee: the digest alone tells nothing about the data. With the key, whoever guesses all of
    these examples can see that the guess is right.

    Args:
        key: 32 bytes in hexadecimal; None: new ones.

    Returns:
        "key" and "digest"; an empty digest if the data set answers otherwise each time it is asked.
    """
    key = key or secrets.token_hex(32)
    first, second = digest_of(dataset, key=key), digest_of(dataset, key=key)
    return {"key": key, "digest": first if first == second else ""}


def is_same(dataset: Dataset[Any] | Sequence[Any], known: Mapping[str, str]) -> bool:
    """Whether the fingerprint may be that of this data set."""
    if not known["digest"]:
        return True
    return hmac.compare_digest(known["digest"], digest_of(dataset, key=known["key"]))
