"""The second step of a study: attack its models. What is found are entries of the report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks.auditing import AuditResult, one_run
from attacks.blind import BlindBaseline, blind_baseline
from attacks.evaluation import evaluate
from attacks.membership import ATTACKS
from attacks.metrics import roc_band
from attacks.patterns import CanarySpec
from dpnlu.accounting import SampledGaussian, group_epsilon
from dpnlu.compare.canaries import bad_fit, canary_entry, refuted
from dpnlu.compare.preparation import Prepared
from dpnlu.compare.reading import Reading
from dpnlu.compare.selection import CANARY_MEASUREMENTS
from dpnlu.compare.study import Study
from dpnlu.compare.training import TrainedBudget

# The attack whose scores are audited, fixed beforehand: the best of several would be a further
# choice to pay for.
_AUDITED = ("lira", "loss")
_BY_CANARIES = "loss on canaries with words of their own"
_ROC_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a training claims, and how sure the attacks' verdicts are.

    Attributes:
        epsilon: of one example; None: nothing.
        delta: at which it is stated.
        confidence: of verdicts.
        events: what was released, from which ε follows.
    """

    epsilon: float | None
    delta: float
    confidence: float
    events: tuple[SampledGaussian, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the attacks found in the models of one budget, as entries of the report.

    Attributes:
        membership: by the name of the attack.
        canaries: one entry per pattern; empty: none, or not asked for.
        audit: None: not asked for, or no scores to audit.
        warnings: what could not be measured, and what a reader of the numbers must know.
        seconds: wall time of the attacks, the training of references not included.
    """

    membership: Mapping[str, Any]
    canaries: tuple[Mapping[str, Any], ...]
    audit: Mapping[str, Any] | None
    warnings: tuple[str, ...]
    seconds: float

    def to_entries(self) -> dict[str, Any]:
        """The entries of a run, but for the warnings; what was not measured is absent."""
        entries: dict[str, Any] = {"membership": self.membership}
        if self.canaries:
            entries |= {"canary": self.canaries[0], "canaries": list(self.canaries)}
        if self.audit is not None:
            entries["audit"] = self.audit
        return entries


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What the attacks found in all models of a study.

    Attributes:
        findings: one per budget, in their order.
        blind: how well membership can be guessed without any model.
    """

    findings: tuple[Findings, ...]
    blind: BlindBaseline


def attack_all(prepared: Prepared, trained: Sequence[TrainedBudget]) -> Attacked:
    """Attack the target of every budget, with the help of its references."""
    settings, study = prepared.settings, prepared.study

    def claim_of(budget: TrainedBudget) -> Claim:
        spent = budget.results.epsilon
        # What a choice among several trainings tells of a group is not composed of their events.
        plan = budget.budget.plan if budget.budget.selection is None else None
        return Claim(
            epsilon=spent,
            delta=settings.delta,
            confidence=settings.confidence,
            events=() if plan is None else tuple(plan.events()),
        )

    return Attacked(
        findings=tuple(
            attack(settings.chosen_attacks, budget.readings, study, claim_of(budget))
            for budget in trained
        ),
        blind=blind_baseline(
            study.texts(),
            study.members[0],
            labels=_labels(study),
            rng=np.random.default_rng([settings.seed, 2]),
            confidence=settings.confidence,
        ),
    )


def attack(names: Sequence[str], models: Sequence[Reading], study: Study, claim: Claim) -> Findings:
    """Run attacks on the target, model 0, with the help of the references, the others.

    What cannot be measured is among the warnings.
    """
    started = time.perf_counter()
    warnings: list[str] = []
    scores = {}
    for name in (name for name in ATTACKS if name in names):
        with _left_out_if_impossible(name, warnings):
            scores[name] = study.of_units(_scores(name, models, study))
    membership = {}
    for name, values in scores.items():
        membership[name], cautions = _verdict(values, study, claim)
        warnings += [f"{name}: {caution}" for caution in cautions]
    canaries: list[dict[str, Any]] = []
    if set(names) & set(CANARY_MEASUREMENTS):
        with _left_out_if_impossible("canary", warnings):
            canaries = [
                canary_entry(
                    canary,
                    [model.canaries[canary.pattern.name] for model in models],
                    delta=claim.delta,
                    confidence=claim.confidence,
                    accounted=_accounted(canary, claim),
                )
                for canary in study.canaries
            ]
    cautions_of = (bad_fit, refuted)
    warnings += [text for canary in canaries for says in cautions_of if (text := says(canary))]
    audit: dict[str, Any] | None = None
    with _left_out_if_impossible("audit", warnings):
        audit = _audit(scores, models[0], study, claim) if "audit" in names else None
    warnings += [] if audit is None else _refutation(audit, claim)
    return Findings(
        membership=membership,
        canaries=tuple(canaries),
        audit=audit,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
    )


def _accounted(canary: CanarySpec, claim: Claim) -> float | None:
    """The ε of all copies of a canary; None where there is none, or none can be told."""
    if not claim.events or any(event.max_batch_size is not None for event in claim.events):
        return None
    found = group_epsilon(claim.events, size=canary.repetitions, delta=claim.delta)
    return found if math.isfinite(found) else None


@contextmanager
def _left_out_if_impossible(what: str, warnings: list[str]) -> Iterator[None]:
    """Turn a ValueError into a warning.

    Where a model's signals are no numbers or do not vary, a study whose models took hours keeps all
    else.
    """
    try:
        yield
    except ValueError as error:
        warnings.append(f"{what} was left out: {error}")


def _scores(name: str, models: Sequence[Reading], study: Study) -> NDArray[np.float64]:
    """Membership scores (m,) of the audit examples."""
    chosen = ATTACKS[name]
    signals = np.stack([_signal(model, chosen.signal) for model in models])
    if not chosen.needs_references:
        return chosen.score(signals[0])
    return chosen.score(signals[0], signals[1:], study.membership[1:])


def _signal(model: Reading, signal: str) -> NDArray[np.float64]:
    return model.signals.loss if signal == "loss" else model.signals.margins


def _verdict(
    scores: NDArray[np.float64], study: Study, claim: Claim
) -> tuple[dict[str, Any], tuple[str, ...]]:
    is_member = study.members[0]
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


def _labels(study: Study) -> list[str] | None:
    """The intents of the audit examples, as evidence without a model; users have no label."""
    if study.users is not None:
        return None
    return [e.intent for e in study.audit if e.intent is not None] or None


def _spread(length: int) -> NDArray[np.int64]:
    """Places of a long curve to keep: dense at its beginning, where low FPRs lie."""
    if length <= _ROC_POINTS:
        return np.arange(length)
    dense = np.geomspace(1, length, _ROC_POINTS).astype(np.int64) - 1
    return np.concatenate([dense, np.linspace(0, length - 1, _ROC_POINTS // 2).astype(np.int64)])


def _audit(
    scores: dict[str, NDArray[np.float64]], target: Reading, study: Study, claim: Claim
) -> dict[str, Any] | None:
    """By the canaries of the audit, where there are any, else by the audit examples."""
    if target.token_losses is not None:
        audited, chosen, truth = _BY_CANARIES, -target.token_losses, study.token_membership[0]
    elif scores:
        audited = next((name for name in _AUDITED if name in scores), next(iter(scores)))
        chosen, truth = scores[audited], study.members[0]
    else:
        return None
    result: AuditResult = one_run(chosen, truth, delta=claim.delta, confidence=claim.confidence)
    kept = ("epsilon_lower_bound", "confidence", "method", "ceiling", "canaries", "assumption")
    return {name: getattr(result, name) for name in kept} | {"scores": audited}


def _refutation(audit: dict[str, Any], claim: Claim) -> list[str]:
    if claim.epsilon is None or audit["epsilon_lower_bound"] <= claim.epsilon:
        return []
    return [
        f"The audit's lower bound {audit['epsilon_lower_bound']:.3g} exceeds the claimed ε "
        f"{claim.epsilon:.3g}: the claim is refuted at confidence {claim.confidence:g}."
    ]
