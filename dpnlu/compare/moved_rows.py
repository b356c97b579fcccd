"""Which candidates' rows of the embedding table training has moved: secrets read off the weights.

The table that training began with is public where a pretrained encoder is fine-tuned, or where the
seed of the initial weights is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attacks.inversion import Cloze, DivergedError, Extraction
from attacks.inversion.embedding_difference import Movement, most_moved, movement
from dpnlu.compare.inverting import unredacted
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.encoding import SubwordEncoding
from dpnlu.nlu.models import BiLSTMClassifier

EMBEDDING_DIFFERENCE = "embedding_difference"


def most_moved_secrets(
    trained: Classifier, initial: Classifier, clozes: Sequence[Cloze]
) -> tuple[Extraction, ...]:
    """Fill each hole with the candidate whose row moved furthest.

    Rare candidates, names above all, are told by it; where all of them occur in training anyway,
    as digits do, it says nothing.

    Args:
        initial: the classifier before training.

    Returns:
        One extraction per cloze; its losses are minus the distances.

    Raises:
        ValueError: the embeddings were frozen, or a candidate is no row of the table.
        DivergedError: the table holds what is no number.
    """
    table = _table(trained)
    if not np.isfinite(table).all():
        raise DivergedError("Expected a table of numbers, got others: the model has diverged.")
    found = movement(table, _table(initial))
    return tuple(_extraction(trained, cloze, found) for cloze in clozes)


def check_rows(classifier: Classifier, clozes: Sequence[Cloze]) -> None:
    """Raise ValueError unless each candidate will have a row that training can move."""
    if classifier.architecture.freeze_encoder:
        raise ValueError(
            f"Expected trained embeddings for --searches {EMBEDDING_DIFFERENCE}, got a frozen "
            "encoder, whose table does not move: leave the search out."
        )
    for cloze in clozes:
        for tokens in cloze.candidates:
            _rows(classifier, tokens)


def _extraction(classifier: Classifier, cloze: Cloze, found: Movement) -> Extraction:
    rows = [_rows(classifier, tokens) for tokens in cloze.candidates]
    choices = tuple(most_moved(found, of_hole, most=1)[0] for of_hole in rows)
    scores = tuple(-found.distance[of_hole] for of_hole in rows)
    return Extraction(
        cloze=cloze,
        choices=choices,
        loss=float(np.mean([of_hole[c] for of_hole, c in zip(scores, choices, strict=True)])),
        scores=scores,
        history=np.zeros(0),
        notes=("By the distance of rows of the embedding table, not by a loss.",),
    )


def _table(classifier: Classifier) -> NDArray[np.float64]:
    """The input embedding table (N, d)."""
    model: Any = classifier.model
    module = (
        model.embedding
        if isinstance(model, BiLSTMClassifier)
        else model.encoder.get_input_embeddings()
    )
    table: torch.Tensor = module.weight.detach().cpu().double()
    array: NDArray[np.float64] = table.numpy()
    return array


def _rows(classifier: Classifier, tokens: Sequence[str]) -> list[int]:
    """The row of each candidate.

    Raises:
        ValueError: one takes several.
    """
    encoding: Any = unredacted(classifier).encoding
    if not isinstance(encoding, SubwordEncoding):
        words: list[int] = encoding.vocabulary.encode(tokens)
        return words
    pieces = [encoding.tokenizer.tokenize(token, is_split_into_words=True) for token in tokens]
    if split := [token for token, found in zip(tokens, pieces, strict=True) if len(found) != 1]:
        raise ValueError(
            f"Expected candidates that are one row of the embedding table, got {split[0]!r}, which "
            "the tokenizer splits: leave it out, or search in another way."
        )
    ids: list[int] = encoding.tokenizer.convert_tokens_to_ids([found[0] for found in pieces])
    return ids
