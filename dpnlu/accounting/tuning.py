"""ε of a choice among several trainings: what tuning costs.

Whoever trains with several settings and keeps the best model has released more than one training.
With a fixed number of trainings the whole is their composition. With a random number, drawn from a
distribution that nobody looks at, only the one that is kept counts beside the choice (Papernot and
Steinke 2022): for many trainings that is much less.

The score that decides must itself be private: of public data, or of the trained model and of data
that no claim is made for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpnlu.accounting.accountants import as_dp_event, epsilon, quiet, spent
from dpnlu.accounting.calibration import least_noise
from dpnlu.accounting.events import SampledGaussian, check_delta

# How the number of trainings is drawn -> the shape of the distribution, as in the paper.
_SHAPES = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}

# More trainings than anybody makes.
_MOST_TRIALS = 10**6

NUMBERS = ("fixed", *_SHAPES)
"""How the number of trainings may come about."""


@dataclass(frozen=True)
class Tuning:
    """What a choice among trainings costs.

    Attributes:
        number: a member of `NUMBERS`: how the number of trainings is to be drawn.
        epsilon: of the whole procedure.
    """

    number: str
    epsilon: float


def tuning_epsilon(
    events: Iterable[SampledGaussian], *, trials: float, number: str, delta: float
) -> float:
    """The ε at `delta` of the best of several trainings, each of which releases `events`.

    Guarantee: an upper bound, whatever settings are tried and however the best is told, if the
    trainings differ in nothing that `events` depend on, and the number is drawn as `number` says.

    Args:
        trials: how many trainings, on average; a whole number if "fixed".
        number: a member of `NUMBERS`. "poisson" may draw none, and then there is no model.
        delta: in [1e-12, 1).

    Raises:
        ValueError: a number is out of range, or batches are truncated and the number is random.
    """
    check_delta(delta)
    if number not in NUMBERS:
        raise ValueError(f"Expected `number` to be one of {', '.join(NUMBERS)}, got {number!r}.")
    if not 1 <= trials <= _MOST_TRIALS or (number == "fixed" and not float(trials).is_integer()):
        raise ValueError(
            "Expected a number of trials >= 1, a million at most, whole if it is fixed, got "
            f"{trials}: say how many trainings there are on average."
        )
    released = list(events)
    if number == "fixed":
        times = int(trials)
        return epsilon([replace(e, steps=times * e.steps) for e in released], delta=delta)
    if any(event.max_batch_size is not None for event in released):
        raise ValueError(
            "Expected batches that are not truncated for a random number of trials, got some that "
            "are: plan without `max_batch_size`, or for a fixed number."
        )
    return spent(released, lambda merged: _selected(merged, trials, _SHAPES[number], delta))


def cheapest_tuning(
    events: Iterable[SampledGaussian], *, trials: float, delta: float
) -> list[Tuning]:
    """Every way to draw the number of trials, the cheapest first; see `tuning_epsilon`."""
    released = list(events)
    ways = [name for name in NUMBERS if name != "fixed" or float(trials).is_integer()]
    found = [
        Tuning(name, tuning_epsilon(released, trials=trials, number=name, delta=delta))
        for name in ways
    ]
    return sorted(found, key=lambda tuning: tuning.epsilon)


def calibrate_tuning(
    events: Callable[[float], Sequence[SampledGaussian]],
    *,
    trials: float,
    number: str,
    target_epsilon: float,
    delta: float,
) -> float:
    """The smallest noise multiplier σ, within a thousandth, for which the best of several trainings
    that each release `events(σ)` meets the target.

    Raises:
        ValueError: as `tuning_epsilon`; the target is not in (0, infinity), or no noise multiplier
            below a million reaches it.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(
            f"Expected a finite ε > 0 to find the noise for, got {target_epsilon}: without privacy "
            "there is no noise to find."
        )

    def excess(sigma: float) -> float:
        found = tuning_epsilon(events(sigma), trials=trials, number=number, delta=delta)
        return math.log(max(found, 1e-300) / target_epsilon)

    return least_noise(excess)


def draw_trials(number: str, trials: float, rng: np.random.Generator) -> int:
    """How many trainings to make, which must stay unknown to whoever gets the model.

    Args:
        number: a member of `NUMBERS`.
        trials: their expected number, >= 1.
    """
    if number == "fixed":
        return int(trials)
    if number == "poisson":
        return int(rng.poisson(trials))
    if number == "geometric":
        return int(rng.geometric(1 / trials))
    return int(rng.logseries(1 - halting_probability(trials)))


def halting_probability(trials: float) -> float:
    """γ of the logarithmic distribution with this mean, (1 / γ - 1) / log(1 / γ)."""
    low, high = 1e-300, 1.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        is_too_many = middle < 1 and (1 / middle - 1) / -math.log(middle) > trials
        low, high = (middle, high) if is_too_many else (low, middle)
    return min(high, 1 - 1e-12)


def _selected(
    events: Sequence[SampledGaussian], trials: float, shape: float, delta: float
) -> float:
    from dp_accounting import dp_event, rdp

    steps = [dp_event.SelfComposedDpEvent(as_dp_event(one), one.steps) for one in events]
    training = dp_event.ComposedDpEvent(steps)
    accountant = rdp.RdpAccountant()
    with quiet():
        accountant.compose(dp_event.RepeatAndSelectDpEvent(training, trials, shape))
        return float(accountant.get_epsilon(delta))
