"""Private training by the Trainer of transformers, with its subclasses, callbacks and adapters.

trainer = privatize_trainer(trainer, target_epsilon=8)
trainer.train()
print(trainer.private.epsilon())

One batch of the Trainer is one logical batch, drawn by Poisson sampling, so that its schedulers,
logs, checkpoints and callbacks count steps as they do without privacy. Physical batches, clipping,
noise and the ledger are inside `training_step`; the optimizer, which the Trainer steps, finds what
was released.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from dpnlu.integrations.planning import Target
from dpnlu.integrations.trainer_callback import PrivacyCallback, show_epsilon, terminable
from dpnlu.integrations.trainer_card import add_statement
from dpnlu.integrations.trainer_checkpoints import Staging, checkpoint_for, complete
from dpnlu.integrations.trainer_data import Passes
from dpnlu.integrations.trainer_losses import PerExampleLoss, losses_of_trainer
from dpnlu.integrations.trainer_plan import planned
from dpnlu.integrations.trainer_privacy import Settings, TrainerPrivacy
from dpnlu.integrations.trainer_support import (
    check_not_begun,
    check_supported,
    private_arguments,
    replaced,
    selections,
)
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.cutting import WhoseExamples
from dpnlu.training.handle import privatize
from dpnlu.training.logical_loader import DrawnBatch

_LOGGER = logging.getLogger(__name__)

# What logs of training tell of the data; the first two with log_private=True are there.
_LOSSES = ("loss", "train_loss")
_PRIVATE_LOGS = ("grad_norm", "total_flos", "num_input_tokens_seen", "train_tokens_per_second")


def privatize_trainer(
    trainer: Trainer,
    *,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    max_grad_norm: float = 1.0,
    clipping: str = "flat",
    clipping_groups: Sequence[Sequence[str]] | None = None,
    noise_schedule: str = "constant",
    unit: str = "example",
    users: WhoseExamples | None = None,
    examples_per_user: int | None = None,
    plan: PrivacyPlan | None = None,
    per_example_loss: PerExampleLoss | None = None,
    engine: str | None = None,
    noise: torch.Generator | Literal["system"] | None = None,
    sampling_rng: np.random.Generator | None = None,
    verify: bool = True,
    max_epsilon: float | None = None,
    log_private: bool = False,
) -> Trainer:
    """Make a trainer private; call it as before.

    The trainer that was given becomes private itself, so that no reference to an ordinary one is
    left; returned is the same object, of a subclass of its class, with the state of its privacy in
    `.private`: `plan`, `epsilon()`, `steps_taken`, `gradients`, `ledger`.

    Guarantee: what leaves `train`, as weights, logs, checkpoints and model card, is computed from
    the releases in the ledger and from public numbers alone. Excepted are scores that the trainer
    computes on its own evaluation data, and the training loss with `log_private`.

    Args:
        trainer: any Trainer, before its training. The expected logical batch is
            `per_device_train_batch_size * gradient_accumulation_steps`; physical batches have
            `per_device_train_batch_size` examples; epochs or steps are those of its arguments.
        target_epsilon: > 0, of the whole training; infinity: no noise, and no guarantee.
        target_delta: in (0, 1); None: 1e-5, or 0.1 / number of examples if that is less.
        max_grad_norm: bound C > 0 on the gradient norm of an example, or of a user.
        clipping, clipping_groups, noise_schedule: see `PrivacyPlan`; with them the noise is as
            little as the target allows. `dpnlu.AdamBC` is handed to the trainer, as `optimizers`.
        unit: what is protected, an "example" or a "user"; the expected logical batch is counted in
            these.
        users: with unit="user", whose the examples of `train_dataset` are: the name of a column,
            also of one that `remove_unused_columns` drops, a function of an example, or all ids.
        examples_per_user: how many of them count in a step at most; see `PrivacyPlan`.
        plan: the mechanism, in place of a target and of all that it says itself; its steps,
            examples and expected batch must be the trainer's.
        per_example_loss: (model, inputs of a physical batch) -> (B,), each depending on its example
            alone. None: the trainer's own `compute_loss` or `compute_loss_func`, which must return
            (B,); without one by the `problem_type` of a sequence classifier, or for a token
            classifier as the mean over an example's own tokens; with label smoothing.
        engine, noise, sampling_rng, verify: see `privatize`. `noise` is no generator of torch's own
            default, whose state goes into checkpoints.
        max_epsilon: training stops before the step with which ε would exceed it; None: after all
            planned steps.
        log_private: log the training loss, which ε does not cover; the card says so.

    Raises:
        ValueError: the trainer has something that cannot be made private, in one line; see
            docs/trainers.md; or a number is out of range.
        UnsupportedLayerError: see `privatize`.
    """
    if isinstance(trainer, _PrivateTrainer):
        raise ValueError("Expected a trainer that is not private, got one that is already.")
    check_not_begun(trainer)
    check_supported(trainer)
    _check_noise(noise)
    target = Target(
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        clipping_groups=clipping_groups,
        noise_schedule=noise_schedule,
        unit=unit,
        examples_per_user=examples_per_user,
    )
    chosen, whose = planned(trainer, target, plan, users)
    losses = losses_of_trainer(trainer, per_example_loss)
    _check_model(trainer, chosen, engine)
    for sentence in replaced(trainer):
        _LOGGER.warning(sentence)
    for sentence in (chosen_by := selections(trainer)):
        warnings.warn(sentence, stacklevel=2)
    settings = Settings(
        physical_batch_size=trainer.args.per_device_train_batch_size,
        users=users if isinstance(users, str) or callable(users) else whose,
        engine=engine,
        noise=noise,
        sampling_rng=sampling_rng,
        verify=verify,
        max_epsilon=max_epsilon,
        log_private=log_private,
    )
    return _made_private(trainer, losses, TrainerPrivacy(chosen, settings, not_covered=chosen_by))


@dataclass
class _Own:
    """What a private trainer has for itself, in one attribute: the user's class may have any other.

    Attributes:
        losses_of: what is trained on.
        loss: of the step that is being taken: sum and number of losses; None: no step is.
        is_first: whether losses are those of the step, not of its checks.
        lost: releases after the checkpoint that training goes on from.
    """

    losses_of: PerExampleLoss
    staging: Staging = field(default_factory=Staging)
    loss: list[float] | None = None
    is_first: bool = False
    lost: int = 0


class _PrivateTrainer(Trainer):
    """What is different in a private trainer; made by `privatize_trainer`, never by a call.

    Attributes:
        private: its privacy.
    """

    private: TrainerPrivacy
    _dpnlu: _Own

    # ---- training ----------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As of the Trainer. After SIGTERM a checkpoint is saved and SystemExit raised."""
        check_supported(self)  # whatever was set since
        folder = Path(self._get_output_dir(trial))
        resumes = bool(resume_from_checkpoint)
        checkpoint = checkpoint_for(resume_from_checkpoint, folder)
        with (
            terminable(self.private),
            self.private.opened(folder, self.train_dataset, resumes=resumes, checkpoint=checkpoint),
        ):
            self._dpnlu.staging.clear(folder)
            begun = None if checkpoint is None else str(checkpoint)
            result = super().train(begun, trial, ignore_keys_for_eval)
            if self.private.is_terminated and not self._dpnlu_is_saved(folder):
                self._save_checkpoint(self.model_wrapped, trial)  # told to end after its last step
        if self.private.is_terminated:
            raise SystemExit(f"Terminated; a checkpoint is in {folder}: resume from it.")
        return result

    def _dpnlu_is_saved(self, folder: Path) -> bool:
        return (folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}").is_dir()

    def get_train_dataloader(self) -> Any:
        """Logical batches; never by way of accelerate, which repeats examples."""
        return Passes(self)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Begin where the ledger is: steps whose updates were lost are not taken again."""
        if max_steps != self.private.plan.steps:
            raise ValueError(
                f"Expected the {self.private.plan.steps} steps of the plan, got {max_steps}: leave "
                "batch size, epochs and steps as they were at privatize_trainer."
            )
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        made = len(self._dpnlu_ledger)
        self._dpnlu.lost = made - self.state.global_step
        self.state.global_step = made
        return made // num_update_steps_per_epoch, 0

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        """Attach to the model and to what the Trainer steps."""
        prepared: Any = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        model: nn.Module = prepared[0]
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps of the scheduler without the optimizer
            for _ in range(self._dpnlu.lost):
                scheduler.step()
        self.private.begin(model, optimizer)
        return model, prepared[1]

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One logical batch, whose release the optimizer finds as gradients."""
        training = self.private.training
        if training is None or not isinstance(inputs, DrawnBatch):
            raise RuntimeError("Expected batches of the private loader: call trainer.train().")
        model.train()
        if callable(begin := getattr(self.optimizer, "train", None)):
            begin()
        training.weights_changed()  # by the optimizer, or a callback
        step = training.stepper(lambda batch: self._dpnlu_losses(model, batch))
        self._dpnlu.loss = [0.0, 0]
        try:
            for batch in inputs:
                self._dpnlu.is_first = True
                step(batch)
            self.private.hand_over()
            mean = self._dpnlu.loss[0] / max(1, self._dpnlu.loss[1])
        finally:
            self._dpnlu.loss = None
        return torch.tensor(mean, device=self.args.device)

    def _dpnlu_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """(B,); called again where the independence of examples is checked."""
        inputs = dict(self._prepare_inputs(batch))
        with self.compute_loss_context_manager():
            losses = self._dpnlu.losses_of(model, inputs)
        own, logs = self._dpnlu, self.private.settings.log_private
        if logs and own.is_first and own.loss is not None:
            own.loss[0] += float(losses.detach().sum())
            own.loss[1] += len(losses)
        own.is_first = False
        return losses

    def hyperparameter_search(self, *arguments: Any, **named: Any) -> Any:
        """Each trial spends a budget of its own; choosing among them is not accounted."""
        sentence = (
            "Settings were chosen among trials by scores on validation data; every trial spends ε "
            "of its own, so that on private data K trials cost up to K times the ε of one."
        )
        warnings.warn(sentence, stacklevel=2)
        self.private.not_covered.append(sentence)
        return super().hyperparameter_search(*arguments, **named)

    # ---- what must not be seen ---------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without what is private, with ε; what is logged within a step is left out."""
        if self._dpnlu.loss is not None and not self.private.settings.log_private:
            return
        if self.private.training is not None:
            hidden = _PRIVATE_LOGS if self.private.settings.log_private else _PRIVATE_LOGS + _LOSSES
            for name in hidden:
                logs.pop(name, None)
            epsilon = self.private.epsilon()
            show_epsilon(self.callback_handler.callbacks, epsilon)
            if not any(name.startswith("eval_") for name in logs):  # tables of scores show all
                logs["epsilon"] = epsilon
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: they count tokens."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Tokens are not counted."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """None, and no pass over all parameters: it would be that of the noise."""

    def _finalize_training(
        self, trial: Any, num_train_samples: Any, start_time: Any
    ) -> TrainOutput:
        """Without the loss, which was not added up."""
        output: TrainOutput = super()._finalize_training(  # type: ignore[no-untyped-call]
            trial, num_train_samples, start_time
        )
        if self.private.settings.log_private:
            return output
        hidden = _PRIVATE_LOGS + _LOSSES
        metrics = {name: value for name, value in output.metrics.items() if name not in hidden}
        return TrainOutput(output.global_step, float("nan"), metrics)

    # ---- checkpoints and the card ------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, a folder that nobody resumes from."""
        return self._dpnlu.staging.place or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save it as a whole, with what it must not be resumed without."""
        folder = Path(self._get_output_dir(trial))
        with self._dpnlu.staging.begun(folder) as staged:
            super()._save_checkpoint(model, trial)
        checkpoint = complete(self, self._dpnlu_ledger, staged, folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushed when it is in its place."""
        if self._dpnlu.staging.place is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        """The card of the Trainer, with what the model claims about privacy."""
        super().create_model_card(*arguments, **named)
        if self.is_world_process_zero():
            folder: Any = self.args.output_dir
            add_statement(Path(folder) / "README.md", self.private)

    @property
    def _dpnlu_ledger(self) -> Any:
        assert self.private.ledger is not None
        return self.private.ledger


# ---- before training -------------------------------------------------------------------------


def _made_private(trainer: Trainer, losses: PerExampleLoss, privacy: TrainerPrivacy) -> Trainer:
    """The same object, of a subclass of its class."""
    trainer.args = private_arguments(trainer.args)
    kind = type(trainer)
    private: Any = trainer
    private.__class__ = type(f"Private{kind.__name__}", (_PrivateTrainer, kind), {})
    private.private, private._dpnlu = privacy, _Own(losses)
    # The first, so that all others see the epoch that it sets right.
    trainer.callback_handler.callbacks.insert(0, PrivacyCallback(privacy))
    return trainer


def _check_noise(noise: object) -> None:
    if noise is torch.default_generator:
        raise ValueError(
            "Expected a generator of your own for the noise, got torch's default one, whose state "
            "is saved in checkpoints: make one, torch.Generator()."
        )


def _check_model(trainer: Trainer, plan: PrivacyPlan, engine: str | None) -> None:
    """Refuse now what `privatize` would refuse when training begins."""
    model: Any = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = trainer.optimizer or torch.optim.SGD(trained or [torch.zeros(1)], lr=0.0)
    privatize(model, optimizer, plan, engine=engine).close()
