"""One budget of a study: all its models, trained alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attacks.farm import Arrays
from dpnlu.compare.answering import Retraining, read_answers
from dpnlu.compare.extracting import extract_canaries
from dpnlu.compare.reading import Reading, read_canary, read_signals
from dpnlu.compare.study import Study
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.selection import Selection
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Example
from dpnlu.nlu.metrics import score
from dpnlu.runs.experiment import Experiment, size_in_units
from dpnlu.runs.train import Trained, new_classifier, train
from dpnlu.training.loop import Progress


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One column of a study.

    Attributes:
        name: "eps-8" or "eps-inf".
        target_epsilon: what was asked for; None: ordinary training.
        plan: the target's; None: ordinary training.
        validation: what early stopping looks at; no canary is among them.
        seed: of everything random, together with the number of the model.
        searches: how secrets of canaries are searched for; empty: they are not.
        decimals: to which the attacks see probabilities; None: all.
        selection: of which trainings the target is the best; None: there was one.
    """

    name: str
    target_epsilon: float | None
    study: Study
    experiment: Experiment
    plan: PrivacyPlan | None
    test: tuple[Example, ...]
    seed: int
    searches: tuple[str, ...] = ()
    decimals: int | None = None
    validation: tuple[Example, ...] = ()
    selection: Selection | None = None

    def __call__(self, reference: int) -> Arrays:
        """Train reference model number `reference` and read it; for `attacks.farm.grow`."""
        trained = self.train(reference + 1)
        reading = self.read(trained.classifier, reference + 1)
        return replace(reading, train_seconds=trained.result.seconds).to_arrays()

    def retrain(self, number: int) -> Arrays:
        """Train on the target's examples, its secrets included, from another seed; for
        `attacks.farm.grow`.

        Only answers to the test texts are kept: whatever else two such models say differently is
        not asked for.
        """
        trained = self._trained(self.study.examples(0), seed=self._seed_of(0, number + 1))
        answers = read_answers(trained.classifier, self.test)
        return Retraining(answers=answers, train_seconds=trained.result.seconds).to_arrays()

    def train(
        self, model: int, *, ledger: Path | None = None, on_progress: Progress | None = None
    ) -> Trained:
        """Train one of the models; 0 is the target."""
        return self._trained(
            self.study.examples(model),
            seed=self._seed_of(model),
            ledger=ledger,
            on_progress=on_progress,
        )

    def _trained(
        self,
        examples: Sequence[Example],
        *,
        seed: int,
        ledger: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Trained:
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
            validation=self.validation,
        )

    def _token_losses(self, classifier: Classifier) -> NDArray[np.float64] | None:
        canaries = self.study.token_canaries
        if not canaries:
            return None
        return read_signals(classifier, canaries, decimals=self.decimals).loss

    def _seed_of(self, *model: int) -> int:
        return int(np.random.SeedSequence([self.seed, *model]).generate_state(1)[0])

    def plan_for(self, examples: Sequence[Example]) -> PrivacyPlan | None:
        """The same mechanism, hence the same ε, on a slightly different number of examples or
        users."""
        if self.plan is None:
            return None
        return replace(self.plan, num_examples=size_in_units(examples, self.plan.unit))

    def read(self, classifier: Classifier, model: int) -> Reading:
        """Signals on the audit examples, losses of all canaries, answers to the test texts."""
        canaries = self.study.canaries
        answers = read_answers(classifier, self.test)
        extracted = extract_canaries(
            classifier,
            canaries,
            self.searches,
            initial=lambda: new_classifier(self.experiment, seed=self._seed_of(model)),
            decimals=self.decimals,
            seed=self.seed,
        )
        return Reading(
            signals=read_signals(classifier, self.study.audit, decimals=self.decimals),
            intent_accuracy=score(answers, self.test, classifier.encoding.labels).intent_accuracy,
            answers=answers,
            token_losses=self._token_losses(classifier),
            canaries={
                canary.pattern.name: read_canary(
                    classifier,
                    canary,
                    secrets[model],
                    extracted=extracted.get(canary.pattern.name, {}),
                    decimals=self.decimals,
                )
                for canary, secrets in zip(canaries, self.study.secrets, strict=True)
            },
        )
