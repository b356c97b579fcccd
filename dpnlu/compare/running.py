"""Running a study: train the target and the references at every budget, attack, report.

DIR/study.json                what the study is; a study begun is gone on with
DIR/runs/NAME/target/         the target's model directory
DIR/runs/NAME/target.npz      what the target says
DIR/runs/NAME/references/     what the reference models say
DIR/report.{json,md,html}     the report
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attacks import farm
from attacks.canaries import parse_canary
from attacks.membership import ATTACKS
from dpnlu.accounting.events import check_delta
from dpnlu.compare.attacking import (
    DEFAULT,
    LEAST_REFERENCES,
    NAMES,
    needs_more,
    needs_references,
)
from dpnlu.compare.study import LEAST_AUDIT_EXAMPLES, Study
from dpnlu.compare.training import Arrays, Budget
from dpnlu.mechanism.durable import write_json
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.ranges import LARGEST_SEED, check_count, check_positive
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, HashedVocabulary, RepeatReport, drop_repeated, load_corpus
from dpnlu.runs import recipes as defaults
from dpnlu.runs.model_card import model_card
from dpnlu.runs.model_directory import LEDGER, METRICS, is_model, read_json, save
from dpnlu.runs.progress import Told
from dpnlu.runs.train import Experiment, measure, new_classifier
from dpnlu.training.loop import ComputeConfig

STUDY = "study.json"

# Beyond these a study would never end.
MOST_EPOCHS, MOST_REFERENCES = 1e6, 100_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a study depends on.

    Attributes:
        data: SPEC of the corpus.
        model: "lstm" or "encoder:NAME_OR_PATH".
        epsilons: budgets; infinity is ordinary training.
        epochs, batch_size, dropout: None: as recommended for the model; dropout differs between
            ordinary and private training then.
        attacks: names from `dpnlu.compare.attacking.NAMES`.
        canaries: such as "pin:4:R=100", of different patterns.
        references: number of reference models per budget.
        audit_examples: how many training examples a coin decides about, at least 20; at most all
            of them.
        confidence: of all intervals and bounds.
        device: see `ComputeConfig`.

    Raises:
        ValueError: a setting is out of range, or two of them contradict each other.
    """

    data: str
    model: str
    epsilons: tuple[float, ...]
    delta: float = defaults.DELTA
    epochs: float | None = None
    batch_size: int | None = None
    dropout: float | None = None
    max_grad_norm: float = defaults.MAX_GRAD_NORM
    attacks: tuple[str, ...] = DEFAULT
    canaries: tuple[str, ...] = ()
    references: int = 8
    audit_examples: int = 2000
    confidence: float = 0.95
    physical_batch_size: int = 64
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_epsilons()
        self._check_numbers()
        self._check_attacks()
        defaults.architecture(self.model, private=False, dropout=self.dropout)

    def _check_epsilons(self) -> None:
        if bad := [epsilon for epsilon in self.epsilons if not epsilon > 0]:
            raise ValueError(f"Expected every ε to be positive (or inf), got {bad[0]}.")
        names = [budget_name(epsilon) for epsilon in self.epsilons]
        if len(set(names)) < len(names) or not names:
            raise ValueError(
                f"Expected different values of ε, at least one, got {', '.join(names)}: of two "
                "that agree in six digits, leave one out."
            )

    def _check_numbers(self) -> None:
        check_delta(self.delta)
        if self.epochs is not None:
            check_positive("epochs", self.epochs, most=MOST_EPOCHS)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_positive("max_grad_norm", self.max_grad_norm)
        check_count("physical_batch_size", self.physical_batch_size)
        check_count("seed", self.seed, least=0, most=LARGEST_SEED)
        if not 0 < self.confidence < 1:
            raise ValueError(f"Expected a confidence in (0, 1), got {self.confidence}.")
        if self.references < 0 or self.audit_examples < LEAST_AUDIT_EXAMPLES:
            raise ValueError(
                f"Expected references >= 0 and audit examples >= {LEAST_AUDIT_EXAMPLES}, got "
                f"{self.references} and {self.audit_examples}."
            )
        check_count("references", self.references, least=0, most=MOST_REFERENCES)

    def _check_attacks(self) -> None:
        if unknown := sorted(set(self.attacks) - set(NAMES)):
            raise ValueError(f"Expected attacks among {', '.join(NAMES)}, got {unknown[0]!r}.")
        if unable := [name for name in self.attacks if needs_more(name, self.references)]:
            raise ValueError(
                f"Expected at least {LEAST_REFERENCES} references for the attack {unable[0]}, got "
                f"{self.references}: raise --references, or leave the attack out."
            )
        if "audit" in self.attacks and not set(self.attacks) & set(ATTACKS):
            raise ValueError(
                "Expected a membership attack whose scores the audit can use, got none: add loss "
                "or lira to the attacks."
            )
        patterns = [parse_canary(spec).pattern.name for spec in self.canaries]
        if len(set(patterns)) < len(patterns):
            raise ValueError(
                f"Expected canaries of different patterns, got {', '.join(self.canaries)}: two of "
                "one pattern would be confused; run them in studies of their own."
            )


