"""Training a model for release: one directory, which an interruption does not ruin.

Continuing after an interruption takes the weights of the last checkpoint and the steps that the
ledger has left: releases whose updates were lost stay spent, so that ε is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from dpnlu.runs import recipes as defaults
from dpnlu.runs.model_card import model_card
from dpnlu.training.checkpoint import Checkpoints
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import (
    Corpus,
    HashedVocabulary,
    Vocabulary,
    fitted_vocabulary,
    load_corpus,
    read_labels,
    read_word_list,
)
from dpnlu.runs.directory import (
    Run,
    begin,
    begun,
    check_unchanged,
    claimed,
    continued_ledger,
    new_ledger,
    tidy,
)
from dpnlu.nlu.encoding import Labels
from dpnlu.runs.train import Experiment, Trained, measure, new_classifier, train
from dpnlu.nlu.fingerprint import Fingerprint
from dpnlu.training.loop import ComputeConfig, check_fit
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.runs.progress import Told
from dpnlu.runs.model_directory import CHECKPOINT, is_model, load, save


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
        device: see `ComputeConfig`.
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
    device: str = "cpu"
    seed: int = 0


class DivergedError(RuntimeError):
    """Training ended with weights that are infinite or not a number; they are not released."""


def release(
    settings: ReleaseSettings, directory: Path, *, resume: bool, told: Told
) -> dict[str, Any]:
    """Train a model into a directory, or go on with one.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: the settings, the data or the directory do not do, and nothing was written; or
            the ledger was touched while training went on.
        DivergedError: the weights are not finite.
    """
    work = _prepared(settings)
    with claimed(directory):
        run = begun(directory, resume=resume)
        if run is not None:
            _check_same(run, work, directory)
        if is_model(directory):  # all was written, and not all tidied up
            metrics = load(directory).metrics
        else:
            metrics = _trained(work, directory, run, told)
        tidy(directory)
    return metrics


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is to be done, checked as far as it can be before anything is written."""

    settings: ReleaseSettings
    corpus: Corpus
    experiment: Experiment
    plan: PrivacyPlan | None
    classifier: Classifier


def _prepared(settings: ReleaseSettings) -> _Work:
    corpus = _with_labels(load_corpus(settings.data, seed=settings.seed), settings.labels)
    experiment = _experiment(settings, corpus)
    plan = _plan(settings, experiment, corpus)
    classifier = new_classifier(experiment, seed=settings.seed)
    check_fit(classifier.model, recipe=experiment.recipe, plan=plan, compute=experiment.compute)
    return _Work(
        settings=settings,
        corpus=corpus,
        experiment=experiment,
        plan=plan,
        classifier=classifier,
    )


def _check_same(run: Run, work: _Work, directory: Path) -> None:
    """Whether the training that was begun is the one that is asked for."""
    if run.settings != _described(work.settings):
        raise ValueError(
            f"Expected the settings with which the training in {directory} was begun, got others: "
            "repeat those of its run.json, or choose another folder."
        )
    if run.fingerprint and not run.fingerprint.matches(work.corpus, work.classifier.encoding):
        raise ValueError(
            f"Expected the data with which the training in {directory} was begun, got other texts, "
            "labels or words, or another order: restore them, or choose another folder."
        )


def _trained(work: _Work, directory: Path, run: Run | None, told: Told) -> dict[str, Any]:
    """Train, from the beginning if there is no `run` to go on with, and complete the directory."""
    is_new = run is None
    if run is None:
        fingerprint = Fingerprint.take(work.corpus, work.classifier.encoding)
        run = Run(settings=_described(work.settings), fingerprint=fingerprint)
        begin(directory, run)
    with _ledger(work.plan, directory, is_new=is_new) as ledger:
        if ledger is not None:
            work = replace(work, plan=ledger.plan)  # as it was calibrated when training began
        trained = _fitted(work, directory, run, ledger, told)
    _check_finite(trained.classifier.model)
    if ledger is not None:
        check_unchanged(directory, ledger)
    return _complete(work, directory, ledger, trained)


@contextmanager
def _ledger(plan: PrivacyPlan | None, directory: Path, *, is_new: bool) -> Iterator[Ledger | None]:
    """The ledger, new or gone on with; none in ordinary training."""
    if plan is None:
        yield None
        return
    with new_ledger(directory, plan) if is_new else continued_ledger(directory, plan) as ledger:
        yield ledger


def _fitted(work: _Work, directory: Path, run: Run, ledger: Ledger | None, told: Told) -> Trained:
    plan, recipe, examples = work.plan, work.experiment.recipe, work.corpus.split("train")
    return train(
        work.classifier,
        examples,
        recipe=recipe,
        compute=work.experiment.compute,
        plan=plan,
        seed=work.settings.seed,
        ledger=ledger,
        checkpoints=Checkpoints(
            path=directory / CHECKPOINT,
            every=plan.steps_per_epoch if plan else max(1, len(examples) // recipe.batch_size),
            run=run.fingerprint.digest if run.fingerprint else "",
        ),
        progress=lambda done, total: told("training", done, total),
    )


def _check_finite(model: nn.Module) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise DivergedError(
            "Expected finite weights, got some that are infinite or not a number: training has "
            "diverged, and no model is released; lower the learning rate, in another folder."
        )


def _complete(
    work: _Work, directory: Path, ledger: Ledger | None, trained: Trained
) -> dict[str, Any]:
    """Measure the model and make the directory one of a model; returned are the metrics."""
    plan, experiment = work.plan, work.experiment
    metrics = measure(work.classifier, work.corpus.split("test")).to_dict() | {
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
        not_covered=[] if plan is None else _not_covered(work.corpus, experiment),
        metrics=metrics,
    )
    recipe, classifier = experiment.recipe, work.classifier
    save(classifier, directory, recipe=recipe, plan=plan, metrics=metrics, card=card)
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
            engine=settings.engine,
            physical_batch_size=settings.physical_batch_size,
            device=settings.device,
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
        expected_batch_size=(
            min(experiment.recipe.batch_size, size)
            if settings.batch_size is None
            else settings.batch_size
        ),
        epochs=experiment.recipe.epochs,
        max_grad_norm=settings.max_grad_norm,
    )


def _described(settings: ReleaseSettings) -> dict[str, Any]:
    # A text, as JSON has no infinity.
    described = asdict(settings) | {"epsilon": str(settings.epsilon).removesuffix(".0")}
    del described["device"]  # training may go on on another
    return described


def _not_covered(corpus: Corpus, experiment: Experiment) -> Sequence[str]:
    """What was released or chosen by looking at the data, outside the training."""
    found = []
    if not corpus.labels_are_public:
        found.append("The label set was read from the data, not declared.")
    if not experiment.vocabulary.is_public:
        found.append("The vocabulary was read from the training texts.")
    found.append("Any choice among several trainings, or of settings, by looking at their results.")
    return found
