"""Lower bounds on ε from scores: what the training claims must be at least this large.

A bound exceeds the true ε with probability at most 1 - confidence, under the assumption its result
states. Take the bound of one audit fixed beforehand: the best of several is no longer a bound at
that confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from attacks._validate import half_open_unit, number, open_unit, scores_and_members
from attacks.ceilings import gaussian_epsilon
from attacks.intervals import upper_limit

# The k highest scores are guessed "in", the k lowest "out", k = these shares of all canaries. The
# grid is fixed and the level divided by its length, so that choosing the best stays honest.
GUESS_SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)

# Labels less likely than this under fair coins are not from fair coins.
COIN_LEVEL = 1e-6

# Bounds are searched up to this ε; certifying more would take e^200 canaries.
LARGEST_EPSILON = 200.0
LARGEST_MU = 50.0
SEARCH_PRECISION = 1e-5


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """A lower bound on ε and all that it rests on.

    Attributes:
        epsilon_lower_bound: at least 0; 0 when nothing is certified.
        confidence: probability at least this that the bound does not exceed the true ε.
        delta: the δ the bound goes with.
        method: short name of the estimator.
        ceiling: the bound that this audit would give had every guess been right. A claim above it
            cannot be challenged by so few canaries.
        guesses: number of guesses behind the bound.
        correct: how many of them were right.
        canaries: number of canaries or runs, guessed or not.
        assumption: what must hold for the bound to be one, in a sentence.
    """

    epsilon_lower_bound: float
    confidence: float
    delta: float
    method: str
    ceiling: float
    guesses: int
    correct: int
    canaries: int
    assumption: str


def one_run(
    scores: ArrayLike,
    is_member: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    rng: np.random.Generator | None = None,
) -> AuditResult:
    """Bound ε from one training run with many canaries (Steinke et al., 2023).

    **Guarantee:** if training is (ε, δ)-private, for whatever mechanism, and every canary was
    included by its own fair coin, the bound exceeds ε with probability at most 1 - confidence.

    Args:
        scores: `(m,)`, one per canary, higher = more likely in.
        is_member: `(m,)`, Boolean: the coins, thrown before training.
        delta: in [0, 1).
        confidence: in (0, 1).
        rng: breaks ties between scores; by default they are broken by a fixed shuffle.

    Raises:
        ValueError: for scores or labels as in `attacks.metrics.roc`, labels that no fair coins
            gave, or an argument out of range.
    """
    delta = half_open_unit("delta", delta)
    confidence = open_unit("confidence", confidence)
    guesses = _guess(scores, is_member, rng)
    level = (1 - confidence) / len(GUESS_SHARES)

    def refutes(epsilon: float, counts: _Guesses) -> bool:
        return _steinke_p_value(epsilon, counts, delta=delta) < level

    bound, chosen = _largest_refuted(refutes, guesses, limit=LARGEST_EPSILON)
    ceiling, _ = _largest_refuted(refutes, [g.all_right() for g in guesses], limit=LARGEST_EPSILON)
    return AuditResult(
        epsilon_lower_bound=bound,
        confidence=confidence,
        delta=delta,
        method="one-run",
        ceiling=ceiling,
        guesses=chosen.total,
        correct=chosen.right,
        canaries=chosen.canaries,
        assumption="training is (ε, δ)-private; each canary is in by its own fair coin",
    )


def one_run_fdp(
    scores: ArrayLike,
    is_member: ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    rng: np.random.Generator | None = None,
) -> AuditResult:
    """Bound ε from one run under a Gaussian trade-off hypothesis (Mahloujifar et al., 2025).

    **Guarantee:** if training is μ-Gaussian-private and every canary was included by its own fair
    coin, the bound exceeds ε(δ; μ) with probability at most 1 - confidence. It is tighter than
    `one_run` because it refutes Gaussian trade-off curves only: for a mechanism with another
    curve, randomised response for one, it may lie above the true ε.

    Args:
        scores: `(m,)`, one per canary, higher = more likely in.
        is_member: `(m,)`, Boolean: the coins, thrown before training.
        delta: in (0, 1).
        confidence: in (0, 1).
        rng: breaks ties between scores; by default they are broken by a fixed shuffle.

    Raises:
        ValueError: as `one_run`, and for δ = 0.
    """
    delta = open_unit("delta", delta)
    confidence = open_unit("confidence", confidence)
    guesses = _guess(scores, is_member, rng)
    level = (1 - confidence) / len(GUESS_SHARES)

    def refutes(mu: float, counts: _Guesses) -> bool:
        return _gaussian_refuted(mu, counts, level=level)

    bound, chosen = _largest_refuted(refutes, guesses, limit=LARGEST_MU)
    ceiling, _ = _largest_refuted(refutes, [g.all_right() for g in guesses], limit=LARGEST_MU)
    return AuditResult(
        epsilon_lower_bound=gaussian_epsilon(bound, delta),
        confidence=confidence,
        delta=delta,
        method="one-run f-DP",
        ceiling=gaussian_epsilon(ceiling, delta),
        guesses=chosen.total,
        correct=chosen.right,
        canaries=chosen.canaries,
        assumption="ε under a Gaussian trade-off hypothesis; "
        "each canary is in by its own fair coin",
    )


def clopper_pearson(
    scores: ArrayLike,
    is_member: ArrayLike,
    *,
    threshold: float,
    delta: float,
    confidence: float = 0.95,
) -> AuditResult:
    """Bound ε from independent training runs, some with the canary and some without.

    **Guarantee:** if training is (ε, δ)-private and the threshold was fixed before the scores were
    seen, the bound exceeds ε with probability at most 1 - confidence.

    Args:
        scores: `(R,)`, one per run, higher = more likely with the canary.
        is_member: `(R,)`, Boolean, whether the canary was in that run.
        threshold: a run is guessed to have the canary when its score reaches it.
        delta: in [0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: for scores or labels as in `attacks.metrics.roc`, or an argument out of range.
    """
    delta = half_open_unit("delta", delta)
    confidence = open_unit("confidence", confidence)
    threshold = number("threshold", threshold)
    values, members = scores_and_members(scores, is_member)
    misses = int((values[members] < threshold).sum())
    alarms = int((values[~members] >= threshold).sum())
    runs_with, runs_without = int(members.sum()), int((~members).sum())

    def bound(misses: int, alarms: int) -> float:
        # Each limit fails with half the error; both directions of the ratio rest on the same two.
        miss_rate = float(upper_limit(misses, runs_with, error=(1 - confidence) / 2))
        alarm_rate = float(upper_limit(alarms, runs_without, error=(1 - confidence) / 2))
        ratio = max((1 - miss_rate - delta) / alarm_rate, (1 - alarm_rate - delta) / miss_rate, 1.0)
        return math.log(ratio)

    return AuditResult(
        epsilon_lower_bound=bound(misses, alarms),
        confidence=confidence,
        delta=delta,
        method="Clopper-Pearson",
        ceiling=bound(0, 0),
        guesses=values.size,
        correct=values.size - misses - alarms,
        canaries=values.size,
        assumption="training is (ε, δ)-private; the runs are independent; "
        "the threshold was fixed beforehand",
    )


@dataclass(frozen=True)
class _Guesses:
    """So many guesses, so many of them right, among all canaries."""

    total: int
    right: int
    canaries: int

    def all_right(self) -> _Guesses:
        """The same guesses, had they all been right."""
        return replace(self, right=self.total)


def _guess(
    scores: ArrayLike, is_member: ArrayLike, rng: np.random.Generator | None
) -> list[_Guesses]:
    """Guess as many canaries as each share says, the largest share first, and count."""
    values, members = scores_and_members(scores, is_member)
    _check_coins(int(members.sum()), members.size)
    # Ties must not follow the caller's order: it may well list the members first.
    shuffle = (rng or np.random.default_rng(0)).permutation(values.size)
    ranked = members[shuffle][np.argsort(values[shuffle], kind="stable")]
    counts = []
    for share in GUESS_SHARES:
        k = max(1, int(share * values.size))
        right = int(ranked[-k:].sum() + (~ranked[:k]).sum())
        counts.append(_Guesses(total=2 * k, right=right, canaries=values.size))
    return counts


def _check_coins(members: int, canaries: int) -> None:
    """Refuse labels that independent fair coins do not give; half exactly cannot be told."""
    if 2 * special.bdtr(min(members, canaries - members), canaries, 0.5) < COIN_LEVEL:
        raise ValueError(
            f"Expected each canary in by its own fair coin, got {members} of {canaries} in: "
            "draw the coins independently, before training."
        )


def _largest_refuted(
    refutes: Callable[[float, _Guesses], bool], guesses: list[_Guesses], *, limit: float
) -> tuple[float, _Guesses]:
    """The largest parameter that any of the guesses refutes (0 if none), and those guesses."""
    best, chosen = 0.0, guesses[0]
    for counts in guesses:
        if not refutes(best, counts):  # nothing to gain: refuted is refuted for all smaller ones
            continue
        chosen, high = counts, limit
        while high - best > SEARCH_PRECISION:
            middle = (best + high) / 2
            best, high = (middle, high) if refutes(middle, counts) else (best, middle)
    return best, chosen


def _steinke_p_value(epsilon: float, counts: _Guesses, *, delta: float) -> float:
    """Chance of so many right guesses under (ε, δ)-privacy (Steinke et al., 2023)."""
    total, right = counts.total, counts.right
    if right == 0:
        return 1.0
    log_hit, log_miss = special.log_expit(epsilon), special.log_expit(-epsilon)
    tail = float(special.betainc(right, total - right + 1, special.expit(epsilon)))
    if delta == 0:
        return tail
    fewer = np.arange(right - 1, -1, -1)
    log_choose = -np.log(total + 1) - special.betaln(fewer + 1, total - fewer + 1)
    mass = np.cumsum(np.exp(log_choose + fewer * log_hit + (total - fewer) * log_miss))
    return tail + 2 * counts.canaries * delta * float((mass / (right - fewer)).max())


def _gaussian_refuted(mu: float, counts: _Guesses, *, level: float) -> bool:
    """Whether so many right guesses refute μ-Gaussian privacy (Mahloujifar et al., 2025).

    The recursion bounds the mass that right (r) and wrong (h) guesses can have at each count.
    """
    normal = NormalDist()
    share = counts.total / counts.canaries
    r = level * counts.right / counts.canaries
    h = level * (counts.total - counts.right) / counts.canaries
    for i in range(counts.right - 1, -1, -1):
        # erfc, since NormalDist.cdf loses the lower tail.
        bound = math.erfc((mu - normal.inv_cdf(r)) / math.sqrt(2)) / 2
        if bound <= h and i == counts.right - 1:
            return False  # nothing will ever grow
        r, h = r + i / (counts.total - i) * max(0.0, bound - h), max(h, bound)
        if r + h >= share:
            return True
    return False
