"""What a private Lightning trainer has spent, and how it goes on after an interruption.

In the trainer's `default_root_dir`:

_private/ledger.jsonl    what was released so far; never rewound
_private/run.json        the keyed fingerprint of the data; to be kept as secret as they are

Every checkpoint says which ledger it belongs to, and how far that was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from dpnlu.integrations.lightning_support import check_training, planned_steps
from dpnlu.integrations.planning import Target
from dpnlu.integrations.records import ResumeError
from dpnlu.integrations.spending import EngineSettings, Spending
from dpnlu.integrations.trainer_data import fingerprint, is_same
from dpnlu.mechanism.durable import make_directory, write_json
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.runs.directory import new_ledger, resumed_ledger
from dpnlu.training.logical_loader import DrawnBatch

FOLDER, LEDGER, RUN = "_private", "ledger.jsonl", "run.json"


@dataclass(frozen=True, kw_only=True)
class Settings(EngineSettings):
    """What `privatize_trainer` was told; see there."""

    target: Target
    plan: PrivacyPlan | None
    physical_batch_size: int | None
    resume: bool
    log_private: bool


class LightningPrivacy(Spending):
    """The privacy of one trainer: its plan, and what `fit` has spent of it.

    Attributes:
        plan: of the last or present call of `fit`; None: there was none.
        is_repeated: whether the losses of a batch are being computed once more.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.plan = settings.plan
        self.is_repeated = False
        self._loader: DataLoader[Any] | None = None

    # ---- for the trainer ---------------------------------------------------------------------

    @contextmanager
    def opened(self, trainer: Trainer, loader: DataLoader[Any]) -> Iterator[None]:
        """In here steps may be taken on the data of a loader.

        Raises:
            LedgerError: there is a ledger and it is not to be resumed, or the other way round; or
                it was begun with another plan.
            ResumeError: it was begun with other data.
        """
        if self.settings.plan is not None:
            _check_plan(trainer, self.settings.plan)
        self.plan = self.settings.plan or _planned(trainer, loader, self.settings.target)
        place = Path(trainer.default_root_dir) / FOLDER
        self.ledger, self._last = _ledger(place, self.plan, loader.dataset, self.settings), None
        self.plan, self._loader = self.ledger.plan, loader
        try:
            yield
        finally:
            self._detach()
            self.ledger.close()
            if not len(self.ledger):
                (place / LEDGER).unlink(missing_ok=True)  # it records nothing
            self._loader = None

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Attach to the module and the optimizer that was configured for it."""
        check_training(trainer)
        assert self.plan is not None
        self._attach(module, trainer.optimizers[0], self.plan, self.settings)

    def batches(self) -> Iterator[DrawnBatch]:
        """What is left of the pass over the data that the ledger stands in."""
        if self.training is None or self._loader is None:
            raise RuntimeError("Expected a training to draw batches for: call trainer.fit().")
        size = self.settings.physical_batch_size or self._loader.batch_size
        assert size is not None
        return iter(
            self.training.logical_loader(
                self._loader.dataset,
                collate_fn=self._loader.collate_fn,
                physical_batch_size=size,
                num_workers=self._loader.num_workers,
            )
        )


def _planned(trainer: Trainer, loader: DataLoader[Any], target: Target) -> PrivacyPlan:
    """The plan with the least noise for the trainer's epochs or steps."""
    size, batch = len(loader.dataset), loader.batch_size  # type: ignore[arg-type]
    assert batch is not None
    return target.plan(
        size=size,
        batch=batch,
        steps=planned_steps(trainer, per_pass=max(1, round(size / batch))),
        remedy="the loader's batch_size",
    )


def _check_plan(trainer: Trainer, plan: PrivacyPlan) -> None:
    """Raise ValueError unless a plan is one for the steps that the trainer will take."""
    steps = planned_steps(trainer, per_pass=plan.steps_per_epoch)
    if steps != plan.steps:
        raise ValueError(
            f"Expected a plan for the trainer's {steps} steps, got one for {plan.steps}: plan for "
            "what is trained."
        )


def _ledger(place: Path, plan: PrivacyPlan, dataset: Any, settings: Settings) -> Ledger:
    """The ledger of a training that begins, or goes on."""
    if not settings.resume:
        make_directory(place)
        ledger = new_ledger(place, plan)
        write_json(place / RUN, fingerprint(dataset))
        return ledger
    ledger = resumed_ledger(place, plan)
    if not _is_same(dataset, place / RUN):
        ledger.close()
        raise ResumeError(
            f"Expected the data with which the training in {place} was begun, got others, or in "
            "another order: restore them, or train anew in another folder."
        )
    return ledger


def _is_same(dataset: Any, run: Path) -> bool:
    """Whether the fingerprint in a file may be that of the data set."""
    try:
        return is_same(dataset, json.loads(run.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return False
