"""What a frozen encoder says of the examples, computed once for all epochs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpnlu.nlu.encoding import Encoded, Encoding
from dpnlu.nlu.models import EncoderClassifier, device_of, moved

_BATCH_SIZE = 64
_REPLACED = ("subwords", "attention", "first", "last")
# Bytes; what is larger goes to a file.
_IN_MEMORY = 2**30


def read_once(
    model: EncoderClassifier,
    encoding: Encoding,
    encoded: Sequence[Encoded],
    *,
    in_memory: int = _IN_MEMORY,
) -> list[Encoded]:
    """The examples with what the heads read in place of the sub-words, in evaluation mode.

    Guarantee: what is said of an example depends on that example alone, as the encoder was not
    trained on any; training the heads on it is as private as training them on the text.

    Args:
        in_memory: bytes of what is said of words up to which it stays in memory. More is mapped
            from a temporary file (see `tempfile`) that has no name and ends with the tensors, so
            that nobody finds what was said of private texts, or takes it for another encoder's.

    Raises:
        ValueError: there is no room for that file.
    """
    device = device_of(model)
    was_training = model.training
    model.eval()
    lengths = [int(example["lengths"]) for example in encoded]
    states: Tensor | None = None
    found: list[Encoded] = []
    word = 0
    with torch.no_grad():
        for start in range(0, len(encoded), _BATCH_SIZE):
            some = encoded[start : start + _BATCH_SIZE]
            read = moved(model.read(moved(encoding.collate(some), device)), torch.device("cpu"))
            if states is None and "states" in read:
                states = _room(sum(lengths), read["states"], in_memory=in_memory)
            for row, example in enumerate(some):
                place = None if states is None else states[word : word + lengths[len(found)]]
                word += lengths[len(found)]
                found.append(_replaced(example, read, row, place))
    model.train(was_training)
    return found


def _replaced(example: Encoded, read: dict[str, Tensor], row: int, place: Tensor | None) -> Encoded:
    kept = {field: values for field, values in example.items() if field not in _REPLACED}
    if "pooled" in read:
        kept["pooled"] = read["pooled"][row].clone()
    if place is not None:
        kept["states"] = place.copy_(read["states"][row, : len(place)])
    return kept


def _room(rows: int, like: Tensor, *, in_memory: int) -> Tensor:
    """(rows, d) for vectors like those of `like` (…, d)."""
    width = like.shape[-1]
    size = rows * width * like.element_size()
    if size <= in_memory:
        return like.new_empty(rows, width)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process
        except OSError as error:
            raise ValueError(
                f"Expected room for {size} bytes of what the encoder says in the folder of "
                f"temporary files {tempfile.gettempdir()}, got: {error}; set TMPDIR to another."
            ) from None
        mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))
    return torch.from_numpy(mapped).view(like.dtype).view(rows, width)
