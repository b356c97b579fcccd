"""Training a model for release: one directory, which an interruption does not ruin.

While training runs, the directory holds `run.json` (what was asked for), the ledger and the last
checkpoint. Continuing after an interruption takes the weights of the checkpoint and the steps that
the ledger has left: releases whose updates were lost stay spent, so that ε is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpnlu import defaults
from dpnlu.card import model_card
from dpnlu.checkpoint import Checkpoints
from dpnlu.data import (
    Corpus,
    HashedVocabulary,
    Vocabulary,
    fitted_vocabulary,
    load_corpus,
    read_labels,
    read_word_list,
)
from dpnlu.encoding import Labels
from dpnlu.experiment import Experiment, measure, new_classifier, train
from dpnlu.fitting import ComputeConfig
from dpnlu.ledger import Ledger
from dpnlu.plan import PrivacyPlan
from dpnlu.progress import Told
from dpnlu.saving import CHECKPOINT, LEDGER, RUN, is_model, read_json, save, write_json


@dataclass(frozen=True, kw_only=True)
class ReleaseSettings:
    """What `dpnlu train` is asked for.

    Attributes:
        data: SPEC of the corpus.
        model: "lstm" or "encoder:NAME_OR_PATH".
        epsilon: infinity: ordinary training.
        epochs, batch_size, learning_rate, dropout: None: as recommended for the model.
        vocabulary: "hashed", "fitted" (from the training texts: not covered by ε), or the path of
            a public word list.
        labels: path of a JSON file {"intents": [...], "slots": [...]} that declares the label sets;
            None: as the corpus declares them, else read from the data.
        seed: of initial weights and dropout; noise and sampling are always fresh.
    """

    data: str
    model: str
    epsilon: float
    delta: float = defaults.DELTA
    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    dropout: float | None = None
    max_grad_norm: float = defaults.MAX_GRAD_NORM
    vocabulary: str = "hashed"
    labels: str | None = None
    engine: str | None = None
    physical_batch_size: int = 64
    seed: int = 0


def release(
    settings: ReleaseSettings, directory: Path, *, resume: bool, told: Told
) -> dict[str, Any]:
    """Train a model into a directory, or go on with one.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: the settings, the data or the directory do not do; nothing was written.
    """
    corpus = _with_labels(load_corpus(settings.data, seed=settings.seed), settings.labels)
    experiment = _experiment(settings, corpus)
    plan = _plan(settings, experiment, corpus)
    classifier = new_classifier(experiment, seed=settings.seed)
    ledger = _claimed(directory, settings, plan, resume=resume)
    if ledger is not None:
        plan = ledger.plan  # of a training that is gone on with: as it was calibrated then
    steps_per_epoch = plan.steps_per_epoch if plan else _steps_per_epoch(experiment, corpus)
    trained = train(
        classifier,
        corpus.split("train"),
        recipe=experiment.recipe,
        compute=experiment.compute,
        plan=plan,
        seed=settings.seed,
        ledger=ledger,
        checkpoints=Checkpoints(path=directory / CHECKPOINT, every=steps_per_epoch),
        progress=lambda done, total: told("training", done, total),
    )
    metrics = measure(trained.classifier, corpus.split("test")).to_dict() | {
        "train_seconds": trained.result.seconds,
        "steps": trained.result.steps,
    }
    if trained.peak_memory_mib is not None:
        metrics["peak_memory_mib"] = trained.peak_memory_mib
    if plan is not None and trained.result.epsilon is not None:
        metrics |= {"epsilon": trained.result.epsilon, "delta": plan.target_delta}
    card = model_card(
        architecture=experiment.architecture,
        plan=plan,
        ledger=ledger,
        not_covered=[] if plan is None else _not_covered(corpus, experiment),
        metrics=metrics,
    )
    save(
        trained.classifier,
        directory,
        recipe=experiment.recipe,
        plan=plan,
        metrics=metrics,
        card=card,
    )
    for unfinished in (RUN, CHECKPOINT):
        (directory / unfinished).unlink(missing_ok=True)
    return metrics


def _with_labels(corpus: Corpus, path: str | None) -> Corpus:
    """The corpus with the label sets that a file declares."""
    if path is None:
        return corpus
    intents, slots = read_labels(Path(path))
    return replace(corpus, declared_intents=intents, declared_slots=slots)


def _experiment(settings: ReleaseSettings, corpus: Corpus) -> Experiment:
    private = math.isfinite(settings.epsilon)
    recipe = defaults.recipe(
        settings.model, private=private, epochs=settings.epochs, batch_size=settings.batch_size
    )
    if settings.learning_rate is not None:
        recipe = replace(recipe, learning_rate=settings.learning_rate)
    return Experiment(
        architecture=defaults.architecture(
            settings.model, private=private, dropout=settings.dropout
        ),
        recipe=recipe,
        labels=Labels(corpus.intents, corpus.tags),
        vocabulary=_vocabulary(settings.vocabulary, corpus),
        compute=ComputeConfig(
            engine=settings.engine, physical_batch_size=settings.physical_batch_size
        ),
    )


def _vocabulary(name: str, corpus: Corpus) -> Vocabulary:
    if name == "hashed":
        return HashedVocabulary()
    if name == "fitted":
        return fitted_vocabulary(corpus.split("train"))
    return read_word_list(Path(name))


def _plan(settings: ReleaseSettings, experiment: Experiment, corpus: Corpus) -> PrivacyPlan | None:
    if not math.isfinite(settings.epsilon) and settings.epsilon > 0:
        return None
    size = len(corpus.split("train"))
    return PrivacyPlan.calibrate(
        target_epsilon=settings.epsilon,
        target_delta=settings.delta,
        num_examples=size,
        expected_batch_size=settings.batch_size or min(experiment.recipe.batch_size, size),
        epochs=experiment.recipe.epochs,
        max_grad_norm=settings.max_grad_norm,
    )


def _steps_per_epoch(experiment: Experiment, corpus: Corpus) -> int:
    return max(1, len(corpus.split("train")) // experiment.recipe.batch_size)


def _claimed(
    directory: Path, settings: ReleaseSettings, plan: PrivacyPlan | None, *, resume: bool
) -> Ledger | None:
    """Make the directory this training's, or recognise it as such; open its ledger."""
    if is_model(directory):
        raise ValueError(f"Expected no model in {directory}, found a finished one: choose another.")
    begun = (directory / RUN).exists()
    if begun and not resume:
        raise ValueError(
            f"Expected {directory} to be empty, found an unfinished training: add --resume to go "
            "on with it, or choose another folder."
        )
    if begun:
        if read_json(directory / RUN) != _described(settings):
            raise ValueError(
                f"Expected the settings with which the training in {directory} was begun, got "
                "others: repeat those of its run.json, or choose another folder."
            )
        ledger = directory / LEDGER
        return None if plan is None else Ledger.resume(ledger)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"Expected {directory} to be empty, found something else: choose another folder."
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RUN, _described(settings))
    return None if plan is None else Ledger(plan, path=directory / LEDGER)


def _described(settings: ReleaseSettings) -> dict[str, Any]:
    return asdict(settings) | {"epsilon": f"{settings.epsilon:g}"}


def _not_covered(corpus: Corpus, experiment: Experiment) -> Sequence[str]:
    """What was released or chosen by looking at the data, outside the training."""
    found = []
    if not corpus.labels_are_public:
        found.append("The label set was read from the data, not declared.")
    if not experiment.vocabulary.is_public:
        found.append("The vocabulary was read from the training texts.")
    found.append("Any choice among several trainings, or of settings, by looking at their results.")
    return found
