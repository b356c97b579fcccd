"""Plans of the same ε and the same computation, to choose the batch size from.

They look at no data, and cost no privacy. In as many epochs, larger batches mean fewer steps and
more noise in each; what counts is how far the sum of all clipped gradients stands out from the sum
of all noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpnlu.mechanism.plan import PrivacyPlan

# Batch sizes to compare, relative to the plan's.
_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A batch size, and what follows for a given ε.

    Attributes:
        batch_size: expected size of a logical batch.
        sample_rate: with which each example enters it.
        steps: releases.
        noise_multiplier: the least that meets the ε.
        step_signal_to_noise: norm of the sum of a step's clipped gradients, if all were as long as
            the bound allows and had one direction, over the noise's standard deviation along it.
        signal_to_noise: the same for the sums over all steps.
    """

    batch_size: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    step_signal_to_noise: float
    signal_to_noise: float


def choices(plan: PrivacyPlan, *, target_epsilon: float) -> list[Choice]:
    """The plan beside those of other batch sizes, for as many epochs at the same ε, by size.

    Args:
        plan: a mechanism; its noise does not matter.
        target_epsilon: in (0, infinity).

    Raises:
        ValueError: ε is out of range, or no noise meets it.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(
            f"Expected a finite ε > 0 to compare plans at, got {target_epsilon}: without privacy "
            "there is no noise to choose."
        )
    sizes = {round(factor * plan.expected_batch_size) for factor in _FACTORS}
    possible = sorted(size for size in sizes if 1 <= size <= plan.num_examples)
    return [_choice(plan.of_batch_size(size, target_epsilon=target_epsilon)) for size in possible]


def _choice(plan: PrivacyPlan) -> Choice:
    signal = plan.divisor * plan.max_grad_norm
    variance = sum(e.steps * (e.noise_multiplier * plan.sensitivity) ** 2 for e in plan.events())
    return Choice(
        batch_size=round(plan.expected_batch_size),
        sample_rate=plan.sample_rate,
        steps=plan.steps,
        noise_multiplier=plan.noise_multiplier,
        step_signal_to_noise=signal / math.sqrt(variance / plan.steps),
        signal_to_noise=signal * plan.steps / math.sqrt(variance),
    )
