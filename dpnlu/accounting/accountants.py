"""Events to ε and back.

An event is an immutable description of what was released; an accountant turns a list of events
and δ into ε. The default accountant composes privacy loss distributions (`pld.py`): tight and
pessimistic, for what it approximates can only raise ε. Three others serve as second opinions:
`dp-accounting`'s PLD and RDP, and Opacus' PRV. Their libraries are imported when first needed,
since importing them costs about two seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from dpnlu.accounting.pld import Release, grid_for, pld_epsilon

# Calibration searches on a coarser grid first: faster, and still on the safe side.
_COARSE = 5.0
_ROUGH = 0.05  # relative width of a bracket in which log ε is almost a line in log σ
_NEWTON_STEPS = 3  # then the slope was wrong

# The smallest δ of all accountants, and where `dp-accounting` composes, which tilts nothing: its
# rounding errors, about 1e-17 a step, must be small against δ.
SMALLEST_DELTA = 1e-12
_SMALLEST_DELTA_PER_STEP = 1e-13

# With less noise ε is beyond 5000: as good as infinite.
_SMALLEST_NOISE_MULTIPLIER = 0.01
_LARGEST_NOISE_MULTIPLIER = 1e6


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
    return _spent(events, lambda released: ACCOUNTANTS[accountant](released, delta))


def calibrate_noise_multiplier(
    events: Callable[[float], Sequence[SampledGaussian]],
    *,
    target_epsilon: float,
    delta: float,
    tolerance: float = 1e-3,
) -> float:
    """The smallest noise multiplier σ, within tolerance, for which `events(σ)` meets the target.

    Guarantee: the ε of the returned σ, as the PLD accountant reports it, was computed and does not
    exceed `target_epsilon`.

    Args:
        events: noise multiplier -> the events it leads to; ε must fall as σ grows.
        target_epsilon: > 0.
        delta: in [1e-12, 1).
        tolerance: relative width of the final bracket of σ.

    Raises:
        ValueError: δ is out of range, or no noise multiplier below a million reaches the target.
    """
    check_delta(delta)

    def excess(sigma: float, coarsening: float) -> float:
        spent = _spent(events(sigma), lambda e: _pld_epsilon_on_grid(e, delta, coarsening))
        return math.log(max(spent, 1e-300) / target_epsilon)

    least = min(event.noise_multiplier for event in events(1.0))
    start = 1 / least if least else math.inf  # a schedule may fall until nothing is left
    bracket = _bracket(lambda sigma: excess(sigma, _COARSE), start=start)
    low, high = _narrowed(lambda sigma: excess(sigma, _COARSE), bracket, tolerance=_ROUGH)
    line = _Line(low, excess(low, _COARSE), high, excess(high, _COARSE))
    sigma = _newton(lambda sigma: excess(sigma, 1.0), line, tolerance=tolerance)
    if sigma is not None:
        return sigma
    fine = _bracket(lambda sigma: excess(sigma, 1.0), start=high, factor=1.02)
    return _narrowed(lambda sigma: excess(sigma, 1.0), fine, tolerance=tolerance)[1]


def _spent(
    events: Iterable[SampledGaussian], compute: Callable[[tuple[SampledGaussian, ...]], float]
) -> float:
    """What an accountant computes, unless it is clear without."""
    released = _merged(events)
    if not released:
        return 0.0
    if any(event.noise_multiplier < _SMALLEST_NOISE_MULTIPLIER for event in released):
        return math.inf
    return max(0.0, compute(released))


def check_delta(delta: float, *, name: str = "delta") -> None:
    """Raise ValueError unless δ is one that the accountants can do."""
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(
            f"Expected `{name}` in [{SMALLEST_DELTA:g}, 1), got {delta}: choose one well below "
            "1 / number of examples."
        )


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _bracket(
    excess: Callable[[float], float], *, start: float, factor: float = 1.5
) -> tuple[float, float]:
    """(low, high) with the target missed at low and met at high."""
    high = start
    while high <= _LARGEST_NOISE_MULTIPLIER and excess(high) > 0:
        high *= factor
    if high > _LARGEST_NOISE_MULTIPLIER:
        raise ValueError(
            "Expected a target ε that some noise multiplier below 1e6 reaches, got one that needs "
            "more: raise the target ε or δ, train for fewer steps, or let the noise decay less."
        )
    low = high / factor
    while low > _SMALLEST_NOISE_MULTIPLIER and excess(low) <= 0:
        low, high = low / factor, low
    return low, high


def _narrowed(
    excess: Callable[[float], float], bracket: tuple[float, float], *, tolerance: float
) -> tuple[float, float]:
    """A bracket so narrow, or with an upper end so close to the target, as the tolerance asks."""
    low, high = bracket
    low_excess, high_excess = excess(low), excess(high)
    while high / low > 1 + tolerance and high_excess < -tolerance / 2:
        # Aim slightly to the safe side of the root, so that the next `high` is a close one.
        share = _Line(low, low_excess, high, high_excess).root_share() + 0.02
        middle = low * (high / low) ** min(max(share, 0.05), 0.95)
        middle_excess = excess(middle)
        if middle_excess > 0:
            low, low_excess = middle, middle_excess
        else:
            high, high_excess = middle, middle_excess
    return low, high


@dataclass(frozen=True)
class _Line:
    """Through two points of the excess over log σ, one with the target missed, one with it met."""

    low: float
    low_excess: float
    high: float
    high_excess: float

    def root_share(self) -> float:
        """Where it meets zero, as a share of the way from low to high."""
        if not math.isfinite(self.low_excess):
            return 0.5
        return self.low_excess / (self.low_excess - self.high_excess)

    def slope(self) -> float:
        """Below 0."""
        return (self.high_excess - self.low_excess) / math.log(self.high / self.low)


def _newton(excess: Callable[[float], float], line: _Line, *, tolerance: float) -> float | None:
    """A σ that meets the target and is within `tolerance` of it, by steps along the line's slope.

    ε falls at least as fast as σ grows, so that σ is as close to the least one. None if the line
    did not lead there.
    """
    sigma: float = line.low * (line.high / line.low) ** line.root_share()
    off = 0.0
    for _ in range(_NEWTON_STEPS):
        step = -(off + tolerance / 4) / line.slope()
        if not abs(step) <= 1:
            return None
        sigma *= math.exp(step)
        off = excess(sigma)
        if -tolerance <= off <= 0:
            return sigma
    return None


def _merged(events: Iterable[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """The events without empty ones, equal mechanisms joined: order does not matter to ε.

    More noise than the largest is counted as the largest, which can only raise ε.
    """
    steps: dict[SampledGaussian, int] = {}
    for event in events:
        noise = min(event.noise_multiplier, _LARGEST_NOISE_MULTIPLIER)
        key = SampledGaussian(**{**event.__dict__, "steps": 0, "noise_multiplier": noise})
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(
        SampledGaussian(**{**key.__dict__, "steps": count}) for key, count in steps.items() if count
    )


def _pld_epsilon(events: tuple[SampledGaussian, ...], delta: float) -> float:
    return _pld_epsilon_on_grid(events, delta, 1.0)


@lru_cache(maxsize=4096)
def _pld_epsilon_on_grid(
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
    with _quiet_absl():  # it reports every Rényi order that it leaves out
        return _composed_epsilon(rdp.RdpAccountant(), events, delta)


@lru_cache(maxsize=4096)
def _prv_epsilon(events: tuple[SampledGaussian, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    _refuse_truncation(events, "prv")
    accountant = PRVAccountant()
    accountant.history = _releases(events)
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
        accountant.compose(_dp_event(event), event.steps)
    return float(accountant.get_epsilon(delta))


def _dp_event(event: SampledGaussian) -> Any:
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


@contextmanager
def _quiet_absl() -> Iterator[None]:
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
