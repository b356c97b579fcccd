"""Numbers and choices that a caller hands over: whether they are in range, in the same words."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection

# More of anything is a slip of the keyboard, and could not be computed with either.
LARGEST_COUNT = 10**12

# Of what all generators of random numbers take.
LARGEST_SEED = 2**63 - 1


def check_positive(name: str, value: float, *, most: float = sys.float_info.max) -> None:
    """Raise ValueError unless 0 < value <= most."""
    if not 0 < value < math.inf:
        raise ValueError(f"Expected `{name}` to be finite and > 0, got {value}.")
    if value > most:
        raise ValueError(f"Expected `{name}` to be {most:g} at most, got {value:g}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < infinity."""
    if not 0 <= value < math.inf:
        raise ValueError(f"Expected `{name}` to be finite and >= 0, got {value}.")


def check_count(name: str, value: int, *, least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Raise ValueError unless the value is an integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected `{name}` to be an integer >= {least}, got {value!r}.")
    if value > most:
        raise ValueError(f"Expected `{name}` to be {most:.4g} at most, got a larger number.")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)}, got {value!r}.")
