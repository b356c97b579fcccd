"""What a model completes a phrase with: a secret read out of its directory alone, without data."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch

from attacks.gazetteer import DIGITS
from attacks.inversion import METHODS, TARGETS, Cloze, Extraction, extract
from dpnlu.compare.canaries import positions_shown
from dpnlu.compare.extracting import objective_for
from dpnlu.compare.reporting import machine
from dpnlu.compare.settings import AttackSettings
from dpnlu.nlu.classifier import Classifier
from dpnlu.runs.model_directory import SavedModel, load
from dpnlu.runs.results import Results
from dpnlu.training.device import resolved_device

_NO_TRUTH = (
    "Every prefix is completed, whether or not there was a secret behind it, and nothing here "
    "tells one from the other: compare with what a model that never saw the data returns."
)


def completion_report(
    saved: SavedModel, model: Path, settings: AttackSettings, *, command: str
) -> dict[str, Any]:
    """Search for the secret behind each prefix, and say what was found.

    There is no truth to compare with: that a secret is returned does not mean that there was one.

    Raises:
        ValueError: a label that the model does not know, tokens that it cannot tell apart, a phrase
            longer than it reads, or an unknown method.
    """
    if settings.search not in METHODS:
        raise ValueError(f"Expected --search among {', '.join(METHODS)}, got {settings.search!r}.")
    if settings.target is not None and settings.target not in TARGETS:
        raise ValueError(f"Expected --target among {', '.join(TARGETS)}, got {settings.target!r}.")
    started = time.perf_counter()
    classifier = saved.classifier
    device = resolved_device(settings.device)
    classifier.model.to(device)
    clozes = [_cloze(classifier, prefix, settings) for prefix in settings.prefix]
    objective = objective_for(
        classifier,
        clozes,
        by_tags=True,
        target=settings.target,
        reference=_reference(settings, device),
        decimals=settings.decimals,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    found = extract(objective, method=settings.search, generator=generator)
    seconds = time.perf_counter() - started
    return {
        "schema": 1,
        "title": f"Secrets read out of {model.resolve().name}",
        "command": command,
        "created": datetime.date.today().isoformat(),
        "machine": machine(),
        "study": {"model": classifier.architecture.name, "search": settings.search},
        "runs": [_run(saved, model, found, seconds=seconds)],
    }


def _reference(settings: AttackSettings, device: str) -> Classifier | None:
    if settings.public is None:
        return None
    public = load(Path(settings.public)).classifier
    public.model.to(device)
    return public


def _cloze(classifier: Classifier, prefix: str, settings: AttackSettings) -> Cloze:
    """The phrase with holes behind it, and those labels that the classifier has."""
    labels, length, carrier = classifier.encoding.labels, settings.length, prefix.split()
    inside = (f"B-{settings.slot}", *[f"I-{settings.slot}"] * (length - 1))
    return Cloze(
        tokens=(*carrier, *[None] * length),
        candidates=(settings.candidates or DIGITS,) * length,
        intent=settings.intent if labels.intents else None,
        tags=(*["O"] * len(carrier), *inside) if labels.tags else None,
    )


def _run(
    saved: SavedModel, model: Path, found: tuple[Extraction, ...], *, seconds: float
) -> dict[str, Any]:
    results = Results.from_dict(saved.metrics)
    entry: dict[str, Any] = {
        "name": model.resolve().name,
        "target_epsilon": results.epsilon,
        "epsilon": results.epsilon,
        "attack_seconds": seconds,
        "recovered": [_entry(extraction) for extraction in found],
        "warnings": [_NO_TRUTH, *dict.fromkeys(note for one in found for note in one.notes)],
    }
    if saved.plan is not None:
        entry["delta"] = saved.plan.target_delta
    return entry


def _entry(found: Extraction) -> dict[str, Any]:
    return {
        "carrier": " ".join(token for token in found.cloze.tokens if token is not None),
        "recovered": list(found.secret),
        "loss": found.loss,
        "positions": positions_shown(found.cloze.candidates, found.scores, kept=found.choices),
    }
