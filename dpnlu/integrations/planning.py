"""What a trainer is asked to plan by, and the plan with the least noise for what it will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.fields import check_paired, groups_of_names
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.schedules import schedule


@dataclass(frozen=True, kw_only=True)
class Target:
    """A budget, and the mechanism that is to keep to it; by the names of `PrivacyPlan.calibrate`.

    Attributes:
        target_epsilon: None: the plan is given.
        target_delta: None: 1e-5, or 0.1 / number of units if that is less.

    Raises:
        ValueError: there is no such clipping rule or schedule, or groups are listed for a rule that
            takes none.
    """

    target_epsilon: float | None = None
    target_delta: float | None = None
    max_grad_norm: float = 1.0
    clipping: str = "flat"
    clipping_groups: Sequence[Sequence[str]] | None = None
    noise_schedule: str = "constant"
    unit: str = "example"
    examples_per_user: int | None = None

    def __post_init__(self) -> None:
        takes_groups = clipping_rule(self.clipping).takes_groups
        check_paired("clipping_groups", self.clipping_groups, takes_groups)
        if self.clipping_groups is not None:
            object.__setattr__(self, "clipping_groups", groups_of_names(self.clipping_groups))
        schedule(self.noise_schedule)

    def check_alternative(self, plan: PrivacyPlan | None) -> None:
        """Raise ValueError unless either a budget or a plan is given, and not parts of both."""
        if (plan is None) == (self.target_epsilon is None):
            raise ValueError(
                "Expected `target_epsilon` or a `plan`, got "
                f"{'neither' if plan is None else 'both'}: leave one of them out."
            )
        if plan is not None and (besides := self._other_than(plan)):
            raise ValueError(
                f"Expected a `plan` with this `{besides[0]}`, got one with another: plan with it, "
                "or give `target_epsilon` in place of the plan."
            )

    def plan(self, *, size: int, batch: int, steps: int, remedy: str) -> PrivacyPlan:
        """The plan with the least noise that meets the target.

        Args:
            size: of the training data, in units.
            batch: expected size of a logical batch, in units.
            steps: logical batches.
            remedy: what makes the logical batch smaller.

        Raises:
            ValueError: the logical batch exceeds the data; see `PrivacyPlan.calibrate`.
        """
        assert self.target_epsilon is not None
        if batch > size:
            raise ValueError(
                f"Expected a logical batch of at most the {size} training {self.unit}s, got "
                f"{batch}: lower {remedy}."
            )
        delta = self.target_delta
        return PrivacyPlan.calibrate(
            target_epsilon=self.target_epsilon,
            target_delta=min(1e-5, 0.1 / size) if delta is None else delta,
            num_examples=size,
            expected_batch_size=batch,
            steps=steps,
            max_grad_norm=self.max_grad_norm,
            clipping=self.clipping,
            clipping_groups=self.clipping_groups,
            noise_schedule=self.noise_schedule,
            unit=self.unit,
            examples_per_user=self.examples_per_user,
        )

    def _other_than(self, plan: PrivacyPlan) -> list[str]:
        """What was asked for, and is not what the plan says."""
        return [
            one.name
            for one in fields(self)
            if getattr(self, one.name) not in (one.default, getattr(plan, one.name, None))
        ]
