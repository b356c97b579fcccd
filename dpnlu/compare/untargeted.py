"""What a model gives away of the values it was trained on, where no canary was planted.

Carriers are phrases of the test split, which the model never saw, with a hole where the slot was.
Values are those of a public list and random ones; which of them were trained on is looked up only
to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attacks import gazetteer
from attacks.inversion import Cloze, Objective
from attacks.inversion.enumeration import losses_of_all
from attacks.metrics import auc
from attacks.untargeted import precision_at, value_scores
from dpnlu.compare.inverting import invertible, is_unknown
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, Example
from dpnlu.nlu.data.vocabulary import normalized_token

# What may be claimed, and in how many phrases each value is tried.
KS = (10, 20, 50)
MOST_CARRIERS = 40
# Fewer values of either kind measure nothing.
LEAST_VALUES = 3
# Letters of random values, which nobody is called.
_RANDOM_LENGTHS = (4, 9)


def untargeted_entry(
    classifier: Classifier,
    corpus: Corpus,
    *,
    slot: str,
    values: Sequence[str] = (),
    random_values: int = 100,
    reference: Classifier | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Rank values of a slot by how likely the model finds them, and measure the first claims.

    Args:
        corpus: its training split is what the classifier was trained on.
        slot: whose values are ranked; single words.
        values: the public list; empty: first names and surnames.
        random_values: random words that are ranked along, which were not trained on.
        reference: a classifier of the same labels that never saw the data; None: none.
        confidence: of the intervals.
        seed: of the random words and of the choice among carriers.

    Raises:
        ValueError: no phrase of the test split has one word in that slot, too few values were
            trained on or not, or the model cannot tell values apart.
    """
    rng = np.random.default_rng([seed, 3])
    seen = {normalized_token(word) for word in _single_words(corpus.split("train"), slot)}
    listed = list(dict.fromkeys(normalized_token(v) for v in values or _names()))
    drawn = [word for word in _random_words(rng, random_values) if word not in {*seen, *listed}]
    tried = tuple(_told_apart(classifier, reference, [*listed, *drawn]))
    truth = np.array([value in seen for value in tried])
    if min(truth.sum(), (~truth).sum()) < LEAST_VALUES:
        raise ValueError(
            f"Expected at least {LEAST_VALUES} values of the slot {slot!r} that were trained on "
            f"and as many that were not, got {truth.sum()} and {(~truth).sum()}: name others by "
            "--candidates."
        )
    clozes = _clozes(classifier, corpus.split("test"), slot, tried, rng)
    scores = value_scores(
        _losses(classifier, clozes),
        None if reference is None else _losses(reference, clozes),
    )
    order = np.argsort(-scores, kind="stable")
    found = precision_at(
        scores, truth, ks=[k for k in KS if k <= len(tried)], confidence=confidence
    )
    return {
        "slot": slot,
        "values": len(tried),
        "trained_on": int(truth.sum()),
        "carriers": len(clozes),
        "calibrated": reference is not None,
        "auc": auc(scores, truth),
        "precision_at": [asdict(precision) for precision in found],
        "first": [{"value": tried[i], "trained_on": bool(truth[i])} for i in order[: KS[0]]],
    }


def _names() -> tuple[str, ...]:
    return (*gazetteer.FIRST_NAMES, *gazetteer.SURNAMES)


def _single_words(examples: Iterable[Example], slot: str) -> Iterator[str]:
    """The values of the slot that are one word."""
    for example in examples:
        for place in _places(example, slot):
            yield example.tokens[place]


def _places(example: Example, slot: str) -> list[int]:
    """Where the slot is one word long."""
    tags = (*(example.tags or ()), "O")
    return [
        place
        for place, (tag, following) in enumerate(pairwise(tags))
        if tag == f"B-{slot}" and following != f"I-{slot}"
    ]


def _random_words(rng: np.random.Generator, number: int) -> list[str]:
    low, high = _RANDOM_LENGTHS
    letters = np.array(list(gazetteer.LETTERS))
    return ["".join(rng.choice(letters, size=rng.integers(low, high))) for _ in range(number)]


def _told_apart(
    classifier: Classifier, reference: Classifier | None, values: Sequence[str]
) -> Iterator[str]:
    """The values that the models know, and read as one vector each, and as no other's."""
    models = [model for model in (classifier, reference) if model is not None]
    seen: list[set[tuple[int, ...]]] = [set() for _ in models]
    for value in values:
        ids = [_ids(model, value) for model in models]
        alone = all(i not in known for i, known in zip(ids, seen, strict=True))
        known_to_all = not any(is_unknown(model, value) for model in models)
        if alone and known_to_all and all(len(i) == 1 for i in ids):
            for i, known in zip(ids, seen, strict=True):
                known.add(i)
            yield value


def _ids(classifier: Classifier, word: str) -> tuple[int, ...]:
    """The entries of the model's vocabulary that a word takes, special ones left out."""
    encoding: Any = classifier.encoding
    if classifier.architecture.is_encoder:
        return tuple(encoding.tokenizer(word, add_special_tokens=False)["input_ids"])
    return tuple(encoding.vocabulary.encode([word]))


def _clozes(
    classifier: Classifier,
    examples: Sequence[Example],
    slot: str,
    values: tuple[str, ...],
    rng: np.random.Generator,
) -> list[Cloze]:
    """Phrases with a hole where the slot was, some of all that there are."""
    labels = classifier.encoding.labels
    found = {
        Cloze(
            tokens=(*example.tokens[:place], None, *example.tokens[place + 1 :]),
            candidates=(values,),
            intent=example.intent if labels.intents else None,
            tags=example.tags if labels.tags else None,
        ): None
        for example in examples
        for place in _places(example, slot)
        if labels.tags and set(example.tags or ()) <= set(labels.tags)
    }
    if not found:
        raise ValueError(
            f"Expected phrases of the test split with one word in the slot {slot!r}, got none: "
            "name another by --slot."
        )
    clozes = list(found)
    chosen = rng.permutation(len(clozes))[:MOST_CARRIERS]
    return [clozes[i] for i in sorted(chosen)]


def _losses(classifier: Classifier, clozes: Sequence[Cloze]) -> NDArray[np.float64]:
    """(V, C): of each value in each phrase."""
    objective = Objective(invertible(classifier, clozes), target="tags")
    with torch.no_grad():
        columns = [losses_of_all(objective, k).cpu().numpy() for k in range(len(clozes))]
    return np.stack(columns, axis=1)
