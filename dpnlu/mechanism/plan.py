"""The privacy plan: the mechanism as frozen data.

`PrivacyPlan` holds all that ε depends on and nothing else. Sampler, engine, noise and accountant
are built from the one plan, so they cannot disagree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.calibration import calibrate_noise_multiplier
from dpnlu.accounting.events import (
    SampledGaussian,
    check_digits,
)
from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.fields import (
    MOST_STEPS,
    check_paired,
    check_sample_rate,
    check_target_delta,
    groups_of_names,
    rate_for,
    steps_for,
)
from dpnlu.mechanism.ranges import check_choice, check_count, check_not_negative, check_positive
from dpnlu.mechanism.schedules import check_noise_is_left, schedule

# Each epoch of a noise schedule is a mechanism of its own; composing so many takes minutes.
MOST_SCHEDULED_EPOCHS = 10_000
# As good as 0, for which there is no noise.
_SMALLEST_EPSILON = 1e-300
# Why an ε as published is none.
NOT_AS_PUBLISHED = (
    "it takes C for the sensitivity, but one example can turn the mean of its micro-batch from any "
    "vector into any other, and so what is clipped to C from one side of the ball to the other: 2C"
)
SAMPLINGS = ("poisson", "truncated_poisson")
CLIPPING_UNITS = ("example", "microbatch", "user")
UNITS = ("example", "user")
# How neighbouring data sets differ: by one unit's presence, by one that is replaced by nothing, or
# by one that is replaced by another.
ADJACENCIES = ("add-remove-one", "zero-out-one", "replace-one")


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What is released, how often, and with how much noise.

    One step releases the sum of the clipped gradients of a freshly sampled logical batch, plus
    Gaussian noise of standard deviation `noise_multiplier * sensitivity`, times the factor of the
    schedule. With an adaptive bound it releases a noisy count beside it, and both together are one
    Gaussian release with this noise multiplier.

    Attributes:
        noise_multiplier: noise standard deviation / sensitivity where the schedule's factor is 1,
            >= 0; 0 trains without privacy and ε is infinite.
        max_grad_norm: bound C > 0 on the gradient norm of one clipping unit.
        sample_rate: probability in (0, 1] with which each unit enters a logical batch.
        steps: number of releases, in [1, 1e9]; empty logical batches count.
        target_delta: the δ at which ε is stated, in [1e-12, 1); should be below 1 / num_examples.
        num_examples: size of the training set in units, of users with unit="user"; treated as
            public.
        clipping: the rule, and how it divides C among groups of parameters (`dpnlu.mechanism.
            clipping`): "flat"; "automatic[:γ]", every gradient scaled to nearly C;
            "per_layer[:HOW]", or "groups[:HOW]" for `clipping_groups`, where HOW is uniform, size
            (its square root), weights (their norm, as training finds them) or, for groups, a number
            for each; "quantile:Q[:RATE[:BUDGET]]": the bound begins with C and follows the quantile
            Q of the norms, by a count that costs the share BUDGET of 1 / noise_multiplier².
        clipping_groups: names of trained parameters, or of modules that own some, for each group;
            only with clipping="groups…".
        clipping_unit: "example"; "microbatch": the mean gradient of each of `microbatches` groups,
            to which examples are assigned independently (eDP-SGD, Dupuy et al. 2022); or "user":
            the mean gradient of some of a user's examples, which it becomes with unit="user".
        microbatches: number of groups per logical batch; only with clipping_unit="microbatch".
        sampling: "poisson", or "truncated_poisson": batches above `max_batch_size` lose random
            members.
        max_batch_size: the truncation point in units; only with sampling="truncated_poisson".
        noise_schedule: the factor on noise_multiplier in epoch 0, 1, …: "constant";
            "exponential:F", F**epoch; "step:F:N", F once more after every N epochs; "inverse:F",
            1 / (1 + F * epoch); or "list:A,B,…", one for each epoch, the last one for all that
            follow. There must be noise in every epoch.
        unit: what is drawn, clipped as a whole and protected: one "example", that is one labelled
            text; or one "user", with all of their examples (McMahan et al. 2018).
        examples_per_user: how many examples of a drawn user count in a step at most, chosen anew
            each time; only with unit="user".
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    target_delta: float
    num_examples: int
    clipping: str = "flat"
    clipping_unit: str = "example"
    microbatches: int | None = None
    sampling: str = "poisson"
    max_batch_size: int | None = None
    noise_schedule: str = "constant"
    unit: str = "example"
    examples_per_user: int | None = None
    clipping_groups: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.unit == "user" and self.clipping_unit == "example":
            object.__setattr__(self, "clipping_unit", "user")  # else a user would weigh K · C
        check_not_negative("noise_multiplier", self.noise_multiplier)
        check_positive("max_grad_norm", self.max_grad_norm)
        check_count("steps", self.steps, most=MOST_STEPS)
        check_count("num_examples", self.num_examples)
        check_sample_rate(self.sample_rate)
        check_choice("unit", self.unit, UNITS)
        check_target_delta(self.target_delta, self.num_examples, self.unit)
        takes_groups = clipping_rule(self.clipping).takes_groups
        check_paired("clipping_groups", self.clipping_groups, takes_groups)
        if self.clipping_groups is not None:
            object.__setattr__(self, "clipping_groups", groups_of_names(self.clipping_groups))
        check_choice("sampling", self.sampling, SAMPLINGS)
        check_choice("clipping_unit", self.clipping_unit, CLIPPING_UNITS)
        if (self.clipping_unit == "user") != (self.unit == "user"):
            raise ValueError(
                "Expected clipping_unit='user' exactly together with unit='user', got "
                f"{self.clipping_unit!r} and {self.unit!r}: leave `clipping_unit` out."
            )
        check_paired("examples_per_user", self.examples_per_user, self.unit == "user")
        check_paired("microbatches", self.microbatches, self.clipping_unit == "microbatch")
        check_paired("max_batch_size", self.max_batch_size, self.sampling == "truncated_poisson")
        if self.max_batch_size is not None:
            check_digits(self.target_delta, self.steps)  # now, and not after hours of training
        schedule(self.noise_schedule)
        if self.noise_schedule != "constant" and self.epochs > MOST_SCHEDULED_EPOCHS:
            raise ValueError(
                f"Expected {MOST_SCHEDULED_EPOCHS} epochs at most with a noise schedule, got "
                f"{self.epochs:.4g}: train for fewer, or with constant noise."
            )
        epochs = -(-self.steps // self.steps_per_epoch)
        check_noise_is_left(self.noise_schedule, self.noise_multiplier, epochs=epochs)

    @classmethod
    def calibrate(
        cls,
        *,
        target_epsilon: float,
        target_delta: float,
        num_examples: int,
        expected_batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
        max_grad_norm: float,
        clipping: str = "flat",
        clipping_unit: str = "example",
        microbatches: int | None = None,
        sampling: str = "poisson",
        max_batch_size: int | None = None,
        noise_schedule: str = "constant",
        unit: str = "example",
        examples_per_user: int | None = None,
        clipping_groups: Sequence[Sequence[str]] | None = None,
    ) -> PrivacyPlan:
        """The plan with the least noise that meets the target.

        Guarantee: `plan.epsilon() <= target_epsilon`.

        Args:
            target_epsilon: > 0; infinity gives a plan without noise.
            expected_batch_size: in [1, num_examples], in units; the sample rate is its share of the
                data.
            epochs: expected number of times each unit is visited; or give `steps`.
            steps: number of logical batches; or give `epochs`.

        The other arguments are those of the class.

        Raises:
            ValueError: an argument out of range, or both or neither of `epochs` and `steps` given.
        """
        if not target_epsilon > 0:
            raise ValueError(f"Expected `target_epsilon` > 0, got {target_epsilon}.")
        draft = cls(
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            sample_rate=rate_for(expected_batch_size, num_examples, unit),
            steps=steps_for(epochs, steps, expected_batch_size, num_examples),
            target_delta=target_delta,
            num_examples=num_examples,
            clipping=clipping,
            clipping_unit=clipping_unit,
            microbatches=microbatches,
            sampling=sampling,
            max_batch_size=max_batch_size,
            noise_schedule=noise_schedule,
            unit=unit,
            examples_per_user=examples_per_user,
            clipping_groups=clipping_groups,  # type: ignore[arg-type]  # made tuples of
        )
        return draft._calibrated(target_epsilon)

    @property
    def adjacency(self) -> str:
        """The neighbouring relation of the guarantee."""
        return "add-remove-one" if self.sampling == "poisson" else "zero-out-one"

    @property
    def sensitivity(self) -> float:
        """How far, in L2 norm, one unit can move the sum that a step releases; see
        `sensitivity_under`. It grows and falls with an adaptive bound, and so does the noise."""
        return self.sensitivity_under(self.adjacency)

    def sensitivity_under(self, adjacency: str) -> float:
        """The same for data sets that are neighbours in another way than `adjacency`, which alone
        is what ε is stated for. It is the same for all clipping rules.

        Clipping of examples or users: C, the unit's own clipped gradient; 2C where another unit
        takes its place. Micro-batches: 2C, as one example can turn the mean of its group from any
        vector into any other; the members of the other groups do not change, because each is
        assigned independently.

        Args:
            adjacency: one of `ADJACENCIES`.
        """
        check_choice("adjacency", adjacency, ADJACENCIES)
        is_double = self.clipping_unit == "microbatch" or adjacency == "replace-one"
        return self.max_grad_norm * (2.0 if is_double else 1.0)

    @property
    def expected_batch_size(self) -> float:
        """Mean number of units in a logical batch."""
        return self.sample_rate * self.num_examples

    @property
    def divisor(self) -> float:
        """The public number that turns the released sum into a mean."""
        return float(self.microbatches) if self.microbatches else self.expected_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each unit is visited once on average."""
        return max(1, round(1 / self.sample_rate))

    @property
    def epochs(self) -> float:
        """Expected number of times each unit is visited."""
        return self.steps * self.sample_rate

    def noise_multiplier_at(self, step: int) -> float:
        """The noise multiplier of the release with index `step`, counted from 0."""
        return self.noise_multiplier * schedule(self.noise_schedule)(step // self.steps_per_epoch)

    def noise_std_at(self, step: int, *, bound: float | None = None) -> float:
        """Standard deviation of the noise on each coordinate of the released sum.

        Args:
            bound: where the rule adapts it, what it is in this step; None: `max_grad_norm`.
        """
        adaptation = clipping_rule(self.clipping).adaptation
        factor = 1.0 if adaptation is None else adaptation.sum_factor()
        scale = 1.0 if bound is None else bound / self.max_grad_norm
        return self.noise_multiplier_at(step) * factor * self.sensitivity * scale

    def count_std_at(self, step: int) -> float:
        """Standard deviation of the noise on the number of units left unclipped, less half of all
        units; only with a rule that adapts the bound.

        A unit that is added or removed moves it by 1/2, as it counts 1/2 or -1/2; one whose
        gradient becomes zero by 1, and so does an example in a micro-batch.
        """
        adaptation = clipping_rule(self.clipping).adaptation
        assert adaptation is not None
        is_half = self.adjacency == "add-remove-one" and self.clipping_unit != "microbatch"
        sensitivity = 0.5 if is_half else 1.0
        return adaptation.count_std(self.noise_multiplier_at(step), sensitivity=sensitivity)

    def event_at(self, step: int, *, sampled: bool = True) -> SampledGaussian:
        """What the release with index `step` tells an accountant.

        Args:
            sampled: False: its examples were handed over instead of drawn. Neither sampling nor
                truncation, which also draws, hides who is among them: a plain Gaussian release.
        """
        event = self._event(self.noise_multiplier_at(step), 1)
        if sampled:
            return event
        return replace(event, sample_rate=1.0, max_batch_size=None, num_examples=None)

    def events(self, *, steps: int | None = None) -> list[SampledGaussian]:
        """What the first `steps` releases (default: all) tell an accountant, epoch by epoch."""
        total = self.steps if steps is None else steps
        if self.noise_schedule == "constant":
            return [self._event(self.noise_multiplier, total)]
        starts = range(0, total, self.steps_per_epoch)
        return [
            self._event(self.noise_multiplier_at(start), min(self.steps_per_epoch, total - start))
            for start in starts
        ]

    def epsilon(
        self, *, steps: int | None = None, accountant: str = "pld", as_published: bool = False
    ) -> float:
        """ε at `target_delta` after `steps` releases (default: all planned ones).

        Args:
            as_published: of micro-batches, what is claimed where their sensitivity is taken for C,
                as eDP-SGD was published. **No guarantee**: see `NOT_AS_PUBLISHED`.

        Raises:
            ValueError: `as_published`, and the plan clips no micro-batches.
        """
        plan = self._with_sensitivity_of_one_clip() if as_published else self
        return epsilon(plan.events(steps=steps), delta=self.target_delta, accountant=accountant)

    def _with_sensitivity_of_one_clip(self) -> PrivacyPlan:
        """The plan of which the same noise would be twice as much."""
        if self.clipping_unit != "microbatch":
            raise ValueError(
                "Expected a plan that clips micro-batches for an ε as published, got one that "
                f"clips a {self.clipping_unit}: leave `as_published` out."
            )
        return self.with_noise(2 * self.noise_multiplier)

    def with_noise(self, noise_multiplier: float) -> PrivacyPlan:
        """The same plan with another noise multiplier."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever δ deserves was said when this plan was made
            return replace(self, noise_multiplier=noise_multiplier)

    def of_batch_size(self, expected_batch_size: int, *, target_epsilon: float) -> PrivacyPlan:
        """The plan of as many epochs in batches of another size, with the least noise that meets
        the target."""
        rate = rate_for(expected_batch_size, self.num_examples, self.unit)
        steps = steps_for(self.epochs, None, expected_batch_size, self.num_examples)
        draft = replace(self.with_noise(0.0), sample_rate=rate, steps=steps)
        return draft._calibrated(target_epsilon)

    def with_constant_noise(self) -> PrivacyPlan:
        """The plan of equal ε whose noise does not change: what a schedule has to beat.

        Guarantee: its ε does not exceed that of this plan.
        """
        if self.noise_schedule == "constant":
            return self
        constant = replace(self.with_noise(0.0), noise_schedule="constant")
        return constant._calibrated(max(self.epsilon(), _SMALLEST_EPSILON))

    def _calibrated(self, target_epsilon: float) -> PrivacyPlan:
        """The same plan with the least noise that meets the target."""
        if math.isinf(target_epsilon):
            return self
        return self.with_noise(
            calibrate_noise_multiplier(
                lambda sigma: self.with_noise(sigma).events(),
                target_epsilon=target_epsilon,
                delta=self.target_delta,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivacyPlan:
        """The plan that `to_dict` described.

        Raises:
            ValueError: a field is unknown or missing, or its value is out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Expected the fields of a privacy plan, got unknown {unknown}.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what δ deserves was said when it was planned
                return cls(**values)
        except TypeError as error:
            raise ValueError(f"Expected a complete privacy plan: {error}.") from None

    def _event(self, noise_multiplier: float, steps: int) -> SampledGaussian:
        truncated = self.sampling == "truncated_poisson"
        return SampledGaussian(
            noise_multiplier=noise_multiplier,
            sample_rate=self.sample_rate,
            steps=steps,
            max_batch_size=self.max_batch_size,
            num_examples=self.num_examples if truncated else None,
        )
