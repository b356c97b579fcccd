"""What privacy changed in the answers to the test texts, as entries of the report.

Every model is asked the same texts, so what changed is counted text by text: by class, by how sure
the model is, by which texts went from right to wrong, and by how far groups of people lie apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnlu.compare.breakdown import Breakdown, by_frequency
from dpnlu.compare.calibration import calibration
from dpnlu.compare.flips import flips
from dpnlu.compare.group_gap import group_gap
from dpnlu.compare.preparation import Prepared
from dpnlu.compare.training import TrainedBudget
from dpnlu.nlu.data import Example
from dpnlu.nlu.data.iob import iob2, spans
from dpnlu.nlu.data.vocabulary import normalized_token
from dpnlu.nlu.encoding import Labels
from dpnlu.nlu.metrics import Answers, right_intents


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What one model gets right of N test texts with S slots together.

    Attributes:
        texts: (N,) the intent; without intents, every tag.
        spans: (S,) whether the slot was found, its span and its label; None without slots.
        said: N answers, equal where two models say the same: what `texts` is about.
        confidence: (N,) of the intent; None without intents.
    """

    texts: NDArray[np.bool_]
    spans: NDArray[np.bool_] | None
    said: Sequence[Any]
    confidence: NDArray[np.float64] | None

    def about(self, breakdown: str) -> NDArray[np.bool_] | None:
        """What is right of that which a breakdown divides into classes."""
        return self.spans if breakdown == "slots" else self.texts

    @classmethod
    def of(cls, answers: Answers, test: Sequence[Example], labels: Labels) -> Verdicts:
        """Compare answers with the labels of the test texts."""
        has_slots = answers.tags is not None and test[0].tags is not None
        tags = answers.tags_of(test, labels) if has_slots else []
        found = [right for pair in zip(test, tags, strict=False) for right in _found(*pair)]
        if answers.intents is None:
            gold = [list(example.tags or ()) for example in test]
            texts = np.array([a == b for a, b in zip(tags, gold, strict=True)])
        else:
            texts = right_intents(answers.intents, test, labels)
        return cls(
            texts=texts,
            spans=np.array(found) if found else None,
            said=tags if answers.intents is None else answers.intents.tolist(),
            confidence=answers.confidence,
        )


def _found(example: Example, tags: Sequence[str]) -> list[bool]:
    """Whether each slot of the example is among those that the tags mark."""
    marked = spans(iob2(tags))
    return [span in marked for span in spans(example.tags or ())]


def changes(prepared: Prepared, trained: Sequence[TrainedBudget]) -> list[dict[str, Any]]:
    """The entries of every run: breakdown, gap between groups, calibration, flips and retrainings,
    as far as they were measured.

    Private runs are compared with the ordinary one, where there is one; retrainings with the target
    that they repeat.
    """
    settings = prepared.settings
    ordinary = next((run for run in trained if run.budget.plan is None), None)
    before = None if ordinary is None else _verdicts(ordinary, ordinary.target.answers)
    labels = trained[0].budget.experiment.labels
    breakdowns = breakdowns_of(trained[0].budget.test, prepared.study.examples(0), labels)
    entries = []
    for run in trained:
        own, is_private = _verdicts(run, run.target.answers), run.budget.plan is not None
        entry = entry_of(
            own,
            before if is_private else None,
            breakdowns,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        if is_private and ordinary is not None and before is not None:
            entry["flips"] = {"against": ordinary.budget.name} | _flips(prepared, before, own)
        if run.retrainings:
            entry["retrainings"] = [
                {"against": run.budget.name, "train_seconds": again.train_seconds}
                | _flips(prepared, own, _verdicts(run, again.answers))
                for again in run.retrainings
            ]
        entries.append(entry)
    return entries


def _verdicts(run: TrainedBudget, answers: Answers | None) -> Verdicts:
    assert answers is not None  # a target that was read without is asked again
    return Verdicts.of(answers, run.budget.test, run.budget.experiment.labels)


def breakdowns_of(
    test: Sequence[Example], training: Sequence[Example], labels: Labels
) -> dict[str, Breakdown]:
    """What the test asks by intent, by slot, by group and by rare words, next to how often training
    had it.

    Args:
        training: what the target was trained on.
        labels: what the models tell apart: data may have an intent that none of them learns.
    """
    found = {}
    intents = [example.intent for example in test if example.intent is not None]
    if intents and labels.intents:
        found["intents"] = _by_name(intents, Counter(example.intent for example in training))
    slots = [span.slot for example in test for span in spans(example.tags or ())]
    if slots:
        taught = (span.slot for example in training for span in spans(example.tags or ()))
        found["slots"] = _by_name(slots, Counter(taught))
    groups = [example.group for example in test]
    if any(group is not None for group in groups):
        found["groups"] = _by_name(groups, Counter(example.group for example in training))
    seen = Counter(word for example in training for word in _words(example))
    found["rarest_word"] = by_frequency([min(seen[w] for w in _words(e)) for e in test])
    return found


def _words(example: Example) -> set[str]:
    return {normalized_token(token) for token in example.tokens}


def _by_name(asked: Sequence[str | None], taught: Counter[Any]) -> Breakdown:
    """What is asked by its name; what has none is in no class."""
    names = sorted({name for name in asked if name is not None})
    places: dict[str | None, int] = {name: place for place, name in enumerate(names)}
    return Breakdown(
        names=tuple(names),
        training=tuple(taught[name] for name in names),
        classes=np.array([places.get(name, -1) for name in asked]),
    )


def entry_of(
    own: Verdicts,
    ordinary: Verdicts | None,
    breakdowns: Mapping[str, Breakdown],
    *,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Breakdown, gap between groups and calibration of one run; a model that has diverged has no
    calibration.

    Args:
        ordinary: of the run to compare with; None: there is none.
        confidence: of the intervals, in (0, 1).
        seed: of the bootstrap.
    """
    rows = {}
    for name, breakdown in breakdowns.items():
        right = own.about(name)
        if right is not None:
            before = None if ordinary is None else ordinary.about(name)
            rows[name] = breakdown.shares(right, ordinary=before, confidence=confidence)
            if name != "rarest_word":  # whose ranges have an order of their own
                rows[name].sort(key=lambda row: row.get("change", row["right"]))
    entry: dict[str, Any] = {"breakdown": rows}
    if "groups" in breakdowns:
        gap = group_gap(
            breakdowns["groups"],
            own.texts,
            ordinary=None if ordinary is None else ordinary.texts,
            confidence=confidence,
            rng=np.random.default_rng([seed, 6]),
        )
        entry |= {} if gap is None else {"group_gap": gap.to_dict()}
    if own.confidence is not None and np.isfinite(own.confidence).all():
        rng = np.random.default_rng([seed, 5])
        found = calibration(own.confidence, own.texts, confidence=confidence, rng=rng)
        entry["calibration"] = asdict(found)
    return entry


def _flips(prepared: Prepared, first: Verdicts, second: Verdicts) -> dict[str, Any]:
    differ = np.array([a != b for a, b in zip(first.said, second.said, strict=True)])
    found = flips((first.texts, second.texts), differ, confidence=prepared.settings.confidence)
    return asdict(found)
