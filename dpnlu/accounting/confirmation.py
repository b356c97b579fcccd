"""A second opinion on ε, from an accountant that shares no code with the first.

Who signs a statement should not have to trust one implementation. Our own PLD accountant is
confirmed by that of `dp-accounting`, where rounding leaves it digits for δ, else by Opacus' PRV,
where its transform fits into memory. Both are upper bounds by their makers' account, computed in
other ways; only the distance of the grid on which `dp-accounting` computes is chosen here, and a
coarser one can only raise its ε.

Truncated batches are left to `dp-accounting` in the first place, and no other accountant has an
analysis of them. What nobody can confirm is said to be unconfirmed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.events import SampledGaussian, check_digits

# Beyond, the accountants' exponentials leave the range of floating-point numbers; nobody trains so.
_LARGEST_EPSILON = 500.0
# PRV computes each mechanism on a grid of about 2 ε sqrt(n log(12000 / δ) / 2) / 0.01 places: so
# many of them take a gibibyte and a quarter of a minute. The transforms' rounding, about 1e-17 a
# step, must be small against δ / 1000.
_PRV_ERROR = 0.01
_PRV_PLACES = 2e7
_PRV_DELTA_PER_STEP = 1e-14


class UnconfirmedError(RuntimeError):
    """Two accountants contradict each other: neither ε may be stated."""


@dataclass(frozen=True, kw_only=True)
class Slack:
    """By how much an accountant's ε may lie above ours without a contradiction.

    Measured over σ from 0.5 to 10, q from 1e-4 to 1, 1 to 100,000 steps and δ from 1e-9 to 1e-3,
    and held by a test over that grid.

    Attributes:
        absolute: in units of ε.
        relative: as a share of ε.
    """

    absolute: float
    relative: float

    def of(self, epsilon: float) -> float:
        return self.absolute + self.relative * epsilon


# With a margin: dp-accounting was found 0.0018 above at most, for ε below 0.1, where our grid is
# the finer one, and a share of 4e-5 below; PRV between 0.006 and 0.016 above, of which 0.01 is its
# own allowance for error.
SLACK = {
    "dp-accounting": Slack(absolute=0.003, relative=0.002),
    "prv": Slack(absolute=0.015, relative=0.001),
}


@dataclass(frozen=True, kw_only=True)
class SecondOpinion:
    """What another accountant says.

    Attributes:
        accountant: "dp-accounting" or "prv".
        epsilon: an upper bound, as ours is.
    """

    accountant: str
    epsilon: float


def second_opinion(events: Sequence[SampledGaussian], *, delta: float) -> SecondOpinion | None:
    """The ε of `events` by an accountant other than ours.

    Returns:
        None: no other accountant can tell, or ε is beyond 500.

    Raises:
        ValueError: δ is out of range.
    """
    ours = epsilon(events, delta=delta)
    is_truncated = any(event.max_batch_size is not None for event in events)
    if is_truncated or ours > _LARGEST_EPSILON:
        return None
    if _has_digits(delta, events):
        name = "dp-accounting"
    elif _prv_can(ours, delta, events):
        name = "prv"
    else:
        return None
    return SecondOpinion(accountant=name, epsilon=epsilon(events, delta=delta, accountant=name))


def confirm(
    stated: float, events: Sequence[SampledGaussian], *, delta: float
) -> SecondOpinion | None:
    """Have an ε confirmed before it is stated.

    Guarantee: if this returns an opinion, `stated` is not below it by more than the known slack of
    the accountant that gave it.

    Args:
        stated: the ε to be stated.
        events: what was released.

    Returns:
        None: no other accountant can tell.

    Raises:
        UnconfirmedError: the second ε is larger by more than its slack.
        ValueError: δ is out of range.
    """
    second = second_opinion(events, delta=delta)
    if second is None or second.epsilon <= stated + SLACK[second.accountant].of(stated):
        return second
    raise UnconfirmedError(
        f"Expected {second.accountant} to confirm ε = {stated:.6g} at δ = {delta:g}, but it says "
        f"{second.epsilon:.6g}: one of the two is wrong, and no ε is stated; report the plan and "
        "the versions of dpnlu and of that package."
    )


def _has_digits(delta: float, events: Sequence[SampledGaussian]) -> bool:
    """Whether `dp-accounting` has digits left for δ."""
    try:
        check_digits(delta, _steps(events))
    except ValueError:
        return False
    return True


def _prv_can(ours: float, delta: float, events: Sequence[SampledGaussian]) -> bool:
    """Whether PRV has digits left for δ, and grids that fit."""
    steps = _steps(events)
    grid = _PRV_ERROR / math.sqrt(steps * math.log(12e3 / delta) / 2)
    mechanisms = {(event.noise_multiplier, event.sample_rate) for event in events}
    places = len(mechanisms) * 2 * (ours + 1) / grid
    return delta >= _PRV_DELTA_PER_STEP * steps and places <= _PRV_PLACES


def _steps(events: Sequence[SampledGaussian]) -> int:
    return sum(event.steps for event in events)
