"""What is released, as data: Gaussian releases of Poisson-sampled sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

# The smallest δ of all accountants, and where `dp-accounting` composes, which tilts nothing: its
# rounding errors, about 1e-17 a step, must be small against δ.
SMALLEST_DELTA = 1e-12
_SMALLEST_DELTA_PER_STEP = 1e-13


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """`steps` Gaussian releases of a sum over a freshly Poisson-sampled batch.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by the sensitivity of the sum.
        sample_rate: probability in (0, 1] with which each example enters a batch.
        steps: how many such releases, >= 0.
        max_batch_size: batches are truncated to this size; None: not truncated.
        num_examples: the public number of examples; exactly together with `max_batch_size`.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int
    max_batch_size: int | None = None
    num_examples: int | None = None

    def __post_init__(self) -> None:
        truncation = (self.max_batch_size, self.num_examples)
        if not (
            isinstance(self.noise_multiplier, Real)
            and 0 <= self.noise_multiplier < math.inf
            and isinstance(self.sample_rate, Real)
            and 0 < self.sample_rate <= 1
            and _is_count(self.steps, least=0)
            and (truncation == (None, None) or all(_is_count(n, least=1) for n in truncation))
        ):
            raise ValueError(
                "Expected a release with finite noise_multiplier >= 0, sample_rate in (0, 1] and "
                f"steps >= 0, truncated to a positive size or not at all, got {self}."
            )


def check_delta(delta: float, *, name: str = "delta") -> None:
    """Raise ValueError unless δ is one that the accountants can do."""
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(
            f"Expected `{name}` in [{SMALLEST_DELTA:g}, 1), got {delta}: choose one well below "
            "1 / number of examples."
        )


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and value >= least


def check_digits(delta: float, steps: int) -> None:
    """Whether `dp-accounting`, which composes truncated batches, has digits left for δ.

    Raises:
        ValueError: its rounding after so many steps is not small against δ.
    """
    least = _SMALLEST_DELTA_PER_STEP * steps
    if delta < least:
        raise ValueError(
            f"Expected δ of at least {least:.2g} for so many steps where dp-accounting composes "
            f"(truncated batches, or accountant='dp-accounting'), got {delta}: raise δ, or use "
            "untruncated batches and the accountant 'pld'."
        )
