"""How well a classifier does its task: intents, slots, and both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Encoded, Encoding, batches

_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Shares in [0, 1] over some examples.

    Attributes:
        intent_accuracy: right intents.
        slot_f1: micro-averaged F1 of whole slots (seqeval, CoNLL); None without slots.
        frame_accuracy: examples with the intent and every tag right.
        examples: how many they are.
    """

    intent_accuracy: float
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
    model.eval()
    intents: list[str] = []
    tags: list[list[str]] = []
    with torch.no_grad():
        for batch in batches(encoding, encoded, size=_BATCH_SIZE):
            outputs = model(batch)
            intents += [encoding.labels.intents[i] for i in outputs.intents.argmax(1).tolist()]
            if outputs.tags is not None:
                rows = outputs.tags.argmax(2).tolist()
                lengths = batch["lengths"].tolist()
                tags += [
                    [encoding.labels.tags[tag] for tag in row[:length]]
                    for row, length in zip(rows, lengths, strict=True)
                ]
    right = [guess == example.intent for guess, example in zip(intents, examples, strict=True)]
    if not tags or examples[0].tags is None:
        share = sum(right) / len(right)
        return Metrics(
            intent_accuracy=share, slot_f1=None, frame_accuracy=share, examples=len(right)
        )
    gold = [list(example.tags or ()) for example in examples]
    frames = [ok and a == b for ok, a, b in zip(right, tags, gold, strict=True)]
    return Metrics(
        intent_accuracy=sum(right) / len(right),
        slot_f1=_slot_f1(gold, tags),
        frame_accuracy=sum(frames) / len(frames),
        examples=len(right),
    )


def _slot_f1(gold: list[list[str]], found: list[list[str]]) -> float:
    from seqeval.metrics import f1_score  # it loads scikit-learn: only when needed

    return float(f1_score(gold, found, zero_division=0))
