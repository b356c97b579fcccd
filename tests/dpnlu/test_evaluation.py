"""Accuracy, slot F1 and exact frames."""

import pytest
import torch
from torch import nn

from dpnlu.nlu.data import Example, HashedVocabulary
from dpnlu.nlu.encoding import Labels, WordEncoding, encode_all
from dpnlu.nlu.metrics import evaluate
from dpnlu.nlu.models import Batch, Outputs

LABELS = Labels(("ask", "tell"), ("B-x", "B-y", "I-x", "O"))


class _Recites(nn.Module):
    """Answers with prepared labels, whatever it is asked."""

    def __init__(self, intents: list[str], tags: list[list[str]] | None) -> None:
        super().__init__()
        self.intents, self.tags, self.place = intents, tags, 0

    def forward(self, batch: Batch) -> Outputs:
        assert not self.training
        rows, steps = len(batch["lengths"]), int(batch["lengths"].max())
        chosen = range(self.place, self.place + rows)
        self.place += rows
        intents = torch.zeros(rows, 2)
        tags = torch.zeros(rows, steps, 4)
        for row, number in enumerate(chosen):
            intents[row, LABELS.intents.index(self.intents[number])] = 1
            for word, tag in enumerate(self.tags[number] if self.tags else ()):
                tags[row, word, LABELS.tags.index(tag)] = 1
        return Outputs(intents, tags if self.tags else None)


def _examples(tags: list[str], intents: list[str]) -> list[Example]:
    return [
        Example(
            id=str(number),
            text="w " * len(row.split()),
            tokens=("w",) * len(row.split()),
            tags=tuple(row.split()),
            intent=intent,
            split="test",
        )
        for number, (row, intent) in enumerate(zip(tags, intents, strict=True))
    ]


def test_slots_count_as_wholes_and_frames_need_everything_right() -> None:
    gold = _examples(["B-x I-x O", "O B-y", "O", "B-x O"], ["ask", "tell", "ask", "tell"])
    # one slot right, one cut short, one missed; two intents right with all tags right in one
    said = [["B-x", "I-x", "O"], ["O", "O"], ["O"], ["B-x", "I-x"]]
    model = _Recites(["ask", "tell", "tell", "ask"], said)
    encoding = WordEncoding(LABELS, HashedVocabulary(10))
    metrics = evaluate(model, encoding, encode_all(encoding, gold), gold)
    assert metrics.intent_accuracy == 0.5
    assert metrics.frame_accuracy == 0.25
    precision, recall = 1 / 2, 1 / 3
    assert metrics.slot_f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics.examples == 4


def test_without_slots_the_frame_is_the_intent() -> None:
    gold = _examples(["O", "O O", "O"], ["ask", "tell", "ask"])
    encoding = WordEncoding(Labels(LABELS.intents, ()), HashedVocabulary(10))
    model = _Recites(["ask", "ask", "ask"], None)
    metrics = evaluate(model, encoding, encode_all(encoding, gold), gold)
    assert metrics.slot_f1 is None
    assert metrics.frame_accuracy == metrics.intent_accuracy == pytest.approx(2 / 3)
    assert "slot_f1" not in metrics.to_dict()
