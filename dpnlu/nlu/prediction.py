"""What a classifier says of texts: intents with their probabilities, slots with their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data.iob import iob2, spans
from dpnlu.nlu.encoding import Encoded
from dpnlu.nlu.models import device_of, moved
from dpnlu.nlu.utterances import Utterance


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A slot that was found.

    Attributes:
        slot: its name.
        text: the piece of the text that it covers.
        start, end: where that stands, in characters of the text as it was given, `end` excluded.
    """

    slot: str
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a classifier says of one text.

    Attributes:
        text: as it was given.
        intent: the likeliest; None: the model knows no intents.
        probability: the model's own, in (0, 1], of that intent; likewise.
        slots: from left to right; None: the model knows no slots.
    """

    text: str
    intent: str | None
    probability: float | None
    slots: tuple[Slot, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """What the model said, for JSON; a key is absent where it says nothing."""
        found: dict[str, Any] = {"text": self.text}
        if self.intent is not None:
            found |= {"intent": self.intent, "probability": self.probability}
        if self.slots is not None:
            found["slots"] = [
                {"slot": s.slot, "text": s.text, "start": s.start, "end": s.end} for s in self.slots
            ]
        return found


@dataclass(frozen=True, slots=True)
class Reading:
    """An utterance and the tensors that a classifier reads of it."""

    utterance: Utterance
    encoded: Encoded


def read(classifier: Classifier, utterance: Utterance) -> Reading:
    """What the classifier reads of an utterance.

    Raises:
        DataError: the utterance is longer than the classifier reads.
    """
    return Reading(utterance, classifier.encoding.read(utterance.tokens))


def predict(classifier: Classifier, readings: Sequence[Reading]) -> list[Prediction]:
    """What the classifier says of the utterances, all in one batch, in evaluation mode."""
    if not readings:
        return []
    model, labels = classifier.model.eval(), classifier.encoding.labels
    batch = classifier.encoding.collate([reading.encoded for reading in readings])
    batch = moved(batch, device_of(model))
    with torch.no_grad():
        outputs = model(batch)
    intents: list[tuple[str | None, float | None]] = [(None, None)] * len(readings)
    slots: list[tuple[Slot, ...] | None] = [None] * len(readings)
    if outputs.intents is not None:
        likeliest = outputs.intents.cpu().double().softmax(1).max(1)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        intents = [(labels.intents[number], share) for number, share in pairs]
    if outputs.tags is not None:
        rows = outputs.likeliest_tags(batch["lengths"]).cpu()
        slots = [
            _slots(reading, row, labels.tags) for reading, row in zip(readings, rows, strict=True)
        ]
    return [
        Prediction(text=reading.utterance.text, intent=intent, probability=share, slots=found)
        for reading, (intent, share), found in zip(readings, intents, slots, strict=True)
    ]


def _slots(reading: Reading, row: Tensor, names: Sequence[str]) -> tuple[Slot, ...]:
    """The slots that a row of tags marks, of which those past the utterance's end mean nothing."""
    utterance = reading.utterance
    tags = [names[number] for number in row[: len(utterance.tokens)].tolist()]
    first = reading.encoded.get("first")
    if first is not None:  # of a word without a sub-word the encoder says nothing
        places = first.tolist()
        tags = [tag if place >= 0 else "O" for tag, place in zip(tags, places, strict=True)]
    ends = utterance.ends
    found = []
    for span in spans(iob2(tags)):
        start, end = utterance.starts[span.start], ends[span.end - 1]
        found.append(Slot(slot=span.slot, text=utterance.text[start:end], start=start, end=end))
    return tuple(found)
