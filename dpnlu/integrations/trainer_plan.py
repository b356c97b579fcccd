"""The plan of a Hugging Face trainer: what its arguments say of batches, epochs and steps."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer

from dpnlu.mechanism.plan import PrivacyPlan


def plan_for_trainer(
    trainer: Trainer, epsilon: float | None, delta: float | None, max_grad_norm: float
) -> PrivacyPlan:
    """The plan with the least noise for the trainer's epochs or steps.

    Raises:
        ValueError: there is no target, or the logical batch exceeds the data; see
            `PrivacyPlan.calibrate`.
    """
    if epsilon is None:
        raise ValueError("Expected `target_epsilon` or a `plan`, got neither.")
    size = _size(trainer)
    batch = _logical_batch(trainer)
    if batch > size:
        raise ValueError(
            f"Expected a logical batch of at most the {size} training examples, got {batch}: lower "
            "per_device_train_batch_size or gradient_accumulation_steps."
        )
    per_pass = max(1, round(size / batch))
    return PrivacyPlan.calibrate(
        target_epsilon=epsilon,
        target_delta=min(1e-5, 0.1 / size) if delta is None else delta,
        num_examples=size,
        expected_batch_size=batch,
        steps=_steps(trainer, per_pass),
        max_grad_norm=max_grad_norm,
    )


def _size(trainer: Trainer) -> int:
    dataset: Any = trainer.train_dataset
    return len(dataset)


def _logical_batch(trainer: Trainer) -> int:
    args = trainer.args
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps)


def _steps(trainer: Trainer, per_pass: int) -> int:
    """As the Trainer counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    return max(1, math.ceil(args.num_train_epochs * per_pass))


def check_plan(trainer: Trainer, plan: PrivacyPlan, epsilon: float | None) -> None:
    """Whether a plan is one for what the trainer is told to do.

    Raises:
        ValueError: it is for other data or another number of steps, or a target is given as well.
    """
    size, steps = _size(trainer), _steps(trainer, plan.steps_per_epoch)
    if epsilon is not None:
        raise ValueError("Expected `target_epsilon` or a `plan`, got both.")
    if (size, steps) != (plan.num_examples, plan.steps):
        raise ValueError(
            f"Expected a plan for {size} examples and the trainer's {steps} steps, got one for "
            f"{plan.num_examples} and {plan.steps}: plan for what is trained."
        )
