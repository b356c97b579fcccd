"""Training the models of a study at one privacy budget, and reading what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnlu.compare.study import Study, read_canary_losses, read_signals
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Example
from dpnlu.runs.train import Experiment, Trained, measure, new_classifier, train
from dpnlu.training.loop import Progress

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One column of a study: all its models, trained alike.

    Attributes:
        name: "eps-8" or "eps-inf".
        target_epsilon: what was asked for; None: ordinary training.
        plan: the target's; None: ordinary training.
        seed: of everything random, together with the number of the model.
    """

    name: str
    target_epsilon: float | None
    study: Study
    experiment: Experiment
    plan: PrivacyPlan | None
    test: tuple[Example, ...]
    seed: int

    def __call__(self, reference: int) -> Arrays:
        """Train reference model number `reference` and read it; for `attacks.farm.grow`."""
        trained = self.train(reference + 1)
        seconds = np.array(trained.result.seconds)
        return self.read(trained.classifier, reference + 1) | {"train_seconds": seconds}

    def train(
        self, model: int, *, ledger: Path | None = None, progress: Progress | None = None
    ) -> Trained:
        """Train one of the models; 0 is the target."""
        examples = self.study.examples(model)
        seed = int(np.random.SeedSequence([self.seed, model]).generate_state(1)[0])
        return train(
            new_classifier(self.experiment, seed=seed),
            examples,
            recipe=self.experiment.recipe,
            compute=self.experiment.compute,
            plan=self.plan_for(len(examples)),
            seed=seed,
            repeatable_noise=True,
            ledger=ledger,
            progress=progress,
        )

    def plan_for(self, num_examples: int) -> PrivacyPlan | None:
        """The same mechanism, hence the same ε, on a slightly different number of examples."""
        return None if self.plan is None else replace(self.plan, num_examples=num_examples)

    def read(self, classifier: Classifier, model: int) -> Arrays:
        """Signals on the audit examples, losses of all canaries, accuracy on test examples."""
        arrays: Arrays = dict(read_signals(classifier, self.study.audit).to_arrays())
        accuracy = measure(classifier, self.test).intent_accuracy
        if accuracy is not None:
            arrays["intent_accuracy"] = np.array(accuracy)
        for canary, secrets in zip(self.study.canaries, self.study.secrets, strict=True):
            name = canary.pattern.name
            arrays[f"{name}-losses"] = read_canary_losses(classifier, canary)
            arrays[f"{name}-secret"] = secrets[model]
        return arrays


def stacked(arrays: Sequence[Mapping[str, NDArray[Any]]], name: str) -> NDArray[Any]:
    """One array over all models."""
    return np.stack([model[name] for model in arrays])
