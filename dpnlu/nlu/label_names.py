"""What intents are called, as a start for learning them.

A sentence encoder puts "play some jazz" near "play music". Its labels' names are known before any
text is read, so that an intent head can begin with them, and noise has less to hide.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Encoding
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.models import EncoderClassifier

# Logits are so many times the correlation of a text with a name, which is within [-1, 1].
SCALE = 10.0

# Where a word begins within one: "playMusic", "HTTPTimer", "timer2", "2nd".
_BOUNDARIES = re.compile(
    r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])"
)
_SEPARATORS = re.compile(r"[\s_./:|+-]+")


def begin_with_names(model: EncoderClassifier, encoding: Encoding) -> None:
    """Let the intent head begin with what the encoder says of each intent's name.

    An intent's row is in proportion to what the head would read of the name in the deepest layer,
    standardised, less its mean over all intents; zero for the other layers, and where a name has no
    word. The logit of an intent is then `SCALE` times the correlation of the text with its name,
    but for what all intents share. Where means over words are read, too, each has half of the row.

    Guarantee: texts are not looked at. Names of intents are part of the model, private or not.
    """
    head = model.intent_head
    if head is None:
        return
    config: Any = model.encoder.config
    width = int(config.hidden_size)
    said = _said(model, encoding)
    if not said:
        return
    shared = torch.stack(list(said.values())).mean(0)
    deepest = _deepest(model)
    scale = SCALE / (width * len(deepest) * model.intent_scale)
    with torch.no_grad():
        for place, vector in said.items():
            for part in (slice(width * layer, width * (layer + 1)) for layer in deepest):
                difference = vector[part] - shared[part]
                head.weight[place, part] = scale * difference


def words_of(name: str) -> list[str]:
    """The words of a label's name, in small letters.

    >>> words_of("SearchCreativeWork"), words_of("alarm/set_HTTPTimer2")
    (['search', 'creative', 'work'], ['alarm', 'set', 'http', 'timer', '2'])
    """
    spelled = _BOUNDARIES.sub(" ", name)
    return [word for word in _SEPARATORS.split(spelled.lower()) if word]


def _deepest(model: EncoderClassifier) -> list[int]:
    """Which of the means that intents read is of the deepest layer: over sub-words, over words."""
    shares = model.text_layers or (1.0, 0.5)  # as `pooled` reads them
    found = [max(range(len(shares)), key=shares.__getitem__)]
    if model.mean_layers and model.word_layers is not None:
        of_words = model.word_layers
        found.append(len(shares) + max(range(len(of_words)), key=of_words.__getitem__))
    return found


def _said(model: EncoderClassifier, encoding: Encoding) -> dict[int, Tensor]:
    """The places of the intents whose names have words, and (m d,) what is read of these names."""
    encoded = {
        place: encoding.encode(
            Example(id=name, text=name, tokens=words, tags=None, intent=name, split="train")
        )
        for place, name in enumerate(encoding.labels.intents)
        if (words := tuple(words_of(name)))
    }
    # Some tokenizers have no sub-word for a character, and no special ones either.
    encoded = {place: name for place, name in encoded.items() if len(name["subwords"])}
    read = read_once(model, encoding, list(encoded.values()))
    return {place: said["pooled"] for place, said in zip(encoded, read, strict=True)}
