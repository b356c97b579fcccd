"""Noise schedules: the factor on the noise multiplier in each epoch.

A schedule is fixed before training, so that ε is that of the composition of its epochs. One that
looks at validation scores of private data would be another release each time, and is not here. A
new schedule is one function and one line in `SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import takewhile

# Epoch, from 0 on -> factor on the noise multiplier.
Schedule = Callable[[int], float]

_FORMS = (
    "constant, exponential:F with F in (0, 1], step:F:N (F once more every N epochs), inverse:F "
    "with F >= 0 or list:A,B,... (a factor for each epoch)"
)


@lru_cache(maxsize=64)
def schedule(spec: str) -> Schedule:
    """The schedule that a text describes.

    Raises:
        ValueError: there is no such schedule, or one of its numbers is out of range.
    """
    name, *values = spec.split(":")
    make = SCHEDULES.get(name)
    try:
        if make is not None:
            return make(values)
    except ValueError:
        pass
    raise ValueError(f"Expected `noise_schedule` to be {_FORMS}, got {spec!r}.")


def check_noise_is_left(spec: str, noise_multiplier: float, *, epochs: int) -> None:
    """Raise ValueError if the schedule takes all noise away; without any, there is none to take."""
    if spec == "constant":
        return
    factor_of, scale = schedule(spec), noise_multiplier or 1.0
    noisy = sum(1 for _ in takewhile(lambda epoch: scale * factor_of(epoch) > 0, range(epochs)))
    if noisy < epochs:
        raise ValueError(
            f"Expected noise in every epoch, but `noise_schedule` {spec} reaches zero after "
            f"{noisy} of {epochs}: let it fall less, or train for fewer epochs."
        )


def _constant(values: Sequence[str]) -> Schedule:
    if values:
        raise ValueError
    return lambda epoch: 1.0


def _exponential(values: Sequence[str]) -> Schedule:
    (factor,) = map(float, values)
    _check(0 < factor <= 1)
    return lambda epoch: factor**epoch


def _step(values: Sequence[str]) -> Schedule:
    factor, epochs = values
    value, length = float(factor), int(epochs)
    _check(0 < value <= 1 and length >= 1)
    return lambda epoch: value ** (epoch // length)


def _inverse(values: Sequence[str]) -> Schedule:
    (factor,) = map(float, values)
    _check(factor >= 0 and math.isfinite(factor))
    return lambda epoch: 1 / (1 + factor * epoch)


def _list(values: Sequence[str]) -> Schedule:
    (listed,) = values
    factors = [float(value) for value in listed.split(",")]
    _check(all(0 <= factor < math.inf for factor in factors))
    return lambda epoch: factors[min(epoch, len(factors) - 1)]


def _check(is_in_range: bool) -> None:
    if not is_in_range:
        raise ValueError


SCHEDULES: dict[str, Callable[[Sequence[str]], Schedule]] = {
    "constant": _constant,
    "exponential": _exponential,
    "step": _step,
    "inverse": _inverse,
    "list": _list,
}
