"""From finished trainings to the report, a plain dictionary; `attacks.report` writes it."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from attacks.blind import blind_baseline
from attacks.intervals import binomial_interval
from dpnlu.accounting import confirm
from dpnlu.compare.attacking import Claim, attack
from dpnlu.compare.running import Finished, Prepared
from dpnlu.mechanism.plan import PrivacyPlan

_VERSIONS = ("dpnlu", "torch", "transformers", "dp-accounting", "numpy", "scikit-learn")


def build_report(
    prepared: Prepared, finished: Sequence[Finished], *, command: str
) -> dict[str, Any]:
    """The report's dictionary; its keys are described in `attacks.contract`."""
    ordinary = next((run for run in finished if run.budget.plan is None), None)
    seconds = None if ordinary is None else ordinary.metrics["train_seconds"]
    settings = prepared.settings
    return {
        "schema": 1,
        "title": f"{prepared.corpus.name}, {settings.model}",
        "command": command,
        "created": datetime.date.today().isoformat(),
        "data": _data(prepared),
        "machine": machine(),
        "study": _study(prepared),
        "runs": [_run(prepared, run, ordinary_seconds=seconds) for run in finished],
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


def _data(prepared: Prepared) -> dict[str, Any]:
    corpus, study = prepared.corpus, prepared.study
    found: dict[str, Any] = {
        "name": corpus.name,
        "spec": prepared.settings.data,
        **{split: len(corpus.split(split)) for split in ("train", "valid", "test")},
        "intents": len(corpus.intents),
        "slots": len(corpus.slots) if corpus.has_slots else 0,
        "repeated_rows_dropped": prepared.repeats.dropped_train_rows,
        "audit_examples": len(study.audit),
        "members": int(study.coins[0].sum()),
        "labels_are_public": corpus.labels_are_public,
        "vocabulary_is_public": all(b.experiment.vocabulary.is_public for b in prepared.budgets),
    }
    blind = blind_baseline(
        [example.text for example in study.audit],
        study.coins[0],
        labels=[example.intent for example in study.audit],
        rng=np.random.default_rng([prepared.settings.seed, 2]),
        confidence=prepared.settings.confidence,
    )
    found["blind"] = {
        "auc": blind.auc,
        "auc_interval": list(blind.interval),
        "suspicious": blind.suspicious,
    }
    return found


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
        "recipes": recipes,
    }


def _run(prepared: Prepared, run: Finished, *, ordinary_seconds: float | None) -> dict[str, Any]:
    settings, plan, metrics = prepared.settings, run.budget.plan, run.metrics
    claim = Claim(
        epsilon=metrics.get("epsilon"), delta=settings.delta, confidence=settings.confidence
    )
    started = time.perf_counter()
    found = attack(settings.attacks, run.models, prepared.study, claim)
    attacking = time.perf_counter() - started
    attacking += sum(float(model["train_seconds"]) for model in run.models[1:])
    entry: dict[str, Any] = {
        "name": run.budget.name,
        "target_epsilon": run.budget.target_epsilon,
        "epsilon": claim.epsilon,
        "delta": settings.delta,
        "intent_accuracy": metrics["intent_accuracy"],
        "intent_accuracy_interval": list(_accuracy_interval(metrics, settings.confidence)),
        "frame_accuracy": metrics["frame_accuracy"],
        "train_seconds": metrics["train_seconds"],
        "attack_seconds": attacking,
        "references": len(run.models) - 1,
        **found,
    }
    for name in ("slot_f1", "peak_memory_mib"):
        if name in metrics:
            entry[name] = metrics[name]
    if plan is not None:
        kept = ("noise_multiplier", "max_grad_norm", "sample_rate", "steps", "adjacency", "unit")
        entry |= {name: getattr(plan, name) for name in kept} | {"accountant": "pld"}
        entry |= _second_opinion(plan, claim)
    if ordinary_seconds is not None:
        entry["overhead"] = metrics["train_seconds"] / ordinary_seconds
    if len(run.models) > 1:
        accuracies = [float(model["intent_accuracy"]) for model in run.models[1:]]
        entry["reference_accuracy"] = float(np.mean(accuracies))
    entry["warnings"] = [*found["warnings"], *_disclosures(prepared, run)]
    return entry


def _second_opinion(plan: PrivacyPlan, claim: Claim) -> dict[str, Any]:
    """What a second accountant says of ε, if one can tell.

    Raises:
        UnconfirmedError: it contradicts: the report would state an ε that may be too small.
    """
    if claim.epsilon is None:
        return {}
    second = confirm(claim.epsilon, plan.events(), delta=claim.delta)
    if second is None:
        return {}
    return {"second_accountant": second.accountant, "second_epsilon": second.epsilon}


def _accuracy_interval(metrics: dict[str, Any], confidence: float) -> tuple[float, float]:
    trials = metrics["examples"]
    right = round(metrics["intent_accuracy"] * trials)
    return binomial_interval(right, trials, confidence=confidence)


def _disclosures(prepared: Prepared, run: Finished) -> list[str]:
    """What ε does not cover."""
    if run.budget.plan is None:
        return []
    found = []
    if not prepared.corpus.labels_are_public:
        found.append("The label set was read from the data; ε does not cover it.")
    if not run.budget.experiment.vocabulary.is_public:
        found.append("The vocabulary was read from the data; ε does not cover it.")
    return found