@dataclass(frozen=True)
class Prepared:
    """A study before anything is trained.

    Attributes:
        corpus: without repeated texts.
        budgets: in the order asked for.
    """

    settings: Settings
    corpus: Corpus
    repeats: RepeatReport
    study: Study
    budgets: tuple[Budget, ...]


@dataclass(frozen=True)
class Finished:
    """What one budget's models say, the target's first, and what training the target took."""

    budget: Budget
    models: list[Arrays]
    metrics: dict[str, Any]


def prepare(settings: Settings) -> Prepared:
    """Load the data, draw who is a member of what, and calibrate the plans.

    Raises:
        ValueError: the data, a label set, a budget, the batch size or the encoder does not do, or
            the examples are too few; nothing has been written yet.
    """
    corpus, repeats = drop_repeated(load_corpus(settings.data, seed=settings.seed))
    size = len(corpus.split("train"))
    study = Study.draw(
        corpus,
        audit_examples=min(settings.audit_examples, size),
        references=settings.references,
        canaries=[parse_canary(spec) for spec in settings.canaries],
        rng=np.random.default_rng([settings.seed, 1]),
    )
    budgets = tuple(_budget(settings, corpus, study, epsilon) for epsilon in settings.epsilons)
    study.check_sides(for_references=needs_references(settings.attacks))
    new_classifier(budgets[0].experiment, seed=settings.seed)
    return Prepared(settings, corpus, repeats, study, budgets)


def train_all(prepared: Prepared, directory: Path, told: Told) -> list[Finished]:
    """Train what is not trained yet: all targets one after the other, so that their times can be
    compared, then the references side by side.

    Raises:
        ValueError: the directory holds another study, or something else.
    """
    claim_directory(directory, prepared.settings)
    targets = [_train_target(budget, directory, told) for budget in prepared.budgets]
    finished = []
    for budget, (arrays, metrics) in zip(prepared.budgets, targets, strict=True):
        references = train_references(prepared.settings, budget, directory, told)
        finished.append(Finished(budget, [arrays, *references], metrics))
    return finished


