"""The last step of a study: the report as a plain dictionary; `attacks.report` writes it."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from attacks.intervals import binomial_interval
from dpnlu.accounting import confirm
from dpnlu.compare.attacking import Attacked, Findings
from dpnlu.compare.preparation import Prepared
from dpnlu.compare.study import Study
from dpnlu.compare.training import TrainedBudget
from dpnlu.mechanism.plan import PrivacyPlan

_VERSIONS = ("dpnlu", "torch", "transformers", "dp-accounting", "numpy", "scikit-learn")


def build_report(
    prepared: Prepared, trained: Sequence[TrainedBudget], attacked: Attacked, *, command: str
) -> dict[str, Any]:
    """The report's dictionary; its keys are described in `attacks.report.contract`."""
    ordinary = next((run for run in trained if run.budget.plan is None), None)
    seconds = None if ordinary is None else ordinary.results.train_seconds
    settings = prepared.settings
    return {
        "schema": 1,
        "title": f"{prepared.corpus.name}, {settings.model}",
        "command": command,
        "created": datetime.date.today().isoformat(),
        "data": _data(prepared, attacked),
        "machine": machine(),
        "study": _study(prepared),
        "runs": [
            _run(prepared, run, findings, ordinary_seconds=seconds)
            for run, findings in zip(trained, attacked.findings, strict=True)
        ],
    }


def machine() -> dict[str, Any]:
    """What everything ran on."""
    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "platform": platform.platform(terse=True),
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages * page / 2**30, 1),
        "python": platform.python_version(),
        **versions,
    }


def _data(prepared: Prepared, attacked: Attacked) -> dict[str, Any]:
    corpus, study, blind = prepared.corpus, prepared.study, attacked.blind
    return {
        "name": corpus.name,
        "spec": prepared.settings.data,
        **{split: len(corpus.split(split)) for split in ("train", "valid", "test")},
        **({"intents": len(corpus.intents)} if corpus.has_intents else {}),
        **({"slots": len(corpus.slots)} if corpus.has_slots else {}),
        "repeated_rows_dropped": prepared.repeats.dropped_train_rows,
        "audit_examples": len(study.audit),
        "members": int(study.membership[0].sum()),
        **_audit_users(study),
        "labels_are_public": corpus.labels_are_public,
        "vocabulary_is_public": all(b.experiment.vocabulary.is_public for b in prepared.budgets),
        "blind": {
            "auc": blind.auc,
            "auc_interval": list(blind.interval),
            "suspicious": blind.suspicious,
        },
    }


def _audit_users(study: Study) -> dict[str, Any]:
    """How many users the attacks judge, and how many of them are members; empty: examples."""
    if study.users is None:
        return {}
    return {"audit_users": len(study.users), "member_users": int(study.members[0].sum())}


def _study(prepared: Prepared) -> dict[str, Any]:
    settings = prepared.settings
    recipes = {
        budget.name: vars(budget.experiment.recipe)
        | {"dropout": budget.experiment.architecture.dropout}
        for budget in prepared.budgets
    }
    return {
        "model": settings.model,
        "references": settings.references,
        "seed": settings.seed,
        "confidence": settings.confidence,
        "adjacency": "add-remove-one",
        "unit": prepared.study.unit,
        "recipes": recipes,
    }


def _run(
    prepared: Prepared,
    run: TrainedBudget,
    findings: Findings,
    *,
    ordinary_seconds: float | None,
) -> dict[str, Any]:
    settings, plan, results = prepared.settings, run.budget.plan, run.results
    entry: dict[str, Any] = {
        "name": run.budget.name,
        "target_epsilon": run.budget.target_epsilon,
        "epsilon": results.epsilon,
        "delta": settings.delta,
        "frame_accuracy": results.frame_accuracy,
        "train_seconds": results.train_seconds,
        "attack_seconds": findings.seconds + sum(r.train_seconds or 0.0 for r in run.references),
        "references": len(run.references),
        **findings.to_entries(),
        "warnings": [*findings.warnings, *_disclosures(prepared, run)],
    }
    if results.intent_accuracy is not None:
        interval = _accuracy_interval(
            results.intent_accuracy, results.examples, confidence=settings.confidence
        )
        entry |= {"intent_accuracy": results.intent_accuracy, "intent_accuracy_interval": interval}
    if results.slot_f1 is not None:
        entry["slot_f1"] = results.slot_f1
    if results.peak_memory_mib is not None:
        entry["peak_memory_mib"] = results.peak_memory_mib
    if plan is not None:
        kept = ("noise_multiplier", "max_grad_norm", "sample_rate", "steps", "adjacency", "unit")
        entry |= {name: getattr(plan, name) for name in kept}
        if plan.clipping != "flat":
            entry["clipping"] = plan.clipping
        if plan.noise_schedule != "constant":
            entry["noise_schedule"] = plan.noise_schedule
            constant = plan.with_constant_noise().noise_multiplier
            entry["constant_noise_multiplier"] = constant
        if plan.examples_per_user is not None:
            entry["examples_per_user"] = plan.examples_per_user
        entry |= _accountants(run, plan, delta=settings.delta)
    if ordinary_seconds is not None:
        entry["overhead"] = results.train_seconds / ordinary_seconds
    accuracies = [r.intent_accuracy for r in run.references if r.intent_accuracy is not None]
    if accuracies:
        entry["reference_accuracy"] = float(np.mean(accuracies))
    return entry


def _accountants(run: TrainedBudget, plan: PrivacyPlan, *, delta: float) -> dict[str, Any]:
    """Who stated ε, and who confirms it."""
    results, selection = run.results, run.budget.selection
    if selection is not None:
        return {"accountant": "pld" if selection.number == "fixed" else "rdp"}
    second = _second_opinion(plan, results.epsilon, steps=results.steps, delta=delta)
    return {"accountant": "pld"} | second


def _second_opinion(
    plan: PrivacyPlan, epsilon: float | None, *, steps: int, delta: float
) -> dict[str, Any]:
    """What a second accountant says of the ε of the plan's first `steps` releases, if one can tell.

    Raises:
        UnconfirmedError: it contradicts: the report would state an ε that may be too small.
    """
    second = None if epsilon is None else confirm(epsilon, plan.events(steps=steps), delta=delta)
    if second is None:
        return {}
    return {"second_accountant": second.accountant, "second_epsilon": second.epsilon}


def _accuracy_interval(accuracy: float, examples: int, *, confidence: float) -> list[float]:
    return list(binomial_interval(round(accuracy * examples), examples, confidence=confidence))


def _disclosures(prepared: Prepared, run: TrainedBudget) -> list[str]:
    """What ε does not cover, and what attacks do not see."""
    found = []
    if run.references and run.results.public_use is not None:
        found.append(
            "The model learnt from public data, too, and its reference models did not: attacks "
            "with references are weaker than they could be."
        )
    if run.budget.plan is None:
        return found
    if run.budget.selection is not None:
        found.append("The model is the best of several trainings; ε is that of the choice.")
    if not prepared.corpus.labels_are_public:
        found.append("The label set was read from the data; ε does not cover it.")
    if not run.budget.experiment.vocabulary.is_public:
        found.append("The vocabulary was read from the data; ε does not cover it.")
    return found
