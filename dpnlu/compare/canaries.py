"""What all models of a budget give away of one canary, as an entry of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attacks.canaries import (
    all_secrets,
    chance_exposure_bits,
    exposure,
    group_epsilon_from_extraction,
    recovery,
    secret_index,
)
from attacks.inversion.measures import estimated_exposure, guessing_curve, position_matches
from attacks.patterns import CanarySpec
from dpnlu.compare.reading import CanaryReading

# Of each position an example shows so many candidates, those of the lowest losses.
MOST_SHOWN = 12

# Of the fit of an extrapolation; a smaller one is a bad fit.
_LEAST_P_VALUE = 0.01


def canary_entry(
    canary: CanarySpec,
    readings: Sequence[CanaryReading],
    *,
    delta: float,
    confidence: float,
    accounted: float | None = None,
) -> dict[str, Any]:
    """Exposure and extraction over all models, each with a secret of its own.

    Args:
        readings: of the models; the first is the target's.
        delta: at which the group's ε is bounded.
        accounted: the ε of all copies together that the accountant states; None: none.

    Raises:
        ValueError: losses that are no numbers, or that do not vary where they must.
    """
    entry: dict[str, Any] = {
        "pattern": canary.pattern.name,
        "carrier": " ".join(canary.pattern.carrier),
        "repetitions": canary.repetitions,
        "chance_exposure_bits": chance_exposure_bits(canary.combinations),
    }
    if accounted is not None:
        entry["accounted_group_epsilon"] = accounted
    entry |= _exposures(canary, readings, confidence)
    guesses = _guesses(canary, readings)
    if not guesses:
        return entry
    secrets = np.stack([reading.secret for reading in readings])
    sure: Mapping[str, Any] = {"candidates": canary.sizes, "confidence": confidence}
    best = next(iter(guesses))
    recovered = recovery(guesses[best], secrets, **sure)
    group = group_epsilon_from_extraction(
        round(recovered.exact_match * len(readings)),
        len(readings),
        candidates=canary.combinations,
        delta=delta,
        confidence=confidence,
    )
    entry |= {"group_epsilon": group.epsilon_lower_bound, "method": best, **asdict(recovered)}
    entry["extraction"] = {
        method: asdict(recovery(guess, secrets, **sure)) for method, guess in guesses.items()
    }
    entry["positions"] = [asdict(p) for p in position_matches(guesses[best], secrets, **sure)]
    example = _example(canary, readings[0])
    return entry if example is None else entry | {"example": example}


def bad_fit(entry: Mapping[str, Any]) -> str:
    """Say that an extrapolated exposure must not be believed; empty where it may be."""
    least = min(entry.get("fit_p_values", [1.0]))
    if least >= _LEAST_P_VALUE:
        return ""
    return (
        f"{entry['pattern']}: the losses of its secrets are not distributed as its exposure "
        f"assumes (p = {least:.2g}): believe the sampled exposure, "
        f"{entry['sampled_exposure_bits']:.3g} bits at least."
    )


def refuted(entry: Mapping[str, Any]) -> str:
    """Say that extraction contradicts the accountant; empty where it does not."""
    if entry.get("group_epsilon", 0.0) <= entry.get("accounted_group_epsilon", np.inf):
        return ""
    return (
        f"{entry['pattern']}: its extraction proves an ε of {entry['group_epsilon']:.3g} at least "
        f"for all copies together, and {entry['accounted_group_epsilon']:.3g} is claimed: the "
        "claim is refuted."
    )


def _exposures(
    canary: CanarySpec, readings: Sequence[CanaryReading], confidence: float
) -> dict[str, Any]:
    """Exact where all secrets were scored, else estimated from a sample."""
    if canary.is_enumerable:
        exact = [
            exposure(reading.losses, secret_index(reading.secret, candidates=canary.sizes))
            for reading in readings
        ]
        bits = [found.bits for found in exact]
        ranks = [found.rank for found in exact]
        curve = guessing_curve(ranks, candidates=canary.combinations, confidence=confidence)
        more: dict[str, Any] = {
            "ranks": ranks,
            "guesses_needed": {name: values.tolist() for name, values in vars(curve).items()},
        }
    else:
        estimates = [
            estimated_exposure(
                reading.losses[0], reading.losses[1:], candidates=canary.combinations
            )
            for reading in readings
        ]
        bits = [found.bits for found in estimates]
        more = {
            "exposure_method": "extrapolated by a skew-normal distribution",
            "sampled_exposure_bits": float(np.mean([e.sampled_bits for e in estimates])),
            "fit_p_values": [found.fit_p_value for found in estimates],
        }
    center = float(np.mean(bits))
    available = float(np.log2(canary.combinations))
    entry = {"exposure_bits": center, "available_bits": available, **more}
    return entry | _mean_interval(bits, confidence, most=available)


def _guesses(canary: CanarySpec, readings: Sequence[CanaryReading]) -> dict[str, NDArray[np.int64]]:
    """What each method recovered of each model (K, length), the best method first.

    Which is best was fixed beforehand: enumeration, which is exact, and where there is none the
    reported search, the last one.
    """
    found: dict[str, NDArray[np.int64]] = {}
    if canary.is_enumerable:
        secrets = all_secrets(canary.length, candidates=canary.sizes)
        places = [int(reading.losses.argmin()) for reading in readings]
        found["enumeration"] = secrets[places]
    # Of a model that has diverged there are none.
    everywhere = [m for m in readings[0].guesses if all(m in r.guesses for r in readings)]
    methods = [*everywhere[-1:], *everywhere[:-1]]
    return found | {
        method: np.stack([reading.guesses[method] for reading in readings]) for method in methods
    }


def _example(canary: CanarySpec, reading: CanaryReading) -> dict[str, Any] | None:
    """What the reported search recovered of one model, next to the truth."""
    if reading.scores is None or not reading.guesses:
        return None
    *_, reported = reading.guesses.values()
    candidates = canary.candidates
    return {
        "carrier": " ".join(canary.pattern.carrier),
        "original": _tokens(candidates, reading.secret),
        "recovered": _tokens(candidates, reported),
        "positions": positions_shown(candidates, reading.scores, kept=reading.secret),
    }


def positions_shown(
    candidates: Sequence[Sequence[str]],
    scores: Sequence[NDArray[np.float64]] | NDArray[np.float64],
    *,
    kept: Sequence[int] | NDArray[np.int64] = (),
) -> list[dict[str, Any]]:
    """For each position the candidates of the lowest losses, and these.

    Args:
        scores: for each position (V,), the loss with each candidate.
        kept: candidates, one for each position, that are shown whatever their loss.
    """
    shown = []
    for place, (tokens, losses) in enumerate(zip(candidates, scores, strict=True)):
        order = np.argsort(losses[: len(tokens)], kind="stable")[:MOST_SHOWN].tolist()
        if len(kept) and int(kept[place]) not in order:
            order[-1] = int(kept[place])
        shown.append(
            {
                "candidates": [tokens[index] for index in order],
                "losses": [float(losses[index]) for index in order],
            }
        )
    return shown


def _tokens(candidates: Sequence[Sequence[str]], secret: NDArray[np.int64]) -> list[str]:
    return [tokens[index] for tokens, index in zip(candidates, secret, strict=True)]


def _mean_interval(
    values: Sequence[float], confidence: float, *, most: float
) -> dict[str, list[float]]:
    """Student's interval of a mean, cut to the possible [0, most]; absent for a single value."""
    if len(values) < 2:
        return {}
    error = float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    center = float(np.mean(values))
    return {"exposure_interval": [max(center - half, 0.0), min(center + half, max(most, center))]}
