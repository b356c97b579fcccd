"""The recipes that are used unless others are asked for.

They were tuned on public data (SNIPS). On private data every look at a validation score is a
release of its own; the guarantee of a single training does not cover the choice among several.
"""

from __future__ import annotations

from dataclasses import replace

from dpnlu.nlu.classifier import LSTM, Architecture
from dpnlu.training.loop import Recipe


def architecture(name: str, *, private: bool, dropout: float | None = None) -> Architecture:
    """The shape of the named classifier.

    Private training has noise enough without dropout, and leaves a pretrained encoder as it is: the
    noise grows with the number of trained weights, and at these budgets the heads alone do better.

    Args:
        dropout: None: as recommended.

    Raises:
        ValueError: the name is neither "lstm" nor "encoder:NAME_OR_PATH", or dropout is not in
            [0, 1).
    """
    if dropout is None:
        dropout = 0.0 if private else 0.5 if name == LSTM else 0.1
    return Architecture(name=name, dropout=dropout, freeze_encoder=private and name != LSTM)


def recipe(name: str, *, private: bool, epochs: float | None, batch_size: int | None) -> Recipe:
    """How to train the named classifier.

    Args:
        private: private training wants larger batches and higher rates.
        epochs: None: as recommended.
        batch_size: of private training; None: as recommended. Ordinary training keeps its own.

    Raises:
        ValueError: a number is out of range; see `Recipe`.
    """
    chosen = _RECIPES[name == LSTM, private]
    if epochs is not None:
        chosen = replace(chosen, epochs=epochs)
    asked = chosen if batch_size is None else replace(chosen, batch_size=batch_size)
    return asked if private else chosen


# (whether the BiLSTM, whether private) -> what does well.
_RECIPES = {
    (True, False): Recipe(epochs=20, batch_size=64, learning_rate=2e-3),
    (True, True): Recipe(epochs=20, batch_size=512, learning_rate=2e-2),
    (False, False): Recipe(epochs=5, batch_size=32, learning_rate=5e-5, warmup=0.1),
    (False, True): Recipe(epochs=20, batch_size=2048, learning_rate=1e-2),
}
