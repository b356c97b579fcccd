"""Secrets recovered from classifiers by inversion: of a study's canaries, or after any prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attacks.dropout import has_dropout
from attacks.inversion import Cloze, DivergedError, Extraction, Objective, extract
from attacks.patterns import CanarySpec, canary_tags
from dpnlu.compare.inverting import invertible
from dpnlu.nlu.classifier import Classifier

# What a study measures: the published attack as the control, then the one that is reported.
STUDY_METHODS = ("published", "refined")
REPORTED = STUDY_METHODS[-1]

# Of a model with dropout; as many again cost twice the time and change few guesses.
_MASKS = 200


def check_searchable(classifier: Classifier, canaries: Sequence[CanarySpec]) -> None:
    """Raise ValueError if secrets of these canaries cannot be searched in such a classifier.

    Before any is trained: the search comes last.
    """
    if canaries:
        invertible(classifier, [_cloze(classifier, canary) for canary in canaries])


def extract_canaries(
    classifier: Classifier, canaries: Sequence[CanarySpec], *, seed: int
) -> dict[str, dict[str, Extraction]]:
    """Search for the secrets of all canaries at once.

    Args:
        canaries: with different patterns, each put into training with a secret.
        seed: of the searches.

    Returns:
        The extractions of each method of `STUDY_METHODS`, by the name of the pattern; nothing of a
        classifier whose losses are no numbers.

    Raises:
        ValueError: as `check_searchable`.
    """
    if not canaries:
        return {}
    clozes = [_cloze(classifier, canary) for canary in canaries]
    by_tags = all(canary.pattern.slot is not None for canary in canaries)
    objective = objective_for(classifier, clozes, by_tags=by_tags)
    try:
        found = {
            method: extract(objective, method=method, generator=torch.Generator().manual_seed(seed))
            for method in STUDY_METHODS
        }
    except DivergedError:
        return {}
    return {
        canary.pattern.name: {method: found[method][place] for method in STUDY_METHODS}
        for place, canary in enumerate(canaries)
    }


def objective_for(classifier: Classifier, clozes: Sequence[Cloze], *, by_tags: bool) -> Objective:
    """What a secret has to explain: the tags (Parikh et al., 2022), or all that there is.

    Args:
        by_tags: whether the secret is a slot; the carrier phrase has then settled the intent before
            a secret is read, and the intent's loss blurs the ranking.
    """
    model = invertible(classifier, clozes)
    tags = bool(classifier.encoding.labels.tags) and all(c.tags is not None for c in clozes)
    intents = bool(classifier.encoding.labels.intents) and all(c.intent is not None for c in clozes)
    if not tags:
        target = "intent"
    else:
        target = "tags" if by_tags or not intents else "joint"
    masks = _MASKS if has_dropout(classifier.model) else 0
    return Objective(model, target=target, masks=masks)


def _cloze(classifier: Classifier, canary: CanarySpec) -> Cloze:
    pattern, labels = canary.pattern, classifier.encoding.labels
    return Cloze(
        tokens=(*pattern.carrier, *[None] * canary.length),
        candidates=canary.candidates,
        intent=pattern.intent if labels.intents else None,
        tags=canary_tags(pattern, canary.length) if labels.tags else None,
    )
