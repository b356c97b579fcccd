"""What a frozen encoder says of the examples, computed once for all epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpnlu.nlu.encoding import Encoded, Encoding
from dpnlu.nlu.models import EncoderClassifier

_BATCH_SIZE = 64
_REPLACED = ("subwords", "attention", "first")


def read_once(
    model: EncoderClassifier, encoding: Encoding, encoded: Sequence[Encoded]
) -> list[Encoded]:
    """The examples with what the heads read in place of the sub-words, in evaluation mode.

    Guarantee: what is said of an example depends on that example alone, as the encoder was not
    trained on any; training the heads on it is as private as training them on the text.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: list[Encoded] = []
    with torch.no_grad():
        for start in range(0, len(encoded), _BATCH_SIZE):
            some = encoded[start : start + _BATCH_SIZE]
            batch = {field: values.to(device) for field, values in encoding.collate(some).items()}
            read = {field: values.cpu() for field, values in model.read(batch).items()}
            found += [_replaced(example, read, row) for row, example in enumerate(some)]
    model.train(was_training)
    return found


def _replaced(example: Encoded, read: dict[str, torch.Tensor], row: int) -> Encoded:
    kept = {field: values for field, values in example.items() if field not in _REPLACED}
    kept["pooled"] = read["pooled"][row].clone()
    if "states" in read:
        kept["states"] = read["states"][row, : int(example["lengths"])].clone()
    return kept
