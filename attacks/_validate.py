"""What the arrays and numbers handed to an attack must look like; shared by the whole package."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


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


def floats(name: str, values: ArrayLike, *, dimensions: int) -> Floats:
    """Return a float64 array of that many dimensions, without NaN; infinities may stay."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(
            f"Expected `{name}` with {dimensions} dimension(s), got shape {array.shape}: "
            "pass one number per example (and per model)."
        )
    if np.isnan(array).any():
        raise ValueError(
            f"Expected `{name}` without NaN, got {np.isnan(array).sum()} of {array.size}: "
            "remove these examples, or find out why the model returns NaN."
        )
    return array


def bools(name: str, values: ArrayLike, *, shape: tuple[int, ...]) -> Bools:
    """Return a Boolean array of that shape; the integers 0 and 1 are understood too."""
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(
            f"Expected `{name}` of shape {shape}, got {array.shape}: "
            "give one truth value for each score or reference signal."
        )
    if array.dtype != np.bool_ and not (
        np.issubdtype(array.dtype, np.integer) and np.isin(array, (0, 1)).all()
    ):
        raise ValueError(
            f"Expected `{name}` of truth values, got {array.dtype}: use a Boolean array."
        )
    return array.astype(np.bool_)


def open_unit(name: str, value: float) -> None:
    """Raise unless 0 < value < 1."""
    if not 0 < value < 1:
        raise ValueError(f"Expected `{name}` in (0, 1), got {value}: it is a probability.")


def privacy_parameters(epsilon: float, delta: float) -> None:
    """Raise unless ε ≥ 0 and 0 ≤ δ < 1."""
    if not epsilon >= 0:
        raise ValueError(f"Expected `epsilon` >= 0, got {epsilon}: infinity means no guarantee.")
    if not 0 <= delta < 1:
        raise ValueError(f"Expected `delta` in [0, 1), got {delta}: it is a probability.")


def one_of(name: str, value: str, *, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)}, got {value!r}.")
