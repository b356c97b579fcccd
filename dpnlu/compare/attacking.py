"""What the attacks find in the models of one budget, as entries of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attacks.auditing import AuditResult, one_run
from attacks.canaries import (
    CanarySpec,
    all_secrets,
    chance_exposure_bits,
    exposure,
    group_epsilon_from_extraction,
    recovery,
    secret_index,
)
from attacks.evaluation import evaluate
from attacks.membership import ATTACKS
from attacks.metrics import roc_band
from dpnlu.compare.study import Study
from dpnlu.compare.training import Arrays, stacked

CANARY_MEASUREMENTS = ("exposure", "extraction")
# What `--attacks` may name: membership attacks, canary measurements, and the audit.
NAMES = (*ATTACKS, *CANARY_MEASUREMENTS, "audit")
DEFAULT = ("loss", "lira", "rmia", *CANARY_MEASUREMENTS, "audit")
# With fewer there is no spread, and for half of the examples no reference on one of the sides.
LEAST_REFERENCES = 2

# The attack whose scores are audited, fixed beforehand: the best of several would be a further
# choice to pay for.
_AUDITED = ("lira", "loss")
_ROC_POINTS = 200


def default_attacks(references: int) -> tuple[str, ...]:
    """What is run unless attacks are named: `DEFAULT`, as far as the references suffice."""
    return tuple(name for name in DEFAULT if not needs_more(name, references))


def needs_more(name: str, references: int) -> bool:
    """Whether an attack needs more reference models than that."""
    return needs_references([name]) and references < LEAST_REFERENCES


def needs_references(names: Sequence[str]) -> bool:
    """Whether any of the attacks compares the target with reference models."""
    return any(name in ATTACKS and ATTACKS[name].needs_references for name in names)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a training claims: ε (None: nothing) at δ, and how sure the attacks' verdicts are."""

    epsilon: float | None
    delta: float
    confidence: float


def attack(
    names: Sequence[str], models: Sequence[Arrays], study: Study, claim: Claim
) -> dict[str, Any]:
    """Run attacks on the target, model 0, with the help of the references, the others.

    Returns:
        The entries "membership", "canary", "audit" and "warnings" of a run; what was not measured
        is absent, and what could not be is among the warnings.
    """
    warnings: list[str] = []
    scores = {}
    for name in (name for name in ATTACKS if name in names):
        with _left_out_if_impossible(name, warnings):
            scores[name] = _scores(name, models, study)
    found: dict[str, Any] = {"membership": {}}
    for name, values in scores.items():
        entry, cautions = _verdict(values, study, claim)
        found["membership"][name] = entry
        warnings += [f"{name}: {caution}" for caution in cautions if caution not in warnings]
    if study.canaries and set(names) & set(CANARY_MEASUREMENTS):
        with _left_out_if_impossible("canary", warnings):
            entries = [_canary(canary, models, claim) for canary in study.canaries]
            found |= {"canary": entries[0], "canaries": entries}
    if "audit" in names and scores:
        found["audit"] = _audit(scores, study, claim)
        warnings += _refutation(found["audit"], claim)
    return found | {"warnings": warnings}


@contextmanager
def _left_out_if_impossible(what: str, warnings: list[str]) -> Iterator[None]:
    """Have a study whose models took hours keep all else, where a model's signals are no numbers or
    do not vary."""
    try:
        yield
    except ValueError as error:
        warnings.append(f"{what} was left out: {error}")


def _scores(name: str, models: Sequence[Arrays], study: Study) -> NDArray[np.float64]:
    """Membership scores (m,) of the audit examples."""
    chosen = ATTACKS[name]
    signals = np.stack([_signal(model, chosen.signal) for model in models])
    if not chosen.needs_references:
        return chosen.score(signals[0])
    return chosen.score(signals[0], signals[1:], study.coins[1:])


def _signal(model: Arrays, signal: str) -> NDArray[np.float64]:
    if signal == "loss":
        return model["loss"]
    margins = [model[key] for key in ("intent_margin", "slot_margin") if key in model]
    return np.stack(margins, axis=1)


