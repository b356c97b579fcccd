"""How well a classifier does its task: intents, slots, and both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Encoded, Encoding, batches
from dpnlu.nlu.models import BiLSTMClassifier, EncoderClassifier, device_of, moved

_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Shares in [0, 1] over some examples.

    Attributes:
        intent_accuracy: right intents; None without intents.
        slot_f1: micro-averaged F1 of whole slots (seqeval, CoNLL); None without slots.
        frame_accuracy: examples with the intent and every tag right, as far as there are any.
        examples: how many they are.
    """

    intent_accuracy: float | None
    slot_f1: float | None
    frame_accuracy: float
    examples: int

    def to_dict(self) -> dict[str, float | int]:
        """What was measured, for JSON."""
        return {name: value for name, value in vars(self).items() if value is not None}


def evaluate(
    model: nn.Module, encoding: Encoding, encoded: Sequence[Encoded], examples: Sequence[Example]
) -> Metrics:
    """Run the model on examples, in evaluation mode, and compare with their labels.

    Args:
        encoded: the examples' tensors, in the same order.
    """
    right: list[NDArray[np.bool_]] = []
    accuracy = f1 = None
    intents, tags = _answers(model, encoding, encoded)
    if intents:
        pairs = zip(intents, examples, strict=True)
        right.append(np.array([guess == example.intent for guess, example in pairs]))
        accuracy = float(right[0].mean())
    if tags and examples[0].tags is not None:
        gold = [list(example.tags or ()) for example in examples]
        right.append(np.array([a == b for a, b in zip(tags, gold, strict=True)]))
        f1 = _slot_f1(gold, tags)
    return Metrics(
        intent_accuracy=accuracy,
        slot_f1=f1,
        frame_accuracy=float(np.logical_and.reduce(right).mean()),
        examples=len(examples),
    )


def mean_loss(
    model: BiLSTMClassifier | EncoderClassifier, encoding: Encoding, encoded: Sequence[Encoded]
) -> float:
    """The mean loss per example, in evaluation mode, in which the model stays.

    Args:
        encoded: at least one.
    """
    model.eval()
    device = device_of(model)
    with torch.no_grad():
        losses = [
            model.per_example_loss(moved(batch, device)).double().sum().item()
            for batch in batches(encoding, encoded, size=_BATCH_SIZE)
        ]
    return sum(losses) / len(encoded)


def _answers(
    model: nn.Module, encoding: Encoding, encoded: Sequence[Encoded]
) -> tuple[list[str], list[list[str]]]:
    """The intents and the tags of all examples; an empty list for what the model does not say."""
    model.eval()
    device = device_of(model)
    intents: list[str] = []
    tags: list[list[str]] = []
    with torch.no_grad():
        for batch in batches(encoding, encoded, size=_BATCH_SIZE):
            batch = moved(batch, device)
            outputs = model(batch)
            if outputs.intents is not None:
                guesses = outputs.intents.argmax(1).cpu().tolist()
                intents += [encoding.labels.intents[guess] for guess in guesses]
            if outputs.tags is not None:
                rows = outputs.likeliest_tags(batch["lengths"]).cpu().tolist()
                lengths = batch["lengths"].cpu().tolist()
                tags += [
                    [encoding.labels.tags[tag] for tag in row[:length]]
                    for row, length in zip(rows, lengths, strict=True)
                ]
    return intents, tags


def _slot_f1(gold: list[list[str]], found: list[list[str]]) -> float:
    from seqeval.metrics import f1_score  # it loads scikit-learn: only when needed

    return float(f1_score(gold, found, zero_division=0))
