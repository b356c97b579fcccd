"""What the arrays and numbers handed to an attack must look like; shared by the whole package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

# Truth values, integers of either kind, and floats: what has an order and a size. Text, dates and
# complex numbers could be converted too, and would then be scores that mean nothing.
_NUMERIC_KINDS = "biuf"

# A larger count is a mistake, and no longer a finite float.
_LARGEST_COUNT = 10**300


def scores_and_members(scores: ArrayLike, is_member: ArrayLike) -> tuple[Floats, Bools]:
    """Return both as arrays `(N,)`; there is at least one member and one non-member."""
    values = floats("scores", scores, dimensions=1)
    members = bools("is_member", is_member, shape=values.shape)
    if members.all() or not members.any():
        raise ValueError(
            f"Expected members and non-members, got {members.sum()} members among "
            f"{members.size} examples: score held-out examples as well."
        )
    return values, members


def floats(name: str, values: ArrayLike, *, dimensions: int | None = None) -> Floats:
    """Return a float64 array of that many dimensions, without NaN; infinities may stay."""
    array = any_array(name, values)
    if dimensions is not None and array.ndim != dimensions:
        raise ValueError(
            f"Expected `{name}` with {dimensions} dimension(s), got shape {array.shape}: "
            "pass one number per example (and per model)."
        )
    if array.dtype.kind not in _NUMERIC_KINDS:
        raise ValueError(
            f"Expected `{name}` as real numbers, got {array.dtype}: convert them to floats."
        )
    with np.errstate(over="ignore"):  # of what is wider than float64
        array = array.astype(np.float64)
    if np.isnan(array).any():
        raise ValueError(
            f"Expected `{name}` without NaN, got {np.isnan(array).sum()} of {array.size}: "
            "remove these examples, or find out why the model returns NaN."
        )
    return array


def bools(name: str, values: ArrayLike, *, shape: tuple[int, ...]) -> Bools:
    """Return a Boolean array of that shape; the integers 0 and 1 are understood too."""
    array = any_array(name, values)
    if array.shape != shape:
        raise ValueError(
            f"Expected `{name}` of shape {shape}, got {array.shape}: "
            "give one truth value for each score or reference signal."
        )
    if array.dtype != np.bool_ and not (array.dtype.kind in "iu" and np.isin(array, (0, 1)).all()):
        raise ValueError(
            f"Expected `{name}` of truth values, got {array.dtype}: use a Boolean array."
        )
    return array.astype(np.bool_)


def strings(name: str, values: Iterable[str]) -> list[str]:
    """Return a list of strings."""
    try:
        items = [] if isinstance(values, str) else list(values)
    except TypeError:
        items = []
    if not items or not all(isinstance(item, str) for item in items):
        raise ValueError(
            f"Expected `{name}` as a sequence of strings, got {shown(values)}: give one for each "
            "example."
        )
    return items


def any_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """Return the values as an array of whatever type they have, all of them known."""
    if np.ma.is_masked(values):
        raise ValueError(
            f"Expected `{name}` without masked entries, got some: leave these out everywhere."
        )
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected `{name}` as an array, got {type(values).__name__}: {reason}"
        ) from None


def number(name: str, value: float) -> float:
    """Return a real number, infinite perhaps, as a float."""
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if not is_number or isinstance(value, bool | np.timedelta64):
        raise ValueError(f"Expected `{name}` as one number, got {shown(value)}: pass a float.")
    try:
        converted = float(value)
    except OverflowError:  # of an integer
        converted = np.nan
    if np.isnan(converted):
        raise ValueError(f"Expected `{name}` as a number that a float holds, got {shown(value)}.")
    return converted


def count(name: str, value: int, *, least: int = 0) -> int:
    """Return a whole number of at least `least`."""
    is_whole = isinstance(value, int | np.integer)
    is_other = isinstance(value, bool | np.timedelta64)  # numpy takes a duration for an integer
    if not is_whole or is_other or not least <= value <= _LARGEST_COUNT:
        raise ValueError(
            f"Expected `{name}` as a whole number >= {least}, got {shown(value)}: it counts things."
        )
    return int(value)


def open_unit(name: str, value: float) -> float:
    """Return a number in (0, 1)."""
    checked = number(name, value)
    if not 0 < checked < 1:
        raise ValueError(f"Expected `{name}` in (0, 1), got {value}: it is a probability.")
    return checked


def half_open_unit(name: str, value: float) -> float:
    """Return a number in [0, 1)."""
    checked = number(name, value)
    if not 0 <= checked < 1:
        raise ValueError(f"Expected `{name}` in [0, 1), got {value}: it is a probability.")
    return checked


def privacy_parameters(epsilon: float, delta: float) -> tuple[float, float]:
    """Return ε ≥ 0 and δ with 0 ≤ δ < 1."""
    checked = number("epsilon", epsilon)
    if checked < 0:
        raise ValueError(f"Expected `epsilon` >= 0, got {epsilon}: infinity means no guarantee.")
    return checked, half_open_unit("delta", delta)


def one_of(name: str, value: str, *, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"Expected `{name}` to be one of {', '.join(choices)}, got {shown(value)}."
        )


def shown(value: object) -> str:
    """Return the value on one line, cut short where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
