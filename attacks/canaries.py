"""Canaries: secrets put into training on purpose, and how much of them the model gives back.

A canary is a fixed carrier phrase followed by a secret, one token per digit. Its labels either
exist for canaries alone, which makes it as easy to remember as can be, or are ordinary labels of
the corpus.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from attacks._validate import Integers, any_array, count, floats, half_open_unit, open_unit, shown
from attacks.auditing import AuditResult
from attacks.intervals import binomial_interval, lower_limit

DIGITS = tuple("0123456789")

# All secrets up to this length can be scored one by one: a million candidates.
LONGEST_SECRET = 6

# Each repetition is a training example of its own.
MOST_REPETITIONS = 100_000


@dataclass(frozen=True, kw_only=True)
class CanaryPattern:
    """What all canaries of one kind look like.

    Attributes:
        name: as written in a specification.
        carrier: the known tokens before the secret.
        candidates: the tokens a secret is made of.
        intent: the canary's intent label.
        slot: the slot of the secret's tokens, tagged B-slot, I-slot, ...; None without slots.
    """

    name: str
    carrier: tuple[str, ...]
    candidates: tuple[str, ...] = DIGITS
    intent: str = "canary"
    slot: str | None = "canary"

    def with_labels(self, *, intent: str, slot: str | None) -> CanaryPattern:
        """Return the same pattern under other labels, for example ordinary ones of the corpus."""
        return replace(self, intent=intent, slot=slot)


@dataclass(frozen=True, kw_only=True)
class CanarySpec:
    """A pattern, the number of secret tokens, and how often the canary is put into training."""

    pattern: CanaryPattern
    length: int
    repetitions: int


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


def parse_canary(spec: str) -> CanarySpec:
    """Read a specification such as `pin:4:R=100`: pattern, secret length, repetitions.

    >>> parse_canary("call:6:R=1000").length
    6

    Raises:
        ValueError: for another form, an unknown pattern, a length beyond enumeration, or a number
            of repetitions out of range.
    """
    match = (
        re.fullmatch(r"(\w+):([0-9]{1,9}):R=([0-9]{1,9})", spec) if isinstance(spec, str) else None
    )
    pattern = PATTERNS.get(match[1]) if match else None
    if match is None or pattern is None:
        raise ValueError(
            f"Expected a canary of the form PATTERN:LENGTH:R=REPETITIONS with PATTERN one of "
            f"{', '.join(PATTERNS)}, got {shown(spec)}: write for example pin:4:R=100."
        )
    length, repetitions = int(match[2]), int(match[3])
    if not 1 <= length <= LONGEST_SECRET or not 1 <= repetitions <= MOST_REPETITIONS:
        raise ValueError(
            f"Expected a secret of 1 to {LONGEST_SECRET} tokens and at least one repetition, at "
            f"most {MOST_REPETITIONS}, got {shown(spec)}: write for example pin:4:R=100."
        )
    return CanarySpec(pattern=pattern, length=length, repetitions=repetitions)


def draw_secret(rng: np.random.Generator, *, length: int, candidates: int = 10) -> Integers:
    """Return a uniformly drawn secret `(length,)`, indices into the candidate tokens.

    Raises:
        ValueError: for a length or number of candidates below 1.
    """
    return rng.integers(
        count("candidates", candidates, least=1), size=count("length", length, least=1)
    )


def all_secrets(length: int, *, candidates: int = 10) -> Integers:
    """Return every secret `(candidates**length, length)` in lexicographic order.

    Raises:
        ValueError: for a length below 1, fewer than two candidates, or over a million secrets.
    """
    length, candidates = count("length", length, least=1), count("candidates", candidates, least=2)
    if length * math.log(candidates) > LONGEST_SECRET * math.log(len(DIGITS)) + 1e-9:
        raise ValueError(
            f"Expected a million secrets at most, got {candidates}**{length}: shorten the secret."
        )
    positions = np.indices((candidates,) * length)
    return positions.reshape(length, -1).T.astype(np.int64)


def secret_index(secret: ArrayLike, *, candidates: int = 10) -> int:
    """Return the row of `all_secrets` that holds this secret `(length,)`.

    Raises:
        ValueError: for an entry that is no index of a candidate.
    """
    index = 0
    for digit in _secrets("secret", secret, dimensions=1, candidates=candidates):
        index = index * candidates + int(digit)
    return index


def canary_tokens(pattern: CanaryPattern, secret: ArrayLike) -> tuple[str, ...]:
    """Return the tokens of the canary with this secret `(length,)`.

    >>> canary_tokens(PATTERNS["pin"], [4, 0, 7, 1])
    ('my', 'pin', 'code', 'is', '4', '0', '7', '1')

    Raises:
        ValueError: for an entry that is no index of a candidate.
    """
    digits = _secrets("secret", secret, dimensions=1, candidates=len(pattern.candidates))
    return (*pattern.carrier, *(pattern.candidates[digit] for digit in digits))


def canary_tags(pattern: CanaryPattern, length: int) -> tuple[str, ...]:
    """Return the IOB2 tags that go with `canary_tokens`; all O for a pattern without slot.

    >>> canary_tags(PATTERNS["call"], 3)
    ('O', 'B-canary', 'I-canary', 'I-canary')

    Raises:
        ValueError: for a length below 1.
    """
    length = count("length", length, least=1)
    outside = ("O",) * len(pattern.carrier)
    if pattern.slot is None:
        return outside + ("O",) * length
    return (*outside, f"B-{pattern.slot}", *[f"I-{pattern.slot}"] * (length - 1))


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
    guesses: ArrayLike, secrets: ArrayLike, *, candidates: int = 10, confidence: float = 0.95
) -> Recovery:
    """Compare extracted with true secrets, one row per independently trained model.

    Args:
        guesses: `(K, length)`, indices of candidate tokens.
        secrets: `(K, length)`, the truth.
        candidates: number of candidate tokens.
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
    exact = int((~wrong.any(axis=1)).sum())
    return Recovery(
        exact_match=exact / trials,
        exact_match_interval=binomial_interval(exact, trials, confidence=confidence),
        hamming=float(wrong.mean()),
        trials=trials,
        chance_exact=float(candidates) ** -length,
        chance_hamming=1 - 1 / candidates,
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


def _secrets(name: str, values: ArrayLike, *, dimensions: int, candidates: int) -> Integers:
    """Return an integer array of that many dimensions with entries in [0, candidates)."""
    candidates = count("candidates", candidates, least=1)
    array = any_array(name, values)
    if (
        array.ndim != dimensions
        or not np.issubdtype(array.dtype, np.integer)
        or not ((array >= 0) & (array < candidates)).all()
        or array.shape[-1] == 0
    ):
        raise ValueError(
            f"Expected `{name}` as integers in [0, {candidates}) with {dimensions} dimension(s), "
            f"got {array.dtype} of shape {array.shape}: pass indices of the candidate tokens."
        )
    return array.astype(np.int64)


PATTERNS: Mapping[str, CanaryPattern] = {
    "pin": CanaryPattern(name="pin", carrier=("my", "pin", "code", "is")),
    "call": CanaryPattern(name="call", carrier=("call",)),
}
