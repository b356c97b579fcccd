"""A study before anything is trained or written: data, membership, budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from attacks.patterns import parse_canaries
from dpnlu.compare.budget import Budget
from dpnlu.compare.extracting import check_searchable
from dpnlu.compare.selection import UNTARGETED, needs_references
from dpnlu.compare.settings import (
    AttackSettings,
    MeasurementSettings,
    StudySettings,
    budget_name,
)
from dpnlu.compare.study import Study
from dpnlu.compare.token_canaries import draw_token_canaries
from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.users import Users
from dpnlu.nlu.data import (
    Corpus,
    Example,
    HashedVocabulary,
    RepeatReport,
    drop_repeated,
    load_corpus,
)
from dpnlu.nlu.encoding import WordEncoding
from dpnlu.runs import recipes
from dpnlu.runs.experiment import (
    Experiment,
    compute_for,
    experiment_for,
    plan_for,
    size_in_units,
    users_of,
)
from dpnlu.runs.model_directory import SavedModel
from dpnlu.runs.results import Results
from dpnlu.runs.settings import FIRST_RECIPES
from dpnlu.runs.train import new_classifier

# Of word models; made without data.
_VOCABULARY = HashedVocabulary()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A study before anything is trained.

    Attributes:
        corpus: without repeated texts.
        budgets: in the order asked for.
    """

    settings: StudySettings
    corpus: Corpus
    repeats: RepeatReport
    study: Study
    budgets: tuple[Budget, ...]


def prepare_study(settings: StudySettings) -> Prepared:
    """Load the data, draw who is a member of what, and calibrate the plans.

    Raises:
        ValueError: invalid data, label set, budget, batch size or encoder, or too few examples.
    """
    # A model that there is not is refused before data are loaded.
    recipes.architecture(
        settings.model,
        private=False,
        dropout=settings.dropout,
        characters=settings.characters,
        redact_digits=settings.redact_digits,
        slot_loss=settings.slot_loss,
        edition=settings.recipes,
    )
    corpus, repeats = drop_repeated(load_corpus(settings.data, seed=settings.seed))
    study = Study.draw(
        corpus,
        audit_examples=settings.audit_examples,
        references=settings.references,
        canaries=[c for spec in settings.canaries for c in parse_canaries(spec)],
        rng=_membership_rng(settings.seed),
        by_user=settings.unit == "user",
    )
    if settings.audit_canaries:
        study = _with_token_canaries(settings, corpus, study)
    budgets = tuple(_budget(settings, corpus, study, epsilon) for epsilon in settings.epsilons)
    study.check_sides(for_references=needs_references(settings.chosen_attacks))
    budgets[0].experiment.check_validation(corpus)
    # What is frozen in one budget cannot be searched so in it: that one is asked, if there is one.
    strictest = max(budgets, key=lambda budget: budget.experiment.architecture.freeze_encoder)
    untrained = new_classifier(strictest.experiment, seed=settings.seed)
    check_searchable(untrained, study.canaries, budgets[0].searches, decimals=settings.decimals)
    return Prepared(settings=settings, corpus=corpus, repeats=repeats, study=study, budgets=budgets)


def _with_token_canaries(settings: StudySettings, corpus: Corpus, study: Study) -> Study:
    rng = np.random.default_rng([settings.seed, 4])
    experiments = [
        experiment_for(settings, epsilon=e, labels=study.labels(corpus), vocabulary=_VOCABULARY)
        for e in settings.epsilons
    ]
    # Frozen in one budget is useless in it, so that one is asked where there is one.
    asked = max(experiments, key=lambda experiment: experiment.architecture.freeze_encoder)
    canaries = draw_token_canaries(
        new_classifier(asked, seed=settings.seed),
        corpus,
        number=settings.audit_canaries,
        rng=rng,
    )
    return study.with_token_canaries(canaries, rng=rng)


def _budget(settings: StudySettings, corpus: Corpus, study: Study, epsilon: float) -> Budget:
    units = size_in_units(study.examples(0), settings.unit)
    experiment = experiment_for(
        settings, epsilon=epsilon, labels=study.labels(corpus), vocabulary=_VOCABULARY, units=units
    )
    return Budget(
        name=budget_name(epsilon),
        target_epsilon=epsilon if math.isfinite(epsilon) else None,
        study=study,
        experiment=experiment,
        plan=plan_for(settings, experiment.recipe, epsilon=epsilon, num_examples=units),
        test=corpus.split("test"),
        seed=settings.seed,
        searches=settings.chosen_searches if "extraction" in settings.chosen_attacks else (),
        decimals=settings.decimals,
        validation=corpus.split("valid") if experiment.recipe.patience is not None else (),
    )


