"""Private training by the Trainer of PyTorch Lightning.

trainer = privatize_trainer(trainer, target_epsilon=8)
trainer.fit(module, loader)                      # as before; training_step returns (B,) losses
print(trainer.private.epsilon())

One batch of the Trainer is one logical batch, drawn by Poisson sampling from the data set of the
loader, so that its schedulers, logs, checkpoints and callbacks count steps as they do without
privacy. While the Trainer fits, the module's class is a subclass of its own: `training_step` clips
physical batches, adds noise and records the release, and `backward` leaves that to the optimizer.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dpnlu.integrations.lightning_privacy import LightningPrivacy, Settings
from dpnlu.integrations.lightning_support import (
    check_loader,
    check_module,
    check_supported,
    selections,
)
from dpnlu.integrations.planning import Target
from dpnlu.integrations.records import check_record, record_of
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.logical_loader import DrawnBatch

# What of a checkpoint is ours.
_RECORD = "dpnlu"


def privatize_trainer(
    trainer: Trainer,
    *,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    max_grad_norm: float = 1.0,
    clipping: str = "flat",
    clipping_groups: Sequence[Sequence[str]] | None = None,
    noise_schedule: str = "constant",
    plan: PrivacyPlan | None = None,
    physical_batch_size: int | None = None,
    resume: bool = False,
    engine: str | None = None,
    noise: torch.Generator | Literal["system"] | None = None,
    sampling_rng: np.random.Generator | None = None,
    verify: bool = True,
    log_private: bool = False,
) -> Trainer:
    """Make a trainer private; call `fit` as before, with a module whose `training_step` returns
    one loss for each example, (B,), or a dictionary with them as "loss".

    The trainer that was given becomes private itself; returned is the same object, of a subclass of
    its class, with the state of its privacy in `.private`: `plan`, `epsilon()`, `gradients`,
    `ledger`. The ledger is `_private/ledger.jsonl` in its `default_root_dir`.

    Guarantee: what the optimizer acts on, and what the module logs while it trains, is computed
    from the releases in the ledger and from public numbers alone; `log_private` excepts logs.
    Scores on validation data are not covered.

    Args:
        trainer: on one device. The expected logical batch is the `batch_size` of the loader; epochs
            or steps are its own.
        target_epsilon: > 0, of the whole training; infinity: no noise, and no guarantee.
        target_delta: in (0, 1); None: 1e-5, or 0.1 / number of examples if that is less.
        max_grad_norm: bound C > 0 on the gradient norm of an example.
        clipping, clipping_groups, noise_schedule: see `PrivacyPlan`; with them the noise is as
            little as the target allows. `dpnlu.AdamBC` is what `configure_optimizers` returns.
        plan: the mechanism, in place of all before.
        physical_batch_size: examples computed at once; None: the loader's `batch_size`.
        resume: go on with the ledger that is there; hand a checkpoint to `fit` as `ckpt_path`.
        log_private: keep what the module logs while it trains, which ε does not cover.

    The other arguments are those of `privatize`.

    Raises:
        ValueError: the trainer, or in `fit` the module or the loader, has something that cannot be
            made private, in one line.
    """
    if isinstance(trainer, _PrivateTrainer):
        raise ValueError("Expected a trainer that is not private, got one that is already.")
    target = Target(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        clipping_groups=clipping_groups,
        noise_schedule=noise_schedule,
    )
    target.check_alternative(plan)
    check_supported(trainer)
    settings = Settings(
        target=target,
        plan=plan,
        physical_batch_size=physical_batch_size,
        resume=resume,
        engine=engine,
        noise=noise,
        sampling_rng=sampling_rng,
        verify=verify,
        log_private=log_private,
    )
    for sentence in selections(trainer):
        warnings.warn(sentence, stacklevel=2)
    kind = type(trainer)
    private: Any = trainer
    private.__class__ = type(f"Private{kind.__name__}", (_PrivateTrainer, kind), {})
    private.private = LightningPrivacy(settings)
    private.callbacks.insert(0, _Attach(private.private))
    return trainer


class _PrivateTrainer(Trainer):  # type: ignore[misc]
    """What is different in a private trainer; made by `privatize_trainer`, never by a call.

    Attributes:
        private: its privacy.
    """

    private: LightningPrivacy

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """As of the Trainer; the batches of `train_dataloaders` are replaced."""
        check_supported(self)  # whatever was set since
        check_module(model)
        loader = check_loader(train_dataloaders, datamodule)
        kind = type(model)
        with self.private.opened(self, loader):
            attributes = {"_dpnlu_privacy": self.private}
            module: Any = model
            module.__class__ = type(f"Private{kind.__name__}", (_PrivateModule, kind), attributes)
            try:
                super().fit(model, _Passes(self.private), val_dataloaders, ckpt_path=ckpt_path)
            finally:
                module.__class__ = kind
                model.zero_grad()


class _PrivateModule(LightningModule):  # type: ignore[misc]
    """What is different in a module while a private trainer fits it. Its state is an attribute of
    the class, which is made for this one training; what else it has must not hide the user's."""

    _dpnlu_privacy: LightningPrivacy

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One logical batch; the optimizer is given what was released in `backward`."""
        training = self._dpnlu_privacy.training
        if training is None or not isinstance(batch, DrawnBatch):
            raise RuntimeError("Expected batches of the private loader: call trainer.fit().")
        self.trainer.optimizers[0].zero_grad()  # the last release, which has been acted on
        training.weights_changed()
        step = training.stepper(lambda physical: _losses(self, physical, batch_idx))
        for physical in batch:
            self._dpnlu_privacy.is_repeated = False
            step(physical)
            self._dpnlu_privacy.is_repeated = False
        if not training.remaining_steps:
            self.trainer.should_stop = True  # earlier than planned, where updates were lost
        return torch.zeros((), device=self.device)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Done before the step: here it would come after the release."""

    def backward(self, loss: Tensor, *arguments: Any, **named: Any) -> None:
        """Where gradients are expected to come, what was released comes."""
        self._dpnlu_privacy.hand_over()

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Logical batches stay as they are; their physical ones are moved one by one."""
        if isinstance(batch, DrawnBatch):
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def _apply_batch_transfer_handler(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        if isinstance(batch, DrawnBatch):
            return batch
        return super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    # ---- what must not be seen, and what must not be lost ------------------------------------

    def log(self, name: str, value: Any, *arguments: Any, **named: Any) -> None:
        """Nothing while it trains, as it is computed from private data without noise."""
        privacy = self._dpnlu_privacy
        if not self.trainer.training:
            super().log(name, value, *arguments, **named)
        elif privacy.settings.log_private and not privacy.is_repeated:
            # As a number: a tensor of this batch must not be met again in the next.
            is_number = isinstance(value, Tensor) and value.numel() == 1
            super().log(name, value.item() if is_number else value, *arguments, **named)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        super().log("epsilon", self._dpnlu_privacy.epsilon(), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert self._dpnlu_privacy.ledger is not None
        checkpoint[_RECORD] = record_of(self._dpnlu_privacy.ledger)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self._dpnlu_privacy.ledger is not None
        check_record(checkpoint.get(_RECORD), self._dpnlu_privacy.ledger, place="`ckpt_path`")
        super().on_load_checkpoint(checkpoint)


def _losses(module: _PrivateModule, physical: Any, batch_idx: int) -> Tensor:
    """(B,), by the user's `training_step`; called again where the independence of examples is
    checked."""
    users: Any = super(_PrivateModule, module)
    batch = users._apply_batch_transfer_handler(users._on_before_batch_transfer(physical))
    takes_number = "batch_idx" in inspect.signature(users.training_step).parameters
    output = users.training_step(batch, batch_idx) if takes_number else users.training_step(batch)
    module._dpnlu_privacy.is_repeated = True
    losses: Tensor = output["loss"] if isinstance(output, Mapping) else output
    return losses


class _Passes:
    """What the Trainer takes for its loader: passes over logical batches, of public length."""

    def __init__(self, private: LightningPrivacy) -> None:
        self._private = private

    def __len__(self) -> int:
        assert self._private.plan is not None
        return self._private.plan.steps_per_epoch

    def __iter__(self) -> Iterator[DrawnBatch]:
        yield from self._private.batches()  # not before the first is asked for


class _Attach(Callback):  # type: ignore[misc]
    """Attaches when there is an optimizer."""

    def __init__(self, private: LightningPrivacy) -> None:
        self._private = private

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._private.begin(trainer, pl_module)
