"""How well a classifier does its task: intents, slots, and both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Encoded, Encoding, Labels, batches
from dpnlu.nlu.models import BiLSTMClassifier, EncoderClassifier, device_of, moved

_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says about N texts of W words together.

    Attributes:
        intents: (N,) the likeliest intent, as its number among the labels; None without intents.
        confidence: (N,) the model's own probability of that intent, in (0, 1]; likewise.
        tags: (W,) the tag of every word, text after text, as its number among the labels; None
            without slots.
    """

    intents: NDArray[np.int64] | None
    confidence: NDArray[np.float64] | None
    tags: NDArray[np.int64] | None

    def tags_of(self, examples: Sequence[Example], labels: Labels) -> list[list[str]]:
        """The tags by name, one list per text.

        Args:
            examples: the texts that were answered, which say how many words each has.
        """
        assert self.tags is not None
        names = [labels.tags[tag] for tag in self.tags.tolist()]
        ends = np.cumsum([len(example.tokens) for example in examples]).tolist()
        return [names[start:end] for start, end in zip([0, *ends], ends, strict=False)]


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
    return score(answer(model, encoding, encoded), examples, encoding.labels)


def answer(model: nn.Module, encoding: Encoding, encoded: Sequence[Encoded]) -> Answers:
    """What the model says about the examples, in evaluation mode, in which it stays.

    Args:
        encoded: the examples' tensors, at least one.
    """
    model.eval()
    device = device_of(model)
    said: dict[str, list[NDArray[Any]]] = {"intents": [], "confidence": [], "tags": []}
    with torch.no_grad():
        for batch in batches(encoding, encoded, size=_BATCH_SIZE):
            batch = moved(batch, device)
            outputs = model(batch)
            if outputs.intents is not None:
                # On the CPU, as not every device has float64.
                likeliest = outputs.intents.cpu().double().softmax(1).max(1)
                said["intents"].append(likeliest.indices.numpy())
                said["confidence"].append(likeliest.values.numpy())
            if outputs.tags is not None:
                rows = outputs.likeliest_tags(batch["lengths"]).cpu()
                lengths = batch["lengths"].cpu().tolist()
                said["tags"] += [
                    row[:length].numpy() for row, length in zip(rows, lengths, strict=True)
                ]
    return Answers(**{name: np.concatenate(all_) if all_ else None for name, all_ in said.items()})


def score(answers: Answers, examples: Sequence[Example], labels: Labels) -> Metrics:
    """Compare answers with the labels of the examples that were answered."""
    right: list[NDArray[np.bool_]] = []
    accuracy = f1 = None
    if answers.intents is not None:
        right.append(right_intents(answers.intents, examples, labels))
        accuracy = float(right[0].mean())
    if answers.tags is not None and examples[0].tags is not None:
        tags = answers.tags_of(examples, labels)
        gold = [list(example.tags or ()) for example in examples]
        right.append(np.array([a == b for a, b in zip(tags, gold, strict=True)]))
        f1 = _slot_f1(gold, tags)
    return Metrics(
        intent_accuracy=accuracy,
        slot_f1=f1,
        frame_accuracy=float(np.logical_and.reduce(right).mean()),
        examples=len(examples),
    )


def right_intents(
    intents: NDArray[np.int64], examples: Sequence[Example], labels: Labels
) -> NDArray[np.bool_]:
    """(N,) whether the intent, as its number among the labels, is the example's."""
    pairs = zip(intents.tolist(), examples, strict=True)
    return np.array([labels.intents[guess] == example.intent for guess, example in pairs])


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


def _slot_f1(gold: list[list[str]], found: list[list[str]]) -> float:
    from seqeval.metrics import f1_score  # it loads scikit-learn: only when needed

    return float(f1_score(gold, found, zero_division=0))