def claim_directory(directory: Path, settings: Settings) -> None:
    """Make the directory this study's, or recognise it as such.

    Raises:
        ValueError: it holds another study, or something else.
    """
    described = directory / STUDY
    names = [budget_name(epsilon) for epsilon in settings.epsilons]
    content = json.loads(json.dumps(asdict(settings) | {"epsilons": names}))
    del content["device"]  # a study may go on on another
    if described.exists():
        if read_json(described) != content:
            raise ValueError(
                f"Expected {directory} to hold this very study, found one with other settings: "
                "choose another folder, or repeat the settings to go on with it."
            )
        return
    begun = {STUDY, f"{STUDY}.partial"}  # by a start that was killed
    if directory.exists() and (
        not directory.is_dir() or {path.name for path in directory.iterdir()} - begun
    ):
        raise ValueError(
            f"Expected {directory} to be empty or to hold this study, found something else: choose "
            "another folder."
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(described, content)


def budget_name(epsilon: float) -> str:
    """What a budget is called in the report and in file names."""
    return f"eps-{epsilon:g}"


def _budget(settings: Settings, corpus: Corpus, study: Study, epsilon: float) -> Budget:
    private = math.isfinite(epsilon)
    recipe = defaults.recipe(
        settings.model, private=private, epochs=settings.epochs, batch_size=settings.batch_size
    )
    plan = None
    if private:
        plan = PrivacyPlan.calibrate(
            target_epsilon=epsilon,
            target_delta=settings.delta,
            num_examples=len(study.examples(0)),
            expected_batch_size=(
                settings.batch_size or min(recipe.batch_size, len(study.examples(0)))
            ),
            epochs=recipe.epochs,
            max_grad_norm=settings.max_grad_norm,
        )
    return Budget(
        name=budget_name(epsilon),
        target_epsilon=epsilon if private else None,
        study=study,
        experiment=Experiment(
            architecture=defaults.architecture(
                settings.model, private=private, dropout=settings.dropout
            ),
            recipe=recipe,
            labels=study.labels(corpus),
            vocabulary=HashedVocabulary(),
            compute=ComputeConfig(
                physical_batch_size=settings.physical_batch_size, device=settings.device
            ),
        ),
        plan=plan,
        test=corpus.split("test"),
        seed=settings.seed,
    )


def _train_target(budget: Budget, directory: Path, told: Told) -> tuple[Arrays, dict[str, Any]]:
    """The target's signals and metrics, trained now or before."""
    home = directory / "runs" / budget.name
    target, signals = home / "target", home / "target.npz"
    if not (is_model(target) and signals.exists()):
        shutil.rmtree(target, ignore_errors=True)  # begun and not finished: it was never released
        target.mkdir(parents=True)
        trained = budget.train(
            0,
            ledger=target / LEDGER,
            progress=lambda done, total: told(f"training {budget.name}", done, total),
        )
        arrays = budget.read(trained.classifier, 0)
        metrics = measure(trained.classifier, budget.test).to_dict() | {
            "train_seconds": trained.result.seconds,
            "steps": trained.result.steps,
        }
        if trained.peak_memory_mib is not None:
            metrics["peak_memory_mib"] = trained.peak_memory_mib
        if trained.result.epsilon is not None:
            metrics["epsilon"] = trained.result.epsilon
        farm.save_arrays(signals, arrays)
        _save_target(budget, trained.classifier, target, metrics)
    return farm.load_arrays(signals), read_json(target / METRICS)


def _save_target(
    budget: Budget, classifier: Classifier, target: Path, metrics: dict[str, Any]
) -> None:
    ledger = None if budget.plan is None else Ledger.read(target / LEDGER)
    card = model_card(
        architecture=budget.experiment.architecture,
        plan=budget.plan,
        ledger=ledger,
        not_covered=(
            "This model belongs to a study: its noise was drawn from a recorded seed, and it may "
            "hold a canary. It must not be released.",
        ),
        metrics=metrics,
    )
    save(
        classifier,
        target,
        recipe=budget.experiment.recipe,
        plan=budget.plan,
        metrics=metrics,
        card=card,
    )


def train_references(
    settings: Settings, budget: Budget, directory: Path, told: Told
) -> list[Arrays]:
    """What the reference models of a budget say, trained now or before."""
    return farm.grow(
        budget,
        count=settings.references,
        directory=directory / "runs" / budget.name / "references",
        key={"study": read_json(directory / STUDY), "budget": budget.name},
        # Side by side on as many cores, but one after the other on one accelerator.
        workers=os.cpu_count() if budget.experiment.compute.device == "cpu" else 1,
        progress=lambda done, total: told(f"references {budget.name}", done, total),
    )
