"""What of a Lightning trainer, a module and a loader can be made private; the rest is refused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import LBFGS
from torch.utils.data import DataLoader, IterableDataset

_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
_COST = (
    "on private data the scores are not covered by ε: choosing one of K models may cost up to K "
    "times as much"
)


def check_supported(trainer: Trainer) -> None:
    """Whether a trainer with these arguments can train privately.

    Raises:
        ValueError: it has something that cannot.
    """
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    # A whole number is one of batches: 1 is not 1.0.
    limit = trainer.limit_train_batches
    is_cut = isinstance(limit, int) or limit != 1.0 or bool(trainer.overfit_batches)
    if trainer.world_size > 1 or not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            "Expected a trainer on one device, got several or another strategy: each process would "
            "spend the whole budget; use devices=1, or a loop of your own with "
            "dpnlu.integrations.distributed."
        )
    if trainer.accumulate_grad_batches != 1 or any(
        c.going_to_accumulate_grad_batches() for c in schedulers
    ):
        raise ValueError(
            "Expected accumulate_grad_batches=1, got more: a batch is a logical one, which is cut "
            "into physical ones; raise the loader's batch_size, and set physical_batch_size."
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            "Expected no gradient_clip_val: the gradient of every example is clipped instead, to "
            "max_grad_norm of privatize_trainer; leave it out."
        )
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"Expected a precision of {', '.join(_PRECISIONS)}, got {trainer.precision}: a "
            "GradScaler skips steps depending on the data; use bf16-mixed."
        )
    if is_cut:
        raise ValueError(
            "Expected whole passes over the data, got limit_train_batches, overfit_batches or "
            "fast_dev_run: steps are planned for whole ones; set max_steps instead."
        )


def check_module(module: LightningModule) -> None:
    """Whether a module can be trained privately.

    Raises:
        ValueError: it does by itself what private training must do.
    """
    if not module.automatic_optimization:
        raise ValueError(
            "Expected a module with automatic optimization, got one that goes backward by itself, "
            "on gradients that are not clipped: return (B,) losses from training_step instead."
        )
    if type(module).backward is not LightningModule.backward:
        raise ValueError(
            "Expected the backward of Lightning, got the module's own: nothing goes backward here; "
            "leave it out."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "Expected a training_step of batches, got one that takes dataloader_iter: what it "
            "draws could not be answered; take `batch`."
        )


def check_loader(loader: Any, datamodule: Any) -> DataLoader[Any]:
    """The loader that was handed to `fit`, of which all but the sampling is kept.

    Raises:
        ValueError: it is not one loader of a data set with indices.
    """
    if datamodule is not None or loader is None or isinstance(loader, list | tuple | dict):
        raise ValueError(
            "Expected one loader as train_dataloaders, got none, several or a datamodule: hand "
            "over train_dataloaders=datamodule.train_dataloader(), and val_dataloaders alike."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "Expected a DataLoader of a data set with a length and indices, got "
            f"{type(loader).__name__}: examples cannot be drawn from a stream by Poisson sampling; "
            "hand over a map-style data set."
        )
    if loader.batch_size is None:
        raise ValueError(
            "Expected a loader with a batch_size, got one with a batch_sampler or without batches: "
            "examples are drawn by Poisson sampling; set batch_size, the expected one."
        )
    return loader


def check_training(trainer: Trainer) -> None:
    """Whether what the module has configured can train privately.

    Raises:
        ValueError: it cannot.
    """
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"Expected one optimizer, got {len(trainer.optimizers)}: a release is for all "
            "parameters at once; return one from configure_optimizers."
        )
    if isinstance(trainer.optimizers[0], LBFGS):
        raise ValueError(
            "Expected an optimizer that computes gradients once a step, got LBFGS: each time would "
            "be a release; use another."
        )
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise ValueError(
            "Expected a scheduler that counts steps, got one that reads scores, which ε does not "
            "cover: use another than ReduceLROnPlateau."
        )


def planned_steps(trainer: Trainer, *, per_pass: int) -> int:
    """How many steps the trainer will take, with so many in a pass over the data.

    Raises:
        ValueError: it has no end.
    """
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * per_pass)
    if not ends:
        raise ValueError(
            "Expected a trainer with max_epochs or max_steps, got one without an end: noise is "
            "planned for a number of steps."
        )
    return int(min(ends))


def selections(trainer: Trainer) -> Sequence[str]:
    """How the trainer chooses among models by their scores, in sentences."""
    found = []
    callbacks = trainer.callbacks
    if any(isinstance(one, ModelCheckpoint) and one.monitor for one in callbacks):
        found.append(f"The best checkpoint is chosen by its scores; {_COST}.")
    if any(isinstance(one, EarlyStopping) for one in callbacks):
        found.append(f"Training may be stopped by scores; {_COST}.")
    return found
