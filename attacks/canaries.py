"""Canaries: secrets put into training on purpose, and how much of them the model gives back.

What they look like is in `attacks.patterns`. A secret is an array of indices, one of a candidate
token for each position. Wherever the number of candidates is asked for, it is one number for all
positions or one for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from attacks._validate import Integers, any_array, count, floats, half_open_unit, open_unit, shown
from attacks.auditing import AuditResult
from attacks.intervals import binomial_interval, lower_limit
from attacks.patterns import MOST_SECRETS


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """How far up the model ranks the true secret among all candidates.

    Attributes:
        bits: log2 candidates - log2 rank (Carlini et al., 2019).
        rank: from 1, best; the middle of its ties, so it may be fractional.
        candidates: their number, the true secret included.
        available_bits: log2 candidates, the largest exposure possible.
    """

    bits: float
    rank: float
    candidates: int
    available_bits: float


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How much of the secrets an extraction gave back, next to what guessing blindly gives.

    Attributes:
        exact_match: share of trials with every token right.
        exact_match_interval: its Clopper-Pearson interval.
        hamming: mean share of wrong tokens.
        trials: number of secrets, each from its own training run.
        chance_exact: `exact_match` of a uniform guess.
        chance_hamming: `hamming` of a uniform guess.
    """

    exact_match: float
    exact_match_interval: tuple[float, float]
    hamming: float
    trials: int
    chance_exact: float
    chance_hamming: float


def draw_secret(
    rng: np.random.Generator, *, length: int, candidates: int | Sequence[int] = 10
) -> Integers:
    """Return a uniformly drawn secret `(length,)`, indices into the candidate tokens.

    Raises:
        ValueError: for a length or number of candidates below 1.
    """
    sizes = _sizes(count("length", length, least=1), candidates)
    return rng.integers(sizes).astype(np.int64)


def all_secrets(length: int, *, candidates: int | Sequence[int] = 10) -> Integers:
    """Return every secret `(C, length)` in lexicographic order.

    Raises:
        ValueError: for a length below 1, fewer than two candidates, or over a million secrets.
    """
    sizes = _sizes(count("length", length, least=1), candidates, least=2)
    if math.prod(sizes) > MOST_SECRETS:
        raise ValueError(
            f"Expected a million secrets at most, got {math.prod(sizes)}: shorten the secret."
        )
    return np.indices(sizes).reshape(length, -1).T.astype(np.int64)


def secret_index(secret: ArrayLike, *, candidates: int | Sequence[int] = 10) -> int:
    """Return the row of `all_secrets` that holds this secret `(length,)`.

    Raises:
        ValueError: for an entry that is no index of a candidate.
    """
    places = _secrets("secret", secret, dimensions=1, candidates=candidates)
    index = 0
    for place, size in zip(places.tolist(), _sizes(places.size, candidates), strict=True):
        index = index * size + place
    return index


def exposure(losses: ArrayLike, secret_index: int) -> Exposure:
    """Return the exact exposure of a secret among all candidates (Carlini et al., 2019).

    Ties share their middle rank: a model that gives every candidate the same loss exposes one bit
    of a large set, less than the chance level of `chance_exposure_bits`.

    Args:
        losses: `(R,)`, the model's loss on the canary with each candidate secret.
        secret_index: which of them is the true one.

    Raises:
        ValueError: for NaN, a wrong shape, or an index out of range.
    """
    values = floats("losses", losses, dimensions=1)
    if count("secret_index", secret_index) >= values.size:
        raise ValueError(
            f"Expected `secret_index` in [0, {values.size}), got {secret_index}: "
            "the true secret must be among the candidates."
        )
    true = values[secret_index]
    rank = float((values < true).sum() + ((values == true).sum() + 1) / 2)
    bits = math.log2(values.size)
    return Exposure(
        bits=bits - math.log2(rank), rank=rank, candidates=values.size, available_bits=bits
    )


def chance_exposure_bits(candidates: int) -> float:
    """Return the mean exposure of a secret the model has never seen: every rank equally likely.

    It is log2 R - log2(R!) / R, which grows to log2 e = 1.44 bits with R.

    Raises:
        ValueError: for fewer than one candidate.
    """
    candidates = count("candidates", candidates, least=1)
    mean_log_rank = float(special.gammaln(candidates + 1)) / candidates / math.log(2)
    return math.log2(candidates) - mean_log_rank


