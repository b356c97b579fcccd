"""From settings to what is trained, how, and under which plan; of one model or a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Architecture
from dpnlu.nlu.data import Corpus, Vocabulary
from dpnlu.nlu.encoding import Labels
from dpnlu.runs import recipes
from dpnlu.runs.settings import RecipeSettings
from dpnlu.training.loop import ComputeConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is trained and how, apart from the examples and privacy.

    Attributes:
        labels: the label sets; released with the model.
        vocabulary: of word models; released with the model.
    """

    architecture: Architecture
    recipe: Recipe
    labels: Labels
    vocabulary: Vocabulary
    compute: ComputeConfig

    def check_validation(self, corpus: Corpus) -> None:
        """Raise ValueError if early stopping has no validation examples to look at."""
        if self.recipe.patience is not None and not corpus.split("valid"):
            raise ValueError(
                f"Expected a validation split for --patience {self.recipe.patience}, got none in "
                f"{corpus.name}: leave --patience out, or set some examples apart."
            )


def experiment_for(
    settings: RecipeSettings,
    *,
    epsilon: float,
    labels: Labels,
    vocabulary: Vocabulary,
    learning_rate: float | None = None,
    engine: str | None = None,
) -> Experiment:
    """The experiment at one budget, with what is recommended for it where nothing was asked for.

    Args:
        epsilon: infinity: ordinary training.
        learning_rate: None: as recommended.
        engine: None: what suits the plan.

    Raises:
        ValueError: a setting is out of range; see `recipes` and `ComputeConfig`.
    """
    private = epsilon != math.inf
    recipe = recipes.recipe(
        settings.model,
        private=private,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
        patience=settings.patience,
    )
    if learning_rate is not None:
        recipe = replace(recipe, learning_rate=learning_rate)
    return Experiment(
        architecture=recipes.architecture(
            settings.model,
            private=private,
            dropout=settings.dropout,
            characters=settings.characters,
            redact_digits=settings.redact_digits,
        ),
        recipe=recipe,
        labels=labels,
        vocabulary=vocabulary,
        compute=ComputeConfig(
            engine=engine,
            physical_batch_size=settings.physical_batch_size,
            device=settings.device,
        ),
    )


def plan_for(
    settings: RecipeSettings, recipe: Recipe, *, epsilon: float, num_examples: int
) -> PrivacyPlan | None:
    """The plan with the least noise that meets the budget; None: ordinary training.

    A recommended batch size that exceeds the data is lowered to them; one that was asked for is
    refused.

    Raises:
        ValueError: a setting is out of range; see `PrivacyPlan.calibrate`.
    """
    if epsilon == math.inf:
        return None
    recommended = min(recipe.batch_size, num_examples)
    return PrivacyPlan.calibrate(
        target_epsilon=epsilon,
        target_delta=settings.delta,
        num_examples=num_examples,
        expected_batch_size=recommended if settings.batch_size is None else settings.batch_size,
        epochs=recipe.epochs,
        max_grad_norm=settings.max_grad_norm,
    )
