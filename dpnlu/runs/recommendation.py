"""What `dpnlu train` would do with a corpus, said before anything is trained.

Of the corpus it takes how many training texts, or users, there are and how many labels; it looks at
no text. What it says of accuracy was measured on public corpora.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import LSTM
from dpnlu.nlu.data import HashedVocabulary, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.runs.experiment import experiment_for, plan_for, size_in_units
from dpnlu.runs.settings import RecommendationSettings
from dpnlu.training.loop import Recipe


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What recommended training came to on the test split of a public corpus.

    Attributes:
        is_lstm: whether by the BiLSTM; else by heads on a frozen MiniLM.
        texts: of the training split.
        intent_accuracy, slot_f1: means over the seeds; None: the corpus has none.
        page: the file in benchmarks/results that they come from.
    """

    corpus: str
    is_lstm: bool
    texts: int
    intents: int
    slots: int
    epsilon: float
    intent_accuracy: float
    slot_f1: float | None
    page: str


def _measured(
    corpus: str,
    is_lstm: bool,
    sizes: tuple[int, int, int],
    found: dict[float, tuple[float, float]],
    day: str,
) -> list[Measured]:
    texts, intents, slots = sizes
    return [
        Measured(
            corpus=corpus,
            is_lstm=is_lstm,
            texts=texts,
            intents=intents,
            slots=slots,
            epsilon=epsilon,
            intent_accuracy=intent,
            slot_f1=f1,
            page=f"{day}-recipes-{corpus.lower()}-{'lstm' if is_lstm else 'encoder'}",
        )
        for epsilon, (intent, f1) in found.items()
    ]


_SNIPS, _HWU64 = (13_084, 7, 39), (8943, 64, 54)
MEASURED = (
    *_measured("SNIPS", True, _SNIPS, {8.0: (0.955, 0.815), 2.0: (0.935, 0.712)}, "2026-11-27"),
    *_measured("SNIPS", False, _SNIPS, {8.0: (0.967, 0.906), 2.0: (0.963, 0.850)}, "2026-11-28"),
    *_measured("HWU64", False, _HWU64, {8.0: (0.898, 0.701), 2.0: (0.839, 0.527)}, "2026-11-28"),
)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A recipe for a corpus, and the plan that meets the budget.

    Attributes:
        units: of the training split: examples, or users.
        plan: None: ordinary training.
    """

    settings: RecommendationSettings
    units: int
    intents: int
    slots: int
    recipe: Recipe
    plan: PrivacyPlan | None

    def lines(self) -> list[str]:
        """For a terminal."""
        recipe = self.recipe
        ordinary = max(1, round(recipe.epochs * self.units / recipe.batch_size))
        steps = ordinary if self.plan is None else self.plan.steps
        lines = [
            f"data           {self.units} training {self.settings.unit}s, {self.intents} intents, "
            f"{self.slots} slot types",
            f"model          {self.settings.model}",
            f"batches        {steps} of {self._batch}{' on average' if self.plan else ''}: "
            f"{recipe.epochs:.4g} epochs",
            f"learning rate  {recipe.learning_rate:g}, falling to 0",
        ]
        if self.plan is not None:
            lines += self._mechanism(self.plan)
        return [*lines, "", *self._expected()]

    @property
    def _batch(self) -> int:
        if self.plan is None:
            return self.recipe.batch_size
        return round(self.plan.sample_rate * self.units)

    def _mechanism(self, plan: PrivacyPlan) -> list[str]:
        return [
            f"clipping       {plan.clipping}, bound {plan.max_grad_norm:g}",
            f"noise          {plan.noise_multiplier:.4g} times the sensitivity",
            f"budget         ε = {plan.epsilon():.4g} at δ = {plan.target_delta:g}, for one "
            f"{plan.unit}",
        ]

    def _expected(self) -> list[str]:
        is_lstm = self.settings.model == LSTM
        like = [one for one in MEASURED if one.is_lstm == is_lstm]
        if self.plan is None or not like:
            return ["No accuracy is expected: ordinary training was not measured for it."]
        nearest = min(
            (one.epsilon for one in like),
            key=lambda epsilon: abs(math.log(epsilon / self.settings.epsilon)),
        )
        return [
            f"Measured so at ε = {nearest:g}{'' if is_lstm else ', on MiniLM'}; fewer texts for "
            "each label, or a smaller ε, mean less:",
            *(_line(one) for one in like if one.epsilon == nearest),
        ]


def _line(one: Measured) -> str:
    slots = "" if one.slot_f1 is None else f", slot F1 {one.slot_f1:.3f}"
    return (
        f"  {one.corpus}, {one.texts} texts, {one.intents} intents, {one.slots} slot types: "
        f"intent accuracy {one.intent_accuracy:.3f}{slots}"
    )


def recommend(settings: RecommendationSettings) -> Recommendation:
    """What is recommended for a corpus.

    Raises:
        ValueError: the corpus cannot be read, or a setting is out of range.
    """
    corpus = load_corpus(settings.data, seed=settings.seed)
    units = size_in_units(corpus.split("train"), settings.unit)
    experiment = experiment_for(
        settings,
        epsilon=settings.epsilon,
        labels=Labels(corpus.intents, corpus.tags),
        vocabulary=HashedVocabulary(),
        units=units,
    )
    return Recommendation(
        settings=settings,
        units=units,
        intents=len(corpus.intents),
        slots=sum(tag.startswith("B-") for tag in corpus.tags),
        recipe=experiment.recipe,
        plan=plan_for(settings, experiment.recipe, epsilon=settings.epsilon, num_examples=units),
    )
