"""The plan of a Hugging Face trainer: what its arguments say of batches, epochs and steps."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer

from dpnlu.integrations.planning import Target
from dpnlu.mechanism.plan import UNITS, PrivacyPlan
from dpnlu.mechanism.ranges import check_choice
from dpnlu.mechanism.users import Users
from dpnlu.training.cutting import WhoseExamples, read_users


def planned(
    trainer: Trainer, target: Target, plan: PrivacyPlan | None, users: WhoseExamples | None
) -> tuple[PrivacyPlan, Users | None]:
    """The mechanism of a trainer, as it is given or with the least noise for its epochs or steps.

    Args:
        users: whose the training examples are, where the unit is the user.

    Returns:
        The plan; and the users, or None where the unit is the example.

    Raises:
        ValueError: there is neither a target nor a plan, or both; the plan is for other data or
            another number of steps; or users are given exactly where they are not needed.
    """
    target.check_alternative(plan)
    whose = _users(trainer, target.unit if plan is None else plan.unit, users)
    if plan is None:
        return _least_noise(trainer, whose, target), whose
    _check_plan(trainer, whose, plan)
    return plan, whose


def _least_noise(trainer: Trainer, users: Users | None, target: Target) -> PrivacyPlan:
    """The plan for the trainer's epochs or steps."""
    size, batch = _size(trainer, users), _logical_batch(trainer)
    return target.plan(
        size=size,
        batch=batch,
        steps=_steps(trainer, max(1, round(size / batch))),
        remedy="per_device_train_batch_size or gradient_accumulation_steps",
    )


def _users(trainer: Trainer, unit: str, users: WhoseExamples | None) -> Users | None:
    """Whose the training examples are; None: the unit is the example."""
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


def _check_plan(trainer: Trainer, users: Users | None, plan: PrivacyPlan) -> None:
    """Refuse a plan that is not for what the trainer is told to do."""
    size, steps = _size(trainer, users), _steps(trainer, plan.steps_per_epoch)
    if (size, steps) != (plan.num_examples, plan.steps):
        raise ValueError(
            f"Expected a plan for {size} {plan.unit}s and the trainer's {steps} steps, got one for "
            f"{plan.num_examples} and {plan.steps}: plan for what is trained."
        )
