"""Lines in, predictions out, as soon as they can be made: what `dpnlu predict` does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from dpnlu.mechanism.ranges import check_count
from dpnlu.nlu.data.errors import DataError, located
from dpnlu.nlu.prediction import Prediction, Reading, predict, read
from dpnlu.nlu.utterances import utterance_of_line
from dpnlu.runs.loaded_model import LoadedModel

# Bytes that are asked for at once. Less is taken where no more has come so far.
_AT_ONCE = 2**16
# Bytes; more than the longest text takes, however its characters are escaped.
_LONGEST_LINE = 2**22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def answers(
    model: LoadedModel, source: BinaryIO, *, name: str, is_json: bool, batch_size: int
) -> Iterator[list[Prediction]]:
    """Predictions for the lines of a file or a pipe, in order, in lists of `batch_size` at most.

    Lines that have arrived are answered before more are waited for. Where a line cannot be
    answered, those before it are, first.

    Args:
        source: UTF-8, one text or JSON object per line; see `utterance_of_line`.
        name: what messages call it.
        is_json: whether every line must be a JSON object.
        batch_size: lines computed at once, >= 1.

    Raises:
        DataError: a line is not of that form or longer than the model reads; the message names it.
    """
    check_count("batch_size", batch_size)
    number = 0
    waiting: list[Reading] = []
    try:
        for lines in _arriving(source, name):
            for line in lines:
                number += 1
                waiting.append(_reading(model, line, f"{name}, line {number}", is_json=is_json))
                if len(waiting) == batch_size:
                    yield predict(model.classifier, waiting)
                    waiting = []
            if waiting:
                yield predict(model.classifier, waiting)
                waiting = []
    except DataError:
        if waiting:
            yield predict(model.classifier, waiting)
        raise


def _reading(model: LoadedModel, line: bytes, place: str, *, is_json: bool) -> Reading:
    found = utterance_of_line(line, place=place, is_json=is_json)
    with located(place):
        return read(model.classifier, found)


def _arriving(source: BinaryIO, name: str) -> Iterator[list[bytes]]:
    """The lines that have come, whenever some have; without their ends."""
    rest, number = b"", 1
    # `read1` returns what there is, and waits only if there is nothing.
    while block := source.read1(_AT_ONCE):  # type: ignore[attr-defined]
        *lines, rest = (rest + block).split(b"\n")
        if lines and number == 1:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        number += len(lines)
        yield [line.removesuffix(b"\r") for line in lines]
        if len(rest) > _LONGEST_LINE:
            raise DataError(
                f"{name}, line {number}: expected lines of at most {_LONGEST_LINE} bytes, got a "
                "longer one; write one text per line."
            )
    if rest:
        yield [(rest.removeprefix(_BYTE_ORDER_MARK) if number == 1 else rest).removesuffix(b"\r")]
