"""From settings to what is trained, how, and under which plan; of one model or a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpnlu.mechanism.plan import UNITS, PrivacyPlan
from dpnlu.mechanism.ranges import check_choice, check_count
from dpnlu.mechanism.users import Users
from dpnlu.nlu.classifier import Architecture
from dpnlu.nlu.data import Corpus, DataError, Example, Vocabulary
from dpnlu.nlu.encoding import Labels
from dpnlu.runs import recipes
from dpnlu.runs.settings import (
    PHYSICAL_BATCH_SIZE,
    PHYSICAL_BATCH_SIZE_OF_HEADS,
    DataSettings,
    RecipeSettings,
    check_clipping,
)
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
    units: int | None = None,
    learning_rate: float | None = None,
    engine: str | None = None,
) -> Experiment:
    """The experiment at one budget, with what is recommended for it where nothing was asked for.

    Args:
        epsilon: infinity: ordinary training.
        units: of the training set; see `size_in_units`. None: the recipe is that for many.
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
        units=units,
        weight_decay=settings.weight_decay,
        patience=settings.patience,
        edition=settings.recipes,
    )
    if learning_rate is not None:
        recipe = replace(recipe, learning_rate=learning_rate)
    architecture = recipes.architecture(
        settings.model,
        private=private,
        dropout=settings.dropout,
        characters=settings.characters,
        redact_digits=settings.redact_digits,
        slot_loss=settings.slot_loss,
        edition=settings.recipes,
    )
    return Experiment(
        architecture=architecture,
        recipe=recipe,
        labels=labels,
        vocabulary=vocabulary,
        compute=compute_for(settings, architecture, engine=engine),
    )


def compute_for(
    settings: DataSettings, architecture: Architecture, *, engine: str | None = None
) -> ComputeConfig:
    """How to compute a training.

    Args:
        engine: None: what suits the plan.

    Raises:
        ValueError: a setting is out of range; see `ComputeConfig`.
    """
    at_once = settings.number_at_once
    if at_once is None:
        heads = architecture.freeze_encoder
        at_once = PHYSICAL_BATCH_SIZE_OF_HEADS if heads else PHYSICAL_BATCH_SIZE
    return ComputeConfig(engine=engine, physical_batch_size=at_once, device=settings.device)


def plan_for(
    settings: RecipeSettings, recipe: Recipe, *, epsilon: float, num_examples: int
) -> PrivacyPlan | None:
    """The plan with the least noise that meets the budget; None: ordinary training.

    A recommended batch size that exceeds the data is lowered to them; one that was asked for is
    refused.

    Args:
        epsilon: infinity: ordinary training.
        num_examples: of the training set, in the unit of the settings; see `size_in_units`.

    Raises:
        ValueError: a setting is out of range; see `PrivacyPlan.calibrate`.
    """
    if settings.examples_per_user is not None:
        check_count("examples_per_user", settings.examples_per_user)
        if settings.unit == "example":
            raise ValueError(
                "Expected --examples-per-user with --unit user, got it where examples are "
                "protected: leave it out, or protect users."
            )
    check_clipping(settings.clipping)
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
        clipping=settings.clipping,
        noise_schedule=settings.noise_schedule,
        unit=settings.unit,
        examples_per_user=settings.most_per_user,
    )


def users_of(examples: Sequence[Example]) -> Users:
    """Whose the examples are.

    Raises:
        DataError: an example has no user.
    """
    for example in examples:
        if example.user is None or not example.user.strip():
            raise DataError(
                f"Example {example.id}: expected a user, whom --unit user protects, got none; name "
                "one on every row of train, in its field `user`, or protect examples."
            )
    return Users.of(example.user for example in examples)


def size_in_units(examples: Sequence[Example], unit: str) -> int:
    """How many examples, or users, there are.

    Raises:
        DataError: an example has no user.
        ValueError: there is no such unit.
    """
    check_choice("unit", unit, UNITS)
    return len(users_of(examples)) if unit == "user" else len(examples)
