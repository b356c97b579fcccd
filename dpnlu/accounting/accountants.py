"""Events to ε.

An event is an immutable description of what was released; an accountant turns a list of events
and δ into ε. The default accountant composes privacy loss distributions (`pld.py`): tight and
pessimistic, for what it approximates can only raise ε. Three others serve as second opinions:
`dp-accounting`'s PLD and RDP, and Opacus' PRV. Their libraries are imported when first needed,
since importing them costs about two seconds.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dpnlu.accounting.events import SampledGaussian, check_delta, check_digits
from dpnlu.accounting.pld import Release, grid_for, pld_epsilon

# With less noise ε is beyond 5000: as good as infinite.
SMALLEST_NOISE_MULTIPLIER = 0.01
LARGEST_NOISE_MULTIPLIER = 1e6


def epsilon(events: Iterable[SampledGaussian], *, delta: float, accountant: str = "pld") -> float:
    """The ε of the composition of `events` at `delta`.

    Args:
        events: what was released; an empty list costs nothing.
        delta: in [1e-12, 1).
        accountant: a key of `ACCOUNTANTS`; truncated batches need "pld" or
            "dp-accounting".

    Returns:
        An upper bound on ε, never negative; infinite if some event carries (almost) no noise.

    Raises:
        ValueError: δ is out of range, or the accountant is unknown or cannot do it.
    """
    check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise ValueError(
            f"Expected `accountant` to be one of {sorted(ACCOUNTANTS)}, got {accountant!r}."
        )
    return spent(events, lambda released: ACCOUNTANTS[accountant](released, delta))


def spent(
    events: Iterable[SampledGaussian], compute: Callable[[tuple[SampledGaussian, ...]], float]
) -> float:
    """What an accountant computes, unless it is clear without."""
    released = _merged(events)
    if not released:
        return 0.0
    if any(event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for event in released):
        return math.inf
    return max(0.0, compute(released))


def _merged(events: Iterable[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """The events without empty ones, equal mechanisms joined: order does not matter to ε.

    More noise than the largest is counted as the largest, which can only raise ε.
    """
    steps: dict[SampledGaussian, int] = {}
    for event in events:
        noise = min(event.noise_multiplier, LARGEST_NOISE_MULTIPLIER)
        key = SampledGaussian(**{**event.__dict__, "steps": 0, "noise_multiplier": noise})
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(
        SampledGaussian(**{**key.__dict__, "steps": count}) for key, count in steps.items() if count
    )


def _pld_epsilon(events: tuple[SampledGaussian, ...], delta: float) -> float:
    return pld_epsilon_on_grid(events, delta, 1.0)


@lru_cache(maxsize=4096)
def pld_epsilon_on_grid(
    events: tuple[SampledGaussian, ...], delta: float, coarsening: float
) -> float:
    if _is_truncated(events):
        return _dp_accounting_epsilon_on_grid(events, delta, coarsening)
    return pld_epsilon(_releases(events), delta, coarsening=coarsening)


def _releases(events: tuple[SampledGaussian, ...]) -> list[Release]:
    return [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]


def _dp_accounting_epsilon(events: tuple[SampledGaussian, ...], delta: float) -> float:
    return _dp_accounting_epsilon_on_grid(events, delta, 1.0)


@lru_cache(maxsize=4096)
def _dp_accounting_epsilon_on_grid(
    events: tuple[SampledGaussian, ...], delta: float, coarsening: float
) -> float:
    from dp_accounting import pld

    check_digits(delta, sum(event.steps for event in events))
    grid = grid_for(_releases(events), delta) * coarsening
    accountant = pld.PLDAccountant(_relation(events), value_discretization_interval=grid)
    return _composed_epsilon(accountant, events, delta)


@lru_cache(maxsize=4096)
def _rdp_epsilon(events: tuple[SampledGaussian, ...], delta: float) -> float:
    from dp_accounting import rdp

    _refuse_truncation(events, "rdp")
    with quiet():  # it reports every Rényi order that it leaves out
        return _composed_epsilon(rdp.RdpAccountant(), events, delta)


@lru_cache(maxsize=4096)
def _prv_epsilon(events: tuple[SampledGaussian, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    _refuse_truncation(events, "prv")
    accountant = PRVAccountant()
    accountant.history = _releases(events)
    with warnings.catch_warnings():
        # It sizes its grid by Rényi orders; that the best is the last only makes the grid larger.
        warnings.filterwarnings("ignore", message="Optimal order")
        return float(accountant.get_epsilon(delta))


def _refuse_truncation(events: tuple[SampledGaussian, ...], accountant: str) -> None:
    if _is_truncated(events):
        raise ValueError(
            f"Expected untruncated Poisson batches for the {accountant!r} accountant, got "
            "truncated ones: use 'pld' instead."
        )


def _is_truncated(events: tuple[SampledGaussian, ...]) -> bool:
    return any(event.max_batch_size is not None for event in events)


def _composed_epsilon(accountant: Any, events: tuple[SampledGaussian, ...], delta: float) -> float:
    for event in events:
        accountant.compose(as_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def as_dp_event(event: SampledGaussian) -> Any:
    """One step of `event` in the vocabulary of `dp_accounting`."""
    from dp_accounting import dp_event

    if event.max_batch_size is not None:
        return dp_event.TruncatedSubsampledGaussianDpEvent(
            dataset_size=event.num_examples,
            sampling_probability=event.sample_rate,
            truncated_batch_size=event.max_batch_size,
            noise_multiplier=event.noise_multiplier,
        )
    gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
    return dp_event.PoissonSampledDpEvent(event.sample_rate, gaussian)


def _relation(events: tuple[SampledGaussian, ...]) -> Any:
    """Truncation is analysed under the zero-out relation, everything else under add/remove."""
    from dp_accounting import NeighboringRelation

    if _is_truncated(events):
        return NeighboringRelation.REPLACE_SPECIAL
    return NeighboringRelation.ADD_OR_REMOVE_ONE


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what `dp-accounting` reports of its own workings."""
    logger = logging.getLogger("absl")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


ACCOUNTANTS: dict[str, Callable[[tuple[SampledGaussian, ...], float], float]] = {
    "pld": _pld_epsilon,
    "dp-accounting": _dp_accounting_epsilon,
    "rdp": _rdp_epsilon,
    "prv": _prv_epsilon,
}
