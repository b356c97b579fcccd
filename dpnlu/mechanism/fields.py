"""Fields of a privacy plan: whether they are in range and fit together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from dpnlu.accounting.events import check_delta
from dpnlu.mechanism.ranges import check_count

# A training of a millisecond a step takes twelve days for so many.
MOST_STEPS = 10**9


def rate_for(expected_batch_size: float, num_examples: int, unit: str) -> float:
    """The sample rate of batches of some expected size.

    Raises:
        ValueError: it is not between 1 and the number of units.
    """
    check_count("num_examples", num_examples)
    if not 1 <= expected_batch_size <= num_examples:
        raise ValueError(
            f"Expected a batch size between 1 and the number of {unit}s, {num_examples}, "
            f"got {expected_batch_size}."
        )
    return expected_batch_size / num_examples


def steps_for(
    epochs: float | None, steps: int | None, expected_batch_size: float, num_examples: int
) -> int:
    """The number of steps, which either is given or follows from the epochs.

    Raises:
        ValueError: both or neither is given, or there are too many.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"Expected either `epochs` or `steps`, got {epochs} and {steps}.")
    if steps is not None:
        return steps
    assert epochs is not None
    if not (epochs > 0 and math.isfinite(epochs)):
        raise ValueError(f"Expected `epochs` > 0, got {epochs}.")
    asked = epochs * num_examples / expected_batch_size
    if asked > MOST_STEPS:
        raise ValueError(
            f"Expected {MOST_STEPS:.4g} steps at most, got {asked:.4g}: lower the epochs, or raise "
            "the batch size."
        )
    return max(1, round(asked))


def check_sample_rate(value: float) -> None:
    """Raise ValueError unless it is a probability above 0."""
    if not 0 < value <= 1:
        raise ValueError(
            f"Expected `sample_rate` in (0, 1], got {value}. It is a probability: pass "
            "expected batch size / number of examples."
        )


def check_target_delta(value: float, num_examples: int, unit: str) -> None:
    """Raise ValueError unless the accountants can do δ; warn if it is too large to mean much."""
    check_delta(value, name="target_delta")
    if value >= 1 / num_examples:
        warnings.warn(
            f"δ = {value:g} is not below 1 / {num_examples} {unit}s: at this δ, publishing a few "
            f"{unit}s outright would count as private. Choose a smaller δ.",
            stacklevel=4,
        )


# Fields that another one needs.
_OWNERS = {
    "clipping_groups": "clipping='groups'",
    "examples_per_user": "unit='user'",
    "microbatches": "clipping_unit='microbatch'",
    "max_batch_size": "sampling='truncated_poisson'",
}


def check_paired(name: str, value: Any, needed: bool) -> None:
    """Raise ValueError unless a field is there exactly if another one needs it, counts >= 1."""
    if needed != (value is not None):
        owner = _OWNERS[name]
        raise ValueError(f"Expected `{name}` exactly together with {owner}, got {value}.")
    if value is not None and name != "clipping_groups":
        check_count(name, value)


def groups_of_names(listed: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Lists of names as tuples; which parameters they stand for, a model tells."""
    groups = tuple(tuple(some) for some in listed if not isinstance(some, str))
    names = [name for some in groups for name in some]
    if (
        len(groups) < len(listed)
        or not all(isinstance(n, str) and n for n in names)
        or () in groups
    ):
        raise ValueError(
            f"Expected `clipping_groups` to be lists of names of parameters, got {listed!r}."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Expected every name once in `clipping_groups`, got {twice[0]} twice: its gradient "
            "would enter the sum twice; leave one of them out."
        )
    return groups