def recovery(
    guesses: ArrayLike,
    secrets: ArrayLike,
    *,
    candidates: int | Sequence[int] = 10,
    confidence: float = 0.95,
) -> Recovery:
    """Compare extracted with true secrets, one row per independently trained model.

    Args:
        guesses: `(K, length)`, indices of candidate tokens.
        secrets: `(K, length)`, the truth.
        candidates: number of candidate tokens, of each position or of all.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: for shapes that differ, no trial, entries that are no index of a candidate, or
            a confidence out of range.
    """
    guessed = _secrets("guesses", guesses, dimensions=2, candidates=candidates)
    true = _secrets("secrets", secrets, dimensions=2, candidates=candidates)
    if guessed.shape != true.shape or guessed.size == 0:
        raise ValueError(
            f"Expected `guesses` and `secrets` of one shape (K, length), got {guessed.shape} and "
            f"{true.shape}: give one guess per secret."
        )
    wrong = guessed != true
    trials, length = wrong.shape
    exact, sizes = int((~wrong.any(axis=1)).sum()), _sizes(length, candidates)
    return Recovery(
        exact_match=exact / trials,
        exact_match_interval=binomial_interval(exact, trials, confidence=confidence),
        hamming=float(wrong.mean()),
        trials=trials,
        chance_exact=math.prod(1 / size for size in sizes),
        chance_hamming=sum(1 - 1 / size for size in sizes) / length,
    )


def group_epsilon_from_extraction(
    successes: int, trials: int, *, candidates: int, delta: float, confidence: float = 0.95
) -> AuditResult:
    """Bound the ε of a whole canary, all its repetitions together, by how often it is extracted.

    A model trained without the canary is independent of its secret, so it gives it away with
    chance exactly 1/R. Under (ε, δ)-privacy for the group of all copies, the chance with it is at
    most e^ε/R + δ, hence ε >= log((p - δ)·R) for the lower limit p of the success rate.

    **Guarantee:** if secrets are uniform and fresh in each independently trained model, the bound
    exceeds the group's ε with probability at most 1 - confidence. It says nothing about the ε of
    one example unless the canary occurred once.

    Args:
        successes: how many secrets were extracted exactly, each by one guess.
        trials: number of models.
        candidates: R, the number of possible secrets, `10**length` for digits.
        delta: of the group, in [0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: for an argument out of range.
    """
    delta = half_open_unit("delta", delta)
    confidence = open_unit("confidence", confidence)

    successes, trials = count("successes", successes), count("trials", trials)
    candidates = count("candidates", candidates, least=1)

    def bound(successes: int) -> float:
        rate = float(lower_limit(successes, trials, error=1 - confidence))
        return math.log(max((rate - delta) * candidates, 1.0))

    return AuditResult(
        epsilon_lower_bound=bound(successes),
        confidence=confidence,
        delta=delta,
        method="extraction",
        ceiling=bound(trials),
        guesses=trials,
        correct=successes,
        canaries=trials,
        assumption="ε of the group of all copies; secrets are uniform, fresh and independent",
    )


def _secrets(
    name: str, values: ArrayLike, *, dimensions: int, candidates: int | Sequence[int]
) -> Integers:
    """Return an integer array of that many dimensions with entries in [0, candidates)."""
    array = any_array(name, values)
    length = array.shape[-1] if array.ndim == dimensions else 0
    sizes = np.array(_sizes(length, candidates), dtype=np.int64)
    if (
        length == 0
        or not np.issubdtype(array.dtype, np.integer)
        or not ((array >= 0) & (array < sizes)).all()
    ):
        allowed = shown(candidates if isinstance(candidates, int) else list(candidates))
        raise ValueError(
            f"Expected `{name}` as integers in [0, {allowed}) with {dimensions} dimension(s), "
            f"got {array.dtype} of shape {array.shape}: pass indices of the candidate tokens."
        )
    return array.astype(np.int64)


def _sizes(length: int, candidates: int | Sequence[int], *, least: int = 1) -> tuple[int, ...]:
    """Return the number of candidates of each position."""
    if isinstance(candidates, Sequence) and not isinstance(candidates, str):
        if length not in (0, len(candidates)):
            raise ValueError(
                f"Expected one number of candidates for each of {length} positions, got "
                f"{len(candidates)}: give one number for all or one for each."
            )
        return tuple(count("candidates", size, least=least) for size in candidates)
    return (count("candidates", candidates, least=least),) * length
