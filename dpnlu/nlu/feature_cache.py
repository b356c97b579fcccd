"""What a frozen encoder says of the examples, computed once for all epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpnlu.nlu.encoding import Encoded, Encoding
from dpnlu.nlu.models import EncoderClassifier, device_of, moved

_BATCH_SIZE = 64
_REPLACED = ("subwords", "attention", "first", "last")


def read_once(
    model: EncoderClassifier, encoding: Encoding, encoded: Sequence[Encoded]
) -> list[Encoded]:
    """The examples with what the heads read in place of the sub-words, in evaluation mode.

    Guarantee: what is said of an example depends on that example alone, as the encoder was not
    trained on any; training the heads on it is as private as training them on the text.
    """
    device = device_of(model)
    was_training = model.training
    model.eval()
    found: list[Encoded] = []
    with torch.no_grad():
        for start in range(0, len(encoded), _BATCH_SIZE):
            some = encoded[start : start + _BATCH_SIZE]
            read = moved(model.read(moved(encoding.collate(some), device)), torch.device("cpu"))
            found += [_replaced(example, read, row) for row, example in enumerate(some)]
    model.train(was_training)
    return found


def _replaced(example: Encoded, read: dict[str, torch.Tensor], row: int) -> Encoded:
    kept = {field: values for field, values in example.items() if field not in _REPLACED}
    if "pooled" in read:
        kept["pooled"] = read["pooled"][row].clone()
    if "states" in read:
        kept["states"] = read["states"][row, : int(example["lengths"])].clone()
    return kept
