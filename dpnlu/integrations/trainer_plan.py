"""The plan of a Hugging Face trainer: what its arguments say of batches, epochs and steps."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer

from dpnlu.mechanism.plan import UNITS, PrivacyPlan
from dpnlu.mechanism.ranges import check_choice
from dpnlu.mechanism.users import Users
from dpnlu.training.cutting import WhoseExamples, read_users


def plan_for_trainer(
    trainer: Trainer,
    users: Users | None,
    epsilon: float | None,
    delta: float | None,
    max_grad_norm: float,
    examples_per_user: int | None,
) -> PrivacyPlan:
    """The plan with the least noise for the trainer's epochs or steps.

    Args:
        users: whose the training examples are; None: the unit is the example.

    Raises:
        ValueError: there is no target, or the logical batch exceeds the data; see
            `PrivacyPlan.calibrate`.
    """
    if epsilon is None:
        raise ValueError("Expected `target_epsilon` or a `plan`, got neither.")
    size, unit = _size(trainer, users), "example" if users is None else "user"
    batch = _logical_batch(trainer)
    if batch > size:
        raise ValueError(
            f"Expected a logical batch of at most the {size} training {unit}s, got {batch}: lower "
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
        unit=unit,
        examples_per_user=examples_per_user,
    )


def check_users(trainer: Trainer, unit: str, users: WhoseExamples | None) -> Users | None:
    """Whose the training examples are; None: the unit is the example.

    Raises:
        ValueError: users are given exactly where they are not needed, or an example has none.
    """
    check_choice("unit", unit, UNITS)
    if (users is not None) != (unit == "user"):
        raise ValueError(
            f"Expected `users` exactly together with unit='user', got {users!r:.40} and "
            f"unit={unit!r}: say whose the examples are, by a column or a function."
        )
    return None if users is None else read_users(trainer.train_dataset, users)  # type: ignore[arg-type]


def _size(trainer: Trainer, users: Users | None) -> int:
    """Of the training data, in units."""
    dataset: Any = trainer.train_dataset
    return len(dataset) if users is None else len(users)


def _logical_batch(trainer: Trainer) -> int:
    args = trainer.args
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps)


def _steps(trainer: Trainer, per_pass: int) -> int:
    """As the Trainer counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    return max(1, math.ceil(args.num_train_epochs * per_pass))


def check_plan(
    trainer: Trainer, users: Users | None, plan: PrivacyPlan, epsilon: float | None
) -> None:
    """Whether a plan is one for what the trainer is told to do.

    Raises:
        ValueError: it is for other data or another number of steps, or a target is given as well.
    """
    if epsilon is not None:
        raise ValueError("Expected `target_epsilon` or a `plan`, got both.")
    size, steps = _size(trainer, users), _steps(trainer, plan.steps_per_epoch)
    if (size, steps) != (plan.num_examples, plan.steps):
        raise ValueError(
            f"Expected a plan for {size} {plan.unit}s and the trainer's {steps} steps, got one for "
            f"{plan.num_examples} and {plan.steps}: plan for what is trained."
        )
