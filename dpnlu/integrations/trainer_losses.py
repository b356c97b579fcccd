"""Which per-example losses a Hugging Face trainer trains on: its own, or those of its model's task.

The losses of transformers are means over the batch, which no one can take apart. Where the task is
known they are computed anew from the logits; where they are the user's, the user's must be (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dpnlu.integrations.losses import labelled_tokens, sequence_losses, token_losses
from dpnlu.integrations.trainer_data import training_data

#: (model, inputs of a physical batch) -> (B,)
PerExampleLoss = Callable[[nn.Module, dict[str, Any]], Tensor]

SEQUENCES, TOKENS = "ForSequenceClassification", "ForTokenClassification"
_REMEDY = (
    "hand over `per_example_loss`, a function (model, inputs) -> (B,) that computes one loss for "
    "each example, with reduction='none' and the mean over each example's own tokens"
)
# How far apart, relatively, a model's own loss and ours of the same logits may be.
_ROUNDING = 1e-3


def losses_of_trainer(trainer: Trainer, given: PerExampleLoss | None) -> PerExampleLoss:
    """What the trainer trains on, example by example.

    Args:
        given: the user's function; None: the trainer's own `compute_loss` or `compute_loss_func`
            where the user wrote one, else by the task of the model, checked against its own loss.

    Raises:
        ValueError: the task is not known, or the model's own loss is another one than its task's.
    """
    if given is not None:
        return given
    if type(trainer).compute_loss is not Trainer.compute_loss:
        return _OfTrainer(trainer, f"{type(trainer).__name__}.compute_loss")
    if trainer.compute_loss_func is not None:
        return _OfTrainer(trainer, "compute_loss_func")
    model = base_model(trainer.model)
    names = [kind.__name__ for kind in type(model).__mro__]
    task = next((t for t in (SEQUENCES, TOKENS) if any(n.endswith(t) for n in names)), None)
    if task is None:
        raise ValueError(
            "Expected a model for sequence or token classification, got "
            f"{type(model).__name__}: {_REMEDY}."
        )
    smoother = trainer.label_smoother
    smoothing = 0.0 if smoother is None else smoother.epsilon
    losses = _OfTask(task, getattr(model.config, "problem_type", None), smoothing)
    _check_agrees(trainer, losses)
    return losses


def base_model(model: Any) -> Any:
    """The model below the adapters of peft, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class _OfTrainer:
    """The losses that the user's trainer computes itself.

    Attributes:
        name: of the user's function, for messages.
    """

    trainer: Trainer
    name: str

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        losses = self.trainer.compute_loss(model, dict(inputs))
        if not (isinstance(losses, Tensor) and losses.dim() == 1):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"Expected {self.name} to return one loss for each example, shape (B,), got "
                f"{shape}: a mean over the batch cannot be clipped; have it do so, or {_REMEDY}."
            )
        return losses


@dataclass(frozen=True)
class _OfTask:
    """The losses of the model's task.

    Attributes:
        task: `SEQUENCES` or `TOKENS`.
        problem, smoothing: see `sequence_losses`.
    """

    task: str
    problem: str | None
    smoothing: float

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"Expected `labels` in the batch, got {sorted(inputs)}: {_REMEDY}.")
        # Without labels the model does not compute its mean over the batch.
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return self.of_logits(logits_of(outputs), labels)

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.task == TOKENS:
            return token_losses(logits, labels, smoothing=self.smoothing)
        return sequence_losses(logits, labels, problem=self.problem, smoothing=self.smoothing)

    def mean_as_in_models(self, losses: Tensor, labels: Tensor) -> Tensor:
        """What a model says of the batch: tokens count alike, not texts."""
        if self.task == SEQUENCES:
            return losses.mean()
        counts = labelled_tokens(labels)
        return (losses * counts).sum() / counts.sum()


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model that was given no labels."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits


def _check_agrees(trainer: Trainer, losses: _OfTask) -> None:
    """Raise ValueError unless the model's own loss of a few examples is what we make of them: a
    model with class weights, say, must not be trained on another loss than it was made for."""
    model: Any = trainer.model
    with _evaluating(model):
        inputs = _some_inputs(trainer)
        if "labels" not in inputs:
            return  # the first step says so, with the names that there are
        theirs, labels = model(**inputs), inputs["labels"]
        loss = theirs["loss"] if isinstance(theirs, Mapping) else theirs[0]
        logits = theirs["logits"] if isinstance(theirs, Mapping) else theirs[1]
        plain = _OfTask(losses.task, losses.problem, smoothing=0.0)
        ours = plain.mean_as_in_models(plain.of_logits(logits, labels), labels)
    if not torch.isclose(loss.float(), ours, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True):
        raise ValueError(
            f"Expected {type(base_model(model)).__name__} to have the loss of its task, "
            f"got another: {_REMEDY}."
        )


def _some_inputs(trainer: Trainer) -> dict[str, Any]:
    """A small batch."""
    dataset, collate = training_data(trainer)
    found = [dataset[number] for number in range(min(4, len(dataset)))]
    return dict(trainer._prepare_inputs(collate(found)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