def prepare_attack(saved: SavedModel, settings: AttackSettings, *, name: str) -> Prepared:
    """A study whose target is trained already.

    Members are the training split of the data, non-members its other splits. Reference models are
    trained like the target, each on a random half of these examples. As membership was not drawn,
    members and non-members may differ in more than membership: the blind baseline measures that,
    and what it finds the attacks find too.

    Args:
        name: of the target, in the report and in file names.

    Raises:
        ValueError: invalid data, or too few examples.
    """
    spent = Results.from_dict(saved.metrics).epsilon
    asked = {field.name: getattr(settings, field.name) for field in fields(MeasurementSettings)}
    asked["attacks"] = tuple(name for name in settings.chosen_attacks if name != UNTARGETED)
    settings_of_study = StudySettings(
        **asked,
        model=saved.classifier.architecture.name,
        recipes=FIRST_RECIPES,  # none is taken: how it was trained is saved with the model
        epsilons=(math.inf if spent is None else spent,),
        delta=saved.plan.target_delta if saved.plan else StudySettings.delta,
        unit=saved.plan.unit if saved.plan else StudySettings.unit,
        examples_per_user=saved.plan.examples_per_user if saved.plan else None,
        retrainings=0,
    )
    corpus, repeats = drop_repeated(load_corpus(settings_of_study.data, seed=settings.seed))
    study = _study_of_splits(corpus, settings, by_user=settings_of_study.unit == "user")
    study.check_sides(for_references=needs_references(settings.chosen_attacks))
    budget = Budget(
        name=name,
        target_epsilon=spent,
        study=study,
        experiment=_experiment_of(saved, settings),
        plan=saved.plan,
        selection=saved.selection,
        test=corpus.split("test"),
        seed=settings.seed,
        decimals=settings.decimals,
        validation=corpus.split("valid") if saved.recipe.patience is not None else (),
    )
    budget.experiment.check_validation(corpus)
    if settings.references > 0:
        _check_trainable_alike(saved)
        new_classifier(budget.experiment, seed=settings.seed)
    return Prepared(
        settings=settings_of_study, corpus=corpus, repeats=repeats, study=study, budgets=(budget,)
    )


def _check_trainable_alike(saved: SavedModel) -> None:
    """Raise ValueError if references cannot be trained by the plan of the model."""
    plan = saved.plan
    if plan is not None and clipping_rule(plan.clipping).public_quantile is not None:
        raise ValueError(
            "Expected a model that is trained without public examples for attacks with references, "
            f"got one clipped by {plan.clipping}: set --references 0."
        )


def _study_of_splits(corpus: Corpus, settings: AttackSettings, *, by_user: bool) -> Study:
    """As many members as non-members, at most as asked for; references on random halves.

    Raises:
        ValueError: users are judged, and an example has none.
    """
    rng = _membership_rng(settings.seed)
    members = _in_units(corpus.split("train"), by_user=by_user)
    trained = {example.user for unit in members for example in unit} if by_user else ()
    held_out = [*corpus.split("test"), *corpus.split("valid")]
    others = _in_units([e for e in held_out if e.user not in trained], by_user=by_user)
    size = min(settings.audit_examples // 2, len(others), len(members))
    chosen = [
        *(members[i] for i in rng.permutation(len(members))[:size]),
        *(others[i] for i in rng.permutation(len(others))[:size]),
    ]
    halves = rng.random((settings.references, 2 * size)) < 0.5
    truth = np.arange(2 * size) < size
    owners = np.repeat(np.arange(2 * size), [len(unit) for unit in chosen])
    return Study(
        base=(),
        audit=tuple(example for unit in chosen for example in unit),
        membership=np.concatenate([truth[None], halves])[:, owners],
        users=Users(owners) if by_user and chosen else None,
    )


def _in_units(examples: Sequence[Example], *, by_user: bool) -> list[tuple[Example, ...]]:
    """The examples one by one, or user by user."""
    if not by_user or not examples:
        return [(example,) for example in examples]
    found: dict[int, list[Example]] = {}
    for owner, example in zip(users_of(examples).owners.tolist(), examples, strict=True):
        found.setdefault(owner, []).append(example)
    return [tuple(unit) for unit in found.values()]


def _experiment_of(saved: SavedModel, settings: AttackSettings) -> Experiment:
    encoding = saved.classifier.encoding
    words = encoding.vocabulary if isinstance(encoding, WordEncoding) else HashedVocabulary()
    return Experiment(
        architecture=saved.classifier.architecture,
        recipe=saved.recipe,
        labels=encoding.labels,
        vocabulary=words,
        compute=compute_for(settings, saved.classifier.architecture),
    )


def _membership_rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, 1])
