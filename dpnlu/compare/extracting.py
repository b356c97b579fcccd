"""Secrets recovered from classifiers by inversion: of a study's canaries, or after any prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from attacks.dropout import has_dropout
from attacks.inversion import METHODS, Cloze, DivergedError, Extraction, Objective, extract
from attacks.patterns import CanarySpec, canary_tags
from dpnlu.compare.inverting import invertible
from dpnlu.compare.moved_rows import EMBEDDING_DIFFERENCE, check_rows, most_moved_secrets
from dpnlu.compare.settings import BLACK_BOX
from dpnlu.nlu.classifier import Classifier

# How a search is made: which method of inversion, and what the secret has to explain (None: what
# suits the canaries).
SEARCHES: Mapping[str, tuple[str, str | None]] = {
    **{method: (method, None) for method in METHODS},
    "joint": ("refined", "joint"),
    "labels_alone": ("coordinates", "labels"),
}
ALL_SEARCHES = (*SEARCHES, EMBEDDING_DIFFERENCE)

# Of a model with dropout; as many again cost twice the time and change few guesses.
MASKS = 200


def check_searchable(
    classifier: Classifier,
    canaries: Sequence[CanarySpec],
    searches: Sequence[str],
    *,
    decimals: int | None = None,
) -> None:
    """Raise ValueError if secrets of these canaries cannot be searched so in such a classifier.

    Before any is trained: the search comes last.
    """
    if unknown := [name for name in searches if name not in ALL_SEARCHES]:
        raise ValueError(
            f"Expected --searches among {', '.join(ALL_SEARCHES)}, got {unknown[0]!r}."
        )
    if decimals is not None and (able := [n for n in searches if n not in BLACK_BOX]):
        raise ValueError(
            f"Expected --searches that need answers alone, {', '.join(BLACK_BOX)}, where "
            f"probabilities are rounded, got {able[0]}: name others, or leave --decimals out."
        )
    if canaries and searches:
        model = invertible(classifier, [canary_cloze(classifier, canary) for canary in canaries])
        for name in searches:
            if name == EMBEDDING_DIFFERENCE:
                check_rows(classifier, model.clozes)
            else:
                Objective(model, target=SEARCHES[name][1] or _target(classifier, model.clozes))


def extract_canaries(
    classifier: Classifier,
    canaries: Sequence[CanarySpec],
    searches: Sequence[str],
    *,
    initial: Callable[[], Classifier],
    decimals: int | None = None,
    seed: int,
) -> dict[str, dict[str, Extraction]]:
    """Search for the secrets of all canaries at once.

    Args:
        canaries: with different patterns, each put into training with a secret.
        searches: names of `ALL_SEARCHES`.
        initial: the classifier before training.
        decimals: to which the attacker sees probabilities; None: all.
        seed: of the searches.

    Returns:
        The extractions of each search, by the name of the pattern; nothing of a classifier whose
        losses are no numbers.

    Raises:
        ValueError: as `check_searchable`.
    """
    if not canaries or not searches:
        return {}
    clozes = [canary_cloze(classifier, canary) for canary in canaries]
    by_tags = all(canary.pattern.slot is not None for canary in canaries)

    def searched(name: str) -> tuple[Extraction, ...]:
        if name == EMBEDDING_DIFFERENCE:
            return most_moved_secrets(classifier, initial(), clozes)
        method, target = SEARCHES[name]
        objective = objective_for(
            classifier, clozes, by_tags=by_tags, target=target, decimals=decimals
        )
        generator = torch.Generator().manual_seed(seed)
        return extract(objective, method=method, generator=generator)

    try:
        found = {name: searched(name) for name in searches}
    except DivergedError:
        return {}
    return {
        canary.pattern.name: {name: found[name][place] for name in searches}
        for place, canary in enumerate(canaries)
    }


def objective_for(
    classifier: Classifier,
    clozes: Sequence[Cloze],
    *,
    by_tags: bool,
    target: str | None = None,
    reference: Classifier | None = None,
    decimals: int | None = None,
    masks: int = MASKS,
) -> Objective:
    """What a secret has to explain: the tags (Parikh et al., 2022), or all that there is.

    Args:
        by_tags: whether the secret is a slot; the carrier phrase has then settled the intent before
            a secret is read, and the intent's loss blurs the ranking.
        target: see `Objective`; None: as `by_tags` says.
        reference: a classifier that never saw the secrets, whose loss is subtracted.
        decimals: to which the attacker sees probabilities; None: all.
        masks: of dropout, whose mean loss is taken of a classifier that has any.

    Raises:
        ValueError: as `invertible` and `Objective`.
    """
    masks = masks if has_dropout(classifier.model) and target != "labels" else 0
    return Objective(
        invertible(classifier, clozes),
        target=_target(classifier, clozes, by_tags=by_tags) if target is None else target,
        masks=masks,
        reference=None if reference is None else invertible(reference, clozes),
        decimals=decimals,
    )


def _target(classifier: Classifier, clozes: Sequence[Cloze], *, by_tags: bool = True) -> str:
    labels = classifier.encoding.labels
    tags = bool(labels.tags) and all(cloze.tags is not None for cloze in clozes)
    intents = bool(labels.intents) and all(cloze.intent is not None for cloze in clozes)
    if not tags:
        return "intent"
    return "tags" if by_tags or not intents else "joint"


def canary_cloze(classifier: Classifier, canary: CanarySpec) -> Cloze:
    """The canary's carrier with holes behind it, and those labels that the classifier has."""
    pattern, labels = canary.pattern, classifier.encoding.labels
    return Cloze(
        tokens=(*pattern.carrier, *[None] * canary.length),
        candidates=canary.candidates,
        intent=pattern.intent if labels.intents else None,
        tags=canary_tags(pattern, canary.length) if labels.tags else None,
    )
