"""One budget of a study: all its models, trained alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attacks.farm import Arrays
from dpnlu.compare.extracting import extract_canaries
from dpnlu.compare.reading import Reading, read_canary, read_signals
from dpnlu.compare.study import Study
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Example
from dpnlu.runs.experiment import Experiment, size_in_units
from dpnlu.runs.train import Trained, measure, new_classifier, train
from dpnlu.training.loop import Progress


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One column of a study.

    Attributes:
        name: "eps-8" or "eps-inf".
        target_epsilon: what was asked for; None: ordinary training.
        plan: the target's; None: ordinary training.
        seed: of everything random, together with the number of the model.
        extract: whether secrets of canaries are searched for as well.
    """

    name: str
    target_epsilon: float | None
    study: Study
    experiment: Experiment
    plan: PrivacyPlan | None
    test: tuple[Example, ...]
    seed: int
    extract: bool = False

    def __call__(self, reference: int) -> Arrays:
        """Train reference model number `reference` and read it; for `attacks.farm.grow`."""
        trained = self.train(reference + 1)
        reading = self.read(trained.classifier, reference + 1)
        return replace(reading, train_seconds=trained.result.seconds).to_arrays()

    def train(
        self, model: int, *, ledger: Path | None = None, on_progress: Progress | None = None
    ) -> Trained:
        """Train one of the models; 0 is the target."""
        examples = self.study.examples(model)
        seed = int(np.random.SeedSequence([self.seed, model]).generate_state(1)[0])
        return train(
            new_classifier(self.experiment, seed=seed),
            examples,
            recipe=self.experiment.recipe,
            compute=self.experiment.compute,
            plan=self.plan_for(examples),
            seed=seed,
            repeatable_noise=True,
            ledger=ledger,
            on_progress=on_progress,
        )

    def plan_for(self, examples: Sequence[Example]) -> PrivacyPlan | None:
        """The same mechanism, hence the same ε, on a slightly different number of examples or
        users."""
        if self.plan is None:
            return None
        return replace(self.plan, num_examples=size_in_units(examples, self.plan.unit))

    def read(self, classifier: Classifier, model: int) -> Reading:
        """Signals on the audit examples, losses of all canaries, accuracy on test examples."""
        canaries = self.study.canaries
        extracted = extract_canaries(classifier, canaries if self.extract else (), seed=self.seed)
        return Reading(
            signals=read_signals(classifier, self.study.audit),
            intent_accuracy=measure(classifier, self.test).intent_accuracy,
            canaries={
                canary.pattern.name: read_canary(
                    classifier,
                    canary,
                    secrets[model],
                    extracted=extracted.get(canary.pattern.name, {}),
                )
                for canary, secrets in zip(canaries, self.study.secrets, strict=True)
            },
        )
