"""Training one model into a directory, which an interruption does not ruin.

Resuming takes the weights of the last checkpoint and the steps that the ledger has left: releases
whose updates were lost stay spent, so that ε is never exceeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.ranges import check_choice
from dpnlu.nlu.classifier import LSTM, Classifier
from dpnlu.nlu.data import (
    Corpus,
    Example,
    HashedVocabulary,
    Vocabulary,
    fitted_vocabulary,
    load_corpus,
    read_labels,
    read_word_list,
)
from dpnlu.nlu.encoding import Labels, without_digits
from dpnlu.nlu.fingerprint import Fingerprint
from dpnlu.runs.directory import (
    Run,
    check_unchanged,
    claimed,
    interrupted_run,
    new_ledger,
    record_run,
    resumed_ledger,
    tidy,
)
from dpnlu.runs.experiment import (
    Experiment,
    experiment_for,
    plan_for,
    size_in_units,
)
from dpnlu.runs.model_directory import CHECKPOINT, RUN, is_model, load
from dpnlu.runs.probing import found_size
from dpnlu.runs.progress import OnProgress, silent
from dpnlu.runs.public_data import PublicData
from dpnlu.runs.results import Results, results_of, save_trained
from dpnlu.runs.setting import AUTO
from dpnlu.runs.settings import NOISES, SYSTEM_NOISE, TrainSettings, as_begun
from dpnlu.runs.train import Trained, new_classifier, train
from dpnlu.training.checkpoint import Checkpoints
from dpnlu.training.loop import check_fit

OTHER_CHOICES = "Any choice among several trainings, or of settings, by looking at their results."


class DivergedError(RuntimeError):
    """Training ended with weights that are infinite or not a number; they are not saved."""


def train_model(
    settings: TrainSettings,
    directory: Path,
    *,
    resume: bool,
    on_progress: OnProgress = silent,
) -> Results:
    """Train a model into a directory, or resume a training that was interrupted.

    Raises:
        ValueError: invalid settings or data, or an unusable directory, and nothing was written; or
            the ledger was touched while training went on.
        DivergedError: the weights are not finite.
    """
    settings = as_begun(settings, directory / RUN)
    work = prepared(settings)
    with claimed(directory):
        run = interrupted_run(directory, resume=resume)
        if run is not None:
            _check_same(run, work, directory)
        if is_model(directory):  # all was written, and not all tidied up
            results = Results.from_dict(load(directory).metrics)
        else:
            results = _trained(work, directory, run, on_progress)
        tidy(directory)
    return results


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done, checked as far as it can be before anything is written."""

    settings: TrainSettings
    corpus: Corpus
    public: PublicData | None
    experiment: Experiment
    plan: PrivacyPlan | None
    classifier: Classifier

    def with_size(self, physical_batch_size: int | None) -> Work:
        """The same in physical batches of this size; None: of the one that was asked for."""
        if physical_batch_size is None:
            return self
        compute = replace(self.experiment.compute, physical_batch_size=physical_batch_size)
        return replace(self, experiment=replace(self.experiment, compute=compute))

    def fingerprint(self) -> Fingerprint:
        """Of the data, with a new key."""
        return Fingerprint.take(self.corpus, self.classifier.encoding, self._beside)

    def matches(self, fingerprint: Fingerprint) -> bool:
        """Whether the data are those that a fingerprint was taken of."""
        return fingerprint.matches(self.corpus, self.classifier.encoding, self._beside)

    @property
    def _beside(self) -> Sequence[Example]:
        """The public examples that every step learns from."""
        return self.public.examples if self.public is not None and self.public.is_beside else ()


def prepared(settings: TrainSettings) -> Work:
    """Check the settings, as far as that is possible before training, and make what they ask for.

    Raises:
        ValueError: invalid settings or data.
    """
    check_choice("noise", settings.noise, NOISES)
    corpus = _with_labels(load_corpus(settings.data, seed=settings.seed), settings.labels)
    public = PublicData.asked_for(settings, private=corpus)
    units = size_in_units(corpus.split("train"), settings.unit)
    is_sized = settings.physical_batch_size != AUTO  # else that is done when training begins
    experiment = experiment_for(
        settings if is_sized else replace(settings, physical_batch_size=None),
        epsilon=settings.epsilon,
        labels=Labels(corpus.intents, corpus.tags) if public is None else public.labels,
        vocabulary=_vocabulary(settings, corpus),
        units=units,
        learning_rate=settings.learning_rate,
        engine=settings.engine,
    )
    plan = plan_for(settings, experiment.recipe, epsilon=settings.epsilon, num_examples=units)
    experiment.check_validation(corpus)
    classifier = new_classifier(experiment, seed=settings.seed)
    check_fit(
        classifier.model,
        recipe=experiment.recipe,
        plan=plan,
        compute=experiment.compute,
        public=public.beside(classifier, experiment.compute) if public is not None else None,
    )
    return Work(
        settings=settings,
        corpus=corpus,
        public=public,
        experiment=experiment,
        plan=plan,
        classifier=classifier,
    )


def _with_labels(corpus: Corpus, path: str | None) -> Corpus:
    """The corpus with the label sets that a file declares."""
    if path is None:
        return corpus
    intents, slots = read_labels(Path(path))
    return replace(corpus, declared_intents=intents, declared_slots=slots)