def _verdict(
    scores: NDArray[np.float64], study: Study, claim: Claim
) -> tuple[dict[str, Any], tuple[str, ...]]:
    is_member = study.coins[0]
    verdict = evaluate(
        scores,
        is_member,
        epsilon=claim.epsilon,
        delta=None if claim.epsilon is None else claim.delta,
        confidence=claim.confidence,
    )
    band = roc_band(scores, is_member, confidence=claim.confidence)
    points = np.unique(_spread(len(band.fpr)))
    entry = verdict.to_dict() | {
        "members": verdict.members,
        "non_members": verdict.non_members,
        "roc": {name: values[points].tolist() for name, values in vars(band).items()},
    }
    if verdict.auc_ceiling is not None:
        entry["auc_ceiling"] = verdict.auc_ceiling
    return entry, verdict.warnings


def _spread(length: int) -> NDArray[np.int64]:
    """Places of a long curve to keep: dense at its beginning, where low FPRs lie."""
    if length <= _ROC_POINTS:
        return np.arange(length)
    dense = np.geomspace(1, length, _ROC_POINTS).astype(np.int64) - 1
    return np.concatenate([dense, np.linspace(0, length - 1, _ROC_POINTS // 2).astype(np.int64)])


def _canary(canary: CanarySpec, models: Sequence[Arrays], claim: Claim) -> dict[str, Any]:
    """Exposure and extraction over all models, each with a secret of its own."""
    name = canary.pattern.name
    losses, secrets = stacked(models, f"{name}-losses"), stacked(models, f"{name}-secret")
    places = [secret_index(secret) for secret in secrets]
    exposures = [exposure(row, place) for row, place in zip(losses, places, strict=True)]
    bits = [found.bits for found in exposures]
    # The candidate with the lowest loss is what the best extraction could return.
    guesses = all_secrets(canary.length)[losses.argmin(axis=1)]
    recovered = asdict(recovery(guesses, secrets, confidence=claim.confidence))
    group = group_epsilon_from_extraction(
        round(recovered["exact_match"] * len(places)),
        len(places),
        candidates=losses.shape[1],
        delta=claim.delta,
        confidence=claim.confidence,
    )
    entry = {
        "pattern": name,
        "repetitions": canary.repetitions,
        "exposure_bits": float(np.mean(bits)),
        "available_bits": float(np.log2(losses.shape[1])),
        "ranks": [found.rank for found in exposures],
        "chance_exposure_bits": chance_exposure_bits(losses.shape[1]),
        "group_epsilon": group.epsilon_lower_bound,
        **recovered,
    }
    return entry | _mean_interval(bits, claim.confidence)


def _mean_interval(values: Sequence[float], confidence: float) -> dict[str, list[float]]:
    """Student's interval of a mean; absent for a single value."""
    if len(values) < 2:
        return {}
    error = float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    center = float(np.mean(values))
    return {"exposure_interval": [center - half, center + half]}


def _audit(scores: dict[str, NDArray[np.float64]], study: Study, claim: Claim) -> dict[str, Any]:
    audited = next((name for name in _AUDITED if name in scores), next(iter(scores)))
    result: AuditResult = one_run(
        scores[audited], study.coins[0], delta=claim.delta, confidence=claim.confidence
    )
    kept = ("epsilon_lower_bound", "confidence", "method", "ceiling", "canaries", "assumption")
    return {name: getattr(result, name) for name in kept} | {"scores": audited}


def _refutation(audit: dict[str, Any], claim: Claim) -> list[str]:
    if claim.epsilon is None or audit["epsilon_lower_bound"] <= claim.epsilon:
        return []
    return [
        f"The audit's lower bound {audit['epsilon_lower_bound']:.3g} exceeds the claimed ε "
        f"{claim.epsilon:.3g}: the claim is refuted at confidence {claim.confidence:g}."
    ]
