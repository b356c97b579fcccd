"""The recipes that are used unless others are asked for.

They were tuned on public data (SNIPS). On private data every look at a validation score is a
release of its own; the guarantee of a single training does not cover the choice among several.
"""

from __future__ import annotations

from dataclasses import replace

from dpnlu.nlu.classifier import LSTM, Architecture
from dpnlu.runs.settings import FIRST_RECIPES, LATEST_RECIPES
from dpnlu.training.loop import Recipe


def architecture(
    name: str,
    *,
    private: bool,
    dropout: float | None = None,
    characters: int = 0,
    redact_digits: bool = False,
    slot_loss: str | None = None,
    edition: int = LATEST_RECIPES,
) -> Architecture:
    """The shape of the named classifier.

    Private training has noise enough without dropout, and leaves a pretrained encoder as it is: the
    noise grows with the number of trained weights, and at these budgets the heads alone do better.
    As the encoder does not learn to say what they need in its last layer, they read several, and
    for slots the words around and the whole text. What intents are called is known beforehand, and
    learning them begins with it. The heads of a private BiLSTM read the words themselves, too.

    Args:
        dropout, slot_loss: None: as recommended.
        characters: filters over the characters of each word; 0: none.
        redact_digits: read every digit as 0.
        edition: of the recommendations, 1 to 6.

    Raises:
        ValueError: the name is neither "lstm" nor "encoder:NAME_OR_PATH", dropout is not in [0, 1),
            characters are asked for and cannot be read, or there is no such slot loss.
    """
    if dropout is None:
        dropout = 0.0 if private else 0.5 if name == LSTM else 0.1
    _check_edition(edition)
    heads_alone = private and name != LSTM
    wide = heads_alone and edition > FIRST_RECIPES
    recommended = "chain" if edition > FIRST_RECIPES else "words"
    return Architecture(
        name=name,
        character_filters=characters,
        redact_digits=redact_digits,
        dropout=dropout,
        freeze_encoder=heads_alone,
        slot_loss=recommended if slot_loss is None else slot_loss,
        text_layers=(0.0, 1 / 3, 2 / 3, 1.0) if wide else None,
        word_layers=(0.0, 0.5, 1.0) if wide else None,
        neighbours=1 if wide else 0,
        reads_text=wide,
        reads_word_means=heads_alone and edition >= 6,
        reads_intent_names=heads_alone and edition >= 6,
        word_window=1 if private and name == LSTM and edition >= 3 else None,
    )


def recipe(
    name: str,
    *,
    private: bool,
    epochs: float | None,
    batch_size: int | None,
    units: int | None = None,
    weight_decay: float = 0.0,
    patience: int | None = None,
    edition: int = LATEST_RECIPES,
) -> Recipe:
    """How to train the named classifier.

    Args:
        private: private training wants larger batches and higher rates.
        epochs: None: as recommended.
        batch_size: of private training; None: as recommended. Ordinary training keeps its own.
        units: training examples, or users, which are public; None: as many as SNIPS has.
        weight_decay, patience: see `Recipe`.
        edition: of the recommendations, 1 to 6.

    Raises:
        ValueError: a number is out of range; see `Recipe`. Or patience in private training.
    """
    if private and patience is not None:
        raise ValueError(
            f"Expected patience in ordinary training alone, got {patience} with a finite ε: when "
            "to stop would be read from validation data, which ε does not cover; set --epochs."
        )
    _check_edition(edition)
    recommended = _RECIPES[edition][name == LSTM, private]
    chosen = replace(recommended, weight_decay=weight_decay, patience=patience)
    asked = chosen if batch_size is None else replace(chosen, batch_size=batch_size)
    chosen = asked if private else chosen
    if private and units is not None and name == LSTM and edition > 3:
        chosen = _for_few(chosen, units, may_change_batch=batch_size is None)
    return chosen if epochs is None else replace(chosen, epochs=epochs)


def _for_few(recipe: Recipe, units: int, *, may_change_batch: bool) -> Recipe:
    """As many steps as SNIPS gets, of at most a quarter of the data each.

    Of few texts a large batch is all there are, so that 30 epochs are 30 steps. Private training
    gains more from more steps than it loses by their noise.
    """
    if may_change_batch:
        recipe = replace(recipe, batch_size=max(1, min(recipe.batch_size, units // 4)))
    return replace(recipe, epochs=max(recipe.epochs, _STEPS * recipe.batch_size / units))


def _check_edition(edition: int) -> None:
    if edition not in _RECIPES:
        raise ValueError(
            f"Expected `recipes` to be one of {', '.join(map(str, _RECIPES))}, got {edition}."
        )


# Edition -> (whether the BiLSTM, whether private) -> what does well.
_FIRST = {
    (True, False): Recipe(epochs=20, batch_size=64, learning_rate=2e-3),
    (True, True): Recipe(epochs=20, batch_size=512, learning_rate=2e-2),
    (False, False): Recipe(epochs=5, batch_size=32, learning_rate=5e-5, warmup=0.1),
    (False, True): Recipe(epochs=20, batch_size=2048, learning_rate=1e-2),
}
_SECOND = _FIRST | {
    (True, True): Recipe(epochs=15, batch_size=1024, learning_rate=2e-2),
    (False, True): Recipe(epochs=20, batch_size=4096, learning_rate=1e-2),
}
_THIRD = _SECOND | {
    (True, True): Recipe(epochs=30, batch_size=1024, learning_rate=2e-2),
}
_FIFTH = _THIRD | {
    (False, True): Recipe(epochs=40, batch_size=4096, learning_rate=5e-3),
}
_RECIPES = {
    FIRST_RECIPES: _FIRST,
    2: _SECOND,
    3: _THIRD,
    4: _THIRD,
    5: _FIFTH,
    LATEST_RECIPES: _FIFTH,
}
# Of the private BiLSTM: 30 epochs of the 13 084 texts of SNIPS, in batches of 1024.
_STEPS = 383
