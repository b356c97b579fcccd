"""The first step of a study: train its models, and read what they say.

DIR/study.json                what the study is; an existing study is resumed
DIR/runs/NAME/target/         the target's model directory
DIR/runs/NAME/target.npz      what the target says
DIR/runs/NAME/references/     what the reference models say
DIR/runs/NAME/retrainings/    what models say that were trained on the same from other seeds
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attacks import farm
from dpnlu.compare.answering import Retraining, read_answers
from dpnlu.compare.budget import Budget
from dpnlu.compare.preparation import Prepared
from dpnlu.compare.reading import Reading
from dpnlu.mechanism.durable import write_json
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs.directory import claimed, recognised
from dpnlu.runs.model_directory import LEDGER, METRICS, is_model, load, read_json
from dpnlu.runs.progress import OnProgress
from dpnlu.runs.results import Results, results_of, save_trained

STUDY = "study.json"


@dataclass(frozen=True, kw_only=True)
class TrainedBudget:
    """What the models of one budget say.

    Attributes:
        results: how well the target does, and what its training took.
        retrainings: what models say that were trained as the target was, from other seeds.
    """

    budget: Budget
    target: Reading
    references: tuple[Reading, ...]
    results: Results
    retrainings: tuple[Retraining, ...] = ()

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Those of all models, the target's first."""
        return (self.target, *self.references)


@contextmanager
def claimed_study(directory: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """Make the directory this study's, or recognise it as such, and keep others out of it.

    Args:
        content: all that the study depends on, as JSON.

    Raises:
        ValueError: it holds another study or something else, or another process works in it.
    """
    with claimed(directory):
        existing = recognised(directory, STUDY)
        if existing is None:
            write_json(directory / STUDY, dict(content))
        elif existing != content:
            raise ValueError(
                f"Expected {directory} to hold this very study, found one with other settings or "
                "of another model: choose another folder, or repeat the settings to resume it."
            )
        yield


def train_all(
    prepared: Prepared, directory: Path, *, on_progress: OnProgress
) -> list[TrainedBudget]:
    """Train what is not trained yet.

    All targets come first, one after the other, so that their times can be compared; references are
    trained side by side.
    """
    targets = [
        _train_target(budget, directory / "runs" / budget.name, on_progress)
        for budget in prepared.budgets
    ]
    return [
        TrainedBudget(
            budget=budget,
            target=reading,
            references=train_references(prepared, budget, directory, on_progress=on_progress),
            results=results,
            retrainings=_retrain(prepared, budget, directory, on_progress),
        )
        for budget, (reading, results) in zip(prepared.budgets, targets, strict=True)
    ]


def _train_target(budget: Budget, home: Path, on_progress: OnProgress) -> tuple[Reading, Results]:
    """What the target says and how well it does, trained now or before."""
    target, signals = home / "target", home / "target.npz"
    if not (is_model(target) and signals.exists()):
        shutil.rmtree(target, ignore_errors=True)  # of an interrupted training
        target.mkdir(parents=True)
        trained = budget.train(
            0,
            ledger=target / LEDGER,
            on_progress=lambda done, total: on_progress(f"training {budget.name}", done, total),
        )
        farm.save_arrays(signals, budget.read(trained.classifier, 0).to_arrays())
        save_trained(
            trained,
            target,
            experiment=budget.experiment,
            plan=budget.plan,
            ledger=None if budget.plan is None else Ledger.read(target / LEDGER),
            results=results_of(trained, budget.test, plan=budget.plan),
            not_covered=(
                "This model belongs to a study: its noise was drawn from a recorded seed, and it "
                "may hold a canary. It must not be published.",
            ),
        )
    reading = Reading.from_arrays(farm.load_arrays(signals))
    if reading.answers is None:  # of an earlier version; the model is there to be asked
        classifier = load(target).classifier
        classifier.model.to(budget.experiment.compute.device)
        reading = replace(reading, answers=read_answers(classifier, budget.test))
    return reading, Results.from_dict(read_json(target / METRICS))


def train_references(
    prepared: Prepared, budget: Budget, directory: Path, *, on_progress: OnProgress
) -> tuple[Reading, ...]:
    """What the reference models of a budget say, trained now or before."""
    count = prepared.settings.references
    arrays = _grown(budget, budget, "references", count, directory, on_progress)
    return tuple(map(Reading.from_arrays, arrays))


def _retrain(
    prepared: Prepared, budget: Budget, directory: Path, on_progress: OnProgress
) -> tuple[Retraining, ...]:
    """What the retrainings of a budget's target say, trained now or before."""
    count = prepared.settings.chosen_retrainings
    if not count:  # not even a folder
        return ()
    arrays = _grown(budget, budget.retrain, "retrainings", count, directory, on_progress)
    return tuple(map(Retraining.from_arrays, arrays))


def _grown(
    budget: Budget,
    train: farm.Train,
    name: str,
    count: int,
    directory: Path,
    on_progress: OnProgress,
) -> list[farm.Arrays]:
    return farm.grow(
        train,
        count=count,
        directory=directory / "runs" / budget.name / name,
        key={"study": read_json(directory / STUDY), "budget": budget.name},
        # Side by side on as many cores, but one after the other on one accelerator.
        workers=os.cpu_count() if budget.experiment.compute.device == "cpu" else 1,
        progress=lambda done, total: on_progress(f"{name} {budget.name}", done, total),
    )