def _vocabulary(settings: TrainSettings, corpus: Corpus) -> Vocabulary:
    if settings.vocabulary == "hashed":
        return HashedVocabulary()
    if settings.model != LSTM:
        raise ValueError(
            f"Expected --vocabulary with --model lstm, got it with {settings.model}, which brings "
            "a tokenizer of its own: leave one of the two out."
        )
    if settings.vocabulary != "fitted":
        return read_word_list(Path(settings.vocabulary))
    examples = corpus.split("train")
    if settings.redact_digits:  # or the list of words would hold the numbers
        examples = tuple(replace(e, tokens=tuple(without_digits(e.tokens))) for e in examples)
    return fitted_vocabulary(examples)


def _check_same(run: Run, work: Work, directory: Path) -> None:
    """Raise ValueError unless the training that was started is the one that is asked for."""
    if run.settings != work.settings.to_dict():
        raise ValueError(
            f"Expected the settings with which the training in {directory} was started, got "
            "others: repeat those of its run.json, or choose another folder."
        )
    if run.fingerprint and not work.matches(run.fingerprint):
        raise ValueError(
            f"Expected the data with which the training in {directory} was started, got other "
            "texts, labels or words, or another order: restore them, or choose another folder."
        )


def _trained(work: Work, directory: Path, run: Run | None, on_progress: OnProgress) -> Results:
    """Train, from the start if there is no `run` to resume, and complete the directory."""
    is_new = run is None
    if run is None:
        run = Run(
            settings=work.settings.to_dict(),
            fingerprint=work.fingerprint(),
            physical_batch_size=_found_size(work),
        )
        record_run(directory, run)
    work = work.with_size(run.physical_batch_size)
    with _ledger(work.plan, directory, is_new=is_new) as ledger:
        if ledger is not None:
            work = replace(work, plan=ledger.plan)  # as it was calibrated when training started
        trained = _fitted(work, directory, run, ledger, on_progress)
    _check_finite(trained.classifier.model)
    if ledger is not None:
        check_unchanged(directory, ledger)
    results = results_of(trained, work.corpus.split("test"), plan=work.plan)
    results = replace(
        results,
        physical_batch_size=run.physical_batch_size,
        public_use=None if work.public is None else work.settings.public_use,
    )
    save_trained(
        trained,
        directory,
        experiment=work.experiment,
        plan=work.plan,
        ledger=ledger,
        results=results,
        not_covered=not_covered(work),
    )
    return results


def _found_size(work: Work) -> int | None:
    """How many examples the memory holds at once; None: that was not asked for."""
    if work.settings.physical_batch_size != AUTO:
        return None
    return found_size(
        work.classifier,
        plan=work.plan,
        recipe=work.experiment.recipe,
        num_examples=len(work.corpus.split("train")),
        compute=work.experiment.compute,
    )


@contextmanager
def _ledger(plan: PrivacyPlan | None, directory: Path, *, is_new: bool) -> Iterator[Ledger | None]:
    """The ledger, new or resumed; none in ordinary training."""
    if plan is None:
        yield None
        return
    with new_ledger(directory, plan) if is_new else resumed_ledger(directory, plan) as ledger:
        yield ledger


def _fitted(
    work: Work, directory: Path, run: Run, ledger: Ledger | None, on_progress: OnProgress
) -> Trained:
    plan, recipe, examples = work.plan, work.experiment.recipe, work.corpus.split("train")
    public, compute = work.public, work.experiment.compute
    if public is not None and public.is_first and not (directory / CHECKPOINT).exists():
        public.teach(
            work.classifier,
            work.settings,
            compute,
            on_progress=lambda done, total: on_progress("public data", done, total),
        )
    return train(
        work.classifier,
        examples,
        recipe=recipe,
        compute=compute,
        plan=plan,
        seed=work.settings.seed,
        system_noise=work.settings.noise == SYSTEM_NOISE,
        ledger=ledger,
        checkpoints=Checkpoints(
            path=directory / CHECKPOINT,
            every=plan.steps_per_epoch if plan else max(1, len(examples) // recipe.batch_size),
            run=run.fingerprint.digest if run.fingerprint else "",
        ),
        on_progress=lambda done, total: on_progress("training", done, total),
        validation=work.corpus.split("valid") if recipe.patience is not None else (),
        public=public.beside(work.classifier, compute) if public is not None else None,
    )


def _check_finite(model: nn.Module) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise DivergedError(
            "Expected finite weights, got some that are infinite or not a number: training has "
            "diverged, and no model is saved; lower the learning rate, in another folder."
        )


def not_covered(work: Work) -> Sequence[str]:
    """What was published or chosen by looking at the data, outside the training."""
    if work.plan is None:
        return ()
    found = []
    if not work.corpus.labels_are_public:
        found.append("The label set was read from the data, not declared.")
    if not work.experiment.vocabulary.is_public:
        found.append("The vocabulary was read from the training texts.")
    if work.settings.noise != SYSTEM_NOISE:
        found.append(
            "What the floating-point numbers that a generator draws as noise give away of the sums "
            "that they are added to (Mironov 2012), against which there is --noise system."
        )
    if work.public is not None:
        found.append(work.public.statement())
    return [*found, OTHER_CHOICES]
