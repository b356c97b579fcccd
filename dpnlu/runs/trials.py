"""The best of several trainings, at a price that is accounted (Papernot and Steinke 2022).

trials.json       what was asked for, the settings that were drawn, and what came of them
trials/0, 1, …    the trainings, each in a directory of its own

How many there are is drawn where that costs less than to train a known number of times. Then the
number must stay unknown to whoever gets the model: what is kept here of the trainings is private,
and removed once the best of them is saved.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from dpnlu.mechanism.durable import make_directory, remove, remove_partials, sync, write_json
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.selection import Selection, cheapest, draw_trials
from dpnlu.nlu.fingerprint import Fingerprint
from dpnlu.nlu.metrics import Metrics
from dpnlu.runs.directory import claimed, recognised
from dpnlu.runs.model_card import model_card
from dpnlu.runs.model_directory import (
    LEDGER,
    SELECTION,
    TRIAL,
    TRIALS,
    SavedModel,
    is_model,
    load,
    save,
)
from dpnlu.runs.progress import OnProgress, silent
from dpnlu.runs.results import Results
from dpnlu.runs.resumable import (
    OTHER_CHOICES,
    DivergedError,
    Work,
    not_covered,
    prepared,
    train_model,
)
from dpnlu.runs.settings import TrainSettings, TuningSettings, as_begun
from dpnlu.runs.train import measure
from dpnlu.training.logical_batch import NonFiniteBatchError
from dpnlu.training.public import PublicGradientError

SEARCHED = (
    "learning_rate",
    "max_grad_norm",
    "dropout",
    "weight_decay",
    "characters",
    "slot_loss",
)
"""The settings that may differ: those on which no plan depends but by its clipping bound."""

# By which a training's own ε stays below what the whole allows: calibrating it anew rounds.
_ROUNDING = 1e-4


def train_best(
    settings: TuningSettings,
    directory: Path,
    *,
    resume: bool,
    on_progress: OnProgress = silent,
) -> Results:
    """Train as often as asked for, and keep the best model; or train once.

    Raises:
        ValueError: as `train_model`; or the trainings would differ in what their plan depends on,
            or there is no validation split.
        DivergedError: no training ended with finite weights.
    """
    trials = settings.trials
    if trials is None:
        if settings.search is not None:
            raise ValueError(
                "Expected --trials with --search, whose settings are drawn for each of several "
                "trainings, got --search alone: say how many there are on average."
            )
        one = settings.of_one_training
        return train_model(one, directory, resume=resume, on_progress=on_progress)
    settings = as_begun(settings, directory / TRIALS)
    space = searched(settings.search)
    work = prepared(settings.of_one_training)
    with claimed(directory):
        procedure = _begun(directory, resume=resume)
        if procedure is None:
            procedure = _drawn(settings, trials, space, work)
            _record(directory, procedure)
        else:
            _check_same(procedure, settings, directory, work)
        if not is_model(directory):
            procedure = _trained(procedure, settings, directory, work, on_progress)
            _keep_best(procedure, directory, work)
        results = Results.from_dict(load(directory).metrics)
        _tidy(directory)
    return results


def searched(space: str | None) -> dict[str, list[Any]]:
    """The settings that differ, and their values: "learning_rate=0.01,0.02:dropout=0,0.1".

    Raises:
        ValueError: it cannot be read, or names a setting on which the plan depends.
    """
    found: dict[str, list[Any]] = {}
    for part in [] if space is None else space.split(":"):
        name, _, values = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in SEARCHED:
            raise ValueError(
                f"Expected --search to name {', '.join(SEARCHED)}, on which the noise does not "
                f"depend, got {name!r}: choose all else beforehand."
            )
        if name in found:
            raise ValueError(f"Expected {name} in --search once, got it twice: join its values.")
        found[name] = [_value(name, text.strip()) for text in values.split(",")]
    return found


def _value(name: str, text: str) -> Any:
    hint = get_type_hints(TrainSettings)[name]
    (kind,) = (one for one in get_args(hint) or (hint,) if one is not type(None))
    try:
        if not text:
            raise ValueError(text)
        return kind(text)
    except ValueError:
        raise ValueError(
            f"Expected values of {name} in --search, {kind.__name__}s joined by commas, got "
            f"{text!r}."
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Procedure:
    """Several trainings, of which the best is kept.

    Attributes:
        settings: what was asked for, as JSON.
        epsilon: of one training by itself.
        selection: how often was trained.
        drawn: in what each training differs from the settings.
        scores: of those that have ended; None: its weights were not finite.
        fingerprint: of the data.
    """

    settings: dict[str, Any]
    fingerprint: Fingerprint
    epsilon: float
    selection: Selection
    drawn: Sequence[dict[str, Any]]
    scores: Sequence[float | None] = ()


def _begun(directory: Path, *, resume: bool) -> _Procedure | None:
    """What was interrupted in the directory; None: nothing.

    Raises:
        ValueError: it is not to be resumed, or something else is there.
    """
    content = recognised(directory, TRIALS)
    if content is None:
        return None
    if not resume:
        raise ValueError(
            f"Expected {directory} to be empty, found unfinished trainings: add --resume to "
            "resume them, or choose another folder."
        )
    try:
        return _Procedure(
            **content
            | {
                "selection": Selection(**content["selection"]),
                "fingerprint": Fingerprint(**content["fingerprint"]),
            }
        )
    except (KeyError, TypeError):
        raise ValueError(
            f"Expected {TRIALS} in {directory} as it was written, got something else: restore it, "
            "or choose another folder."
        ) from None


def _check_same(
    procedure: _Procedure, settings: TuningSettings, directory: Path, work: Work
) -> None:
    """Raise ValueError unless the trainings that were started are those that are asked for."""
    if procedure.settings != settings.to_dict():
        raise ValueError(
            f"Expected the settings with which the trainings in {directory} were started, got "
            f"others: repeat those of its {TRIALS}, or choose another folder."
        )
    if not work.matches(procedure.fingerprint):
        raise ValueError(
            f"Expected the data with which the trainings in {directory} were started, got other "
            "texts, labels or words, or another order: restore them, or choose another folder."
        )


def _record(directory: Path, procedure: _Procedure) -> None:
    write_json(directory / TRIALS, asdict(procedure))


def _drawn(
    settings: TuningSettings, trials: float, space: Mapping[str, Sequence[Any]], work: Work
) -> _Procedure:
    """Draw how often to train, and with which settings each time.

    Guarantee: settings are drawn independently of the data and, where the number of trainings is
    random, of each other, from the same distribution, as the theorem requires.
    """
    if work.plan is None:
        raise ValueError(
            "Expected a finite --epsilon with --trials, whose price is counted in it, got inf: "
            "train with each setting by itself."
        )
    if not work.corpus.split("valid"):
        raise ValueError(
            f"Expected a validation split to tell the best of several trainings, got none in "
            f"{work.corpus.name}: set some examples apart, which ε then does not cover."
        )
    combinations = [
        dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())
    ]
    for one in combinations:  # each is refused now, and not after hours
        prepared(replace(settings.of_one_training, **one))
    selection, plan = cheapest(work.plan, trials, settings.epsilon)
    rng = np.random.default_rng()
    count = draw_trials(selection.number, trials, rng)
    numbers = _numbers(selection, count, len(combinations), rng)
    return _Procedure(
        settings=settings.to_dict(),
        fingerprint=work.fingerprint(),
        epsilon=plan.epsilon() * (1 - _ROUNDING),
        selection=selection,
        drawn=[combinations[number] for number in numbers],
    )


def _numbers(
    selection: Selection, count: int, combinations: int, rng: np.random.Generator
) -> list[int]:
    """Which combination of settings each training has."""
    if selection.number != "fixed":
        return list(rng.integers(combinations, size=count))
    # Every combination as often as any other.
    order = [rng.permutation(combinations) for _ in range(-(-count // combinations))]
    return list(np.concatenate(order)[:count])


def _trained(
    procedure: _Procedure,
    settings: TuningSettings,
    directory: Path,
    work: Work,
    on_progress: OnProgress,
) -> _Procedure:
    """Do the trainings that are left, and score each."""
    for number in range(len(procedure.scores), len(procedure.drawn)):
        place = directory / TRIAL / str(number)
        one = replace(
            settings.of_one_training, epsilon=procedure.epsilon, **procedure.drawn[number]
        )
        make_directory(place)
        name = f"training {number + 1} of {len(procedure.drawn)}"
        score: float | None = None
        with suppress(DivergedError, NonFiniteBatchError, PublicGradientError):
            if not is_model(place):
                train_model(one, place, resume=True, on_progress=_called(name, on_progress))
            score = _score(measure(load(place).classifier, work.corpus.split("valid")))
        procedure = replace(procedure, scores=[*procedure.scores, score])
        _record(directory, procedure)
    return procedure


def _called(name: str, on_progress: OnProgress) -> OnProgress:
    """The same for whatever a training calls itself."""
    return lambda _, done, total: on_progress(name, done, total)


def _score(metrics: Metrics) -> float:
    """The mean of intent accuracy and slot F1, as far as there are any."""
    known = [one for one in (metrics.intent_accuracy, metrics.slot_f1) if one is not None]
    return sum(known) / len(known) if known else metrics.frame_accuracy


def _keep_best(procedure: _Procedure, directory: Path, work: Work) -> None:
    """Save the model with the highest score, with the ε of the whole."""
    finished = [number for number, score in enumerate(procedure.scores) if score is not None]
    if not finished:
        raise DivergedError(
            "Expected a training that ends with finite weights, got none: all have diverged, and "
            "no model is saved; search among lower learning rates, in another folder."
        )
    best = max(finished, key=lambda number: procedure.scores[number] or 0.0)
    place = directory / TRIAL / str(best)
    saved, selection = load(place), procedure.selection
    assert saved.plan is not None
    whole = selection.epsilon(saved.plan.events(), delta=saved.plan.target_delta)
    metrics = saved.metrics | {"epsilon": whole}
    chosen = [
        f"The validation split, by which the model was chosen ({_described(procedure, best)}).",
        OTHER_CHOICES.replace("Any choice", "Any other choice"),
    ]
    covered = [item for item in not_covered(work) if item != OTHER_CHOICES]
    shutil.copyfile(place / LEDGER, directory / LEDGER)
    sync(directory / LEDGER)
    write_json(directory / SELECTION, asdict(selection) | {"search": procedure.settings["search"]})
    save(
        saved.classifier,
        directory,
        recipe=saved.recipe,
        plan=saved.plan,
        metrics=metrics,
        card=_card(saved, place, selection, [*covered, *chosen], metrics),
    )


def _card(
    saved: SavedModel,
    place: Path,
    selection: Selection,
    not_covered: Sequence[str],
    metrics: Mapping[str, Any],
) -> str:
    return model_card(
        architecture=saved.classifier.architecture,
        plan=saved.plan,
        ledger=Ledger.read(place / LEDGER),
        not_covered=not_covered,
        metrics=metrics,
        selection=selection,
    )


def _described(procedure: _Procedure, best: int) -> str:
    drawn = procedure.drawn[best]
    return ", ".join(f"{name} = {value}" for name, value in drawn.items()) or "all settings alike"


def _tidy(directory: Path) -> None:
    """Remove the trainings, and at last the record by which this can be resumed."""
    remove_partials(directory)
    shutil.rmtree(directory / TRIAL, ignore_errors=True)
    remove(directory / TRIALS)
