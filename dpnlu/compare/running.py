"""A study, or an attack on one model, in three steps: train, attack, report."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attacks.report import write_report
from dpnlu.compare.attacking import attack_all
from dpnlu.compare.changes import changes
from dpnlu.compare.completing import completion_report
from dpnlu.compare.preparation import Prepared, prepare_attack, prepare_study
from dpnlu.compare.reporting import build_report
from dpnlu.compare.selection import UNTARGETED
from dpnlu.compare.settings import AttackSettings, StudySettings, study_as_begun
from dpnlu.compare.training import STUDY, TrainedBudget, claimed_study, train_all, train_references
from dpnlu.compare.untargeted import untargeted_entry
from dpnlu.runs.model_directory import CONFIG, SavedModel, load, read_json
from dpnlu.runs.progress import OnProgress, silent
from dpnlu.runs.results import Results
from dpnlu.training.device import resolved_device


def compare(
    settings: StudySettings,
    directory: Path,
    *,
    command: str = "",
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Run a study, or resume one, and write its report.

    Args:
        directory: empty, or holding this study.
        command: what the report says it was made by.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: invalid settings or data, or an unusable directory, and nothing was written.
    """
    settings = study_as_begun(settings, directory / STUDY)
    prepared = prepare_study(settings)
    with claimed_study(directory, settings.to_dict()):
        trained = train_all(prepared, directory, on_progress=on_progress)
        attacked = attack_all(prepared, trained)
        report = build_report(prepared, trained, attacked, command=command)
        for run, more in zip(report["runs"], changes(prepared, trained), strict=True):
            run |= more
        write_report(report, directory)
    return report


def attack_model(
    model: Path,
    directory: Path,
    settings: AttackSettings,
    *,
    command: str = "",
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Attack a model that is already trained, and write a report.

    Args:
        model: directory of the model; what it was trained on is the training split of the data.
            With prefixes in the settings, the directory is all that is needed.
        directory: of the report; empty, or holding this attack.
        command: what the report says it was made by.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: invalid model, settings or data, or an unusable directory, and nothing was
            written.
    """
    _check_apart(model, directory)
    saved = load(model)
    if settings.prefix:
        report = completion_report(saved, model, settings, command=command)
        with claimed_study(directory, _completion(model, settings)):
            write_report(report, directory)
        return report
    # "." and ".." have no name of their own.
    name = model.name if model.name not in ("", "..") else model.resolve().name
    prepared = prepare_attack(saved, settings, name=name)
    (budget,) = prepared.budgets
    saved.classifier.model.to(budget.experiment.compute.device)
    target = budget.read(saved.classifier, 0)
    # References are trained like this model, and must not serve another of the same name and ε.
    study = prepared.settings.to_dict() | {"target": read_json(model / CONFIG)["digest"]}
    more: dict[str, Any] = {}
    if UNTARGETED in settings.chosen_attacks:
        study |= {UNTARGETED: _completion(model, settings)}
        more = {UNTARGETED: _untargeted(saved, prepared, settings)}
    with claimed_study(directory, study):
        trained = TrainedBudget(
            budget=budget,
            target=target,
            references=train_references(prepared, budget, directory, on_progress=on_progress),
            results=Results.from_dict(saved.metrics),
        )
        attacked = attack_all(prepared, [trained])
        report = build_report(prepared, [trained], attacked, command=command)
        report["runs"][0] |= more
        write_report(report, directory)
    return report


def _untargeted(saved: SavedModel, prepared: Prepared, settings: AttackSettings) -> dict[str, Any]:
    reference = None
    if settings.public is not None:
        reference = load(Path(settings.public)).classifier
        reference.model.to(resolved_device(settings.device))
    return untargeted_entry(
        saved.classifier,
        prepared.corpus,
        slot=settings.slot,
        values=settings.candidates,
        reference=reference,
        confidence=settings.confidence,
        seed=settings.seed,
    )


def _completion(model: Path, settings: AttackSettings) -> dict[str, Any]:
    """All that a completion depends on, as JSON."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    content["explained"] = content.pop("target")  # the name is that of the model, below
    if settings.public is not None:
        content["public"] = read_json(Path(settings.public) / CONFIG)["digest"]
    return content | {"target": read_json(model / CONFIG)["digest"]}


def _check_apart(model: Path, directory: Path) -> None:
    """Raise ValueError if the report would be written into the model."""
    if model.resolve() in (directory.resolve(), *directory.resolve().parents):
        raise ValueError(
            f"Expected the report outside of the model {model}, which nothing may be added to, "
            f"got {directory}: choose another folder."
        )
