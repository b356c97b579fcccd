"""Bad input, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

# Enough for the place, the fault and the remedy; what the data hold may be as long as they like.
_LONGEST_MESSAGE = 600


class DataError(ValueError):
    """The data given by the user cannot be used; the message is one line and says what to do.

    Where the fault has a place, the message begins with it: file and line, or file and row.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            line = f"{line[:half]} … {line[-half:]}"
        super().__init__(line)


@contextmanager
def located(place: str) -> Iterator[None]:
    """Put `place` (file and line) in front of every `DataError` raised inside the block.

    Raises:
        DataError: the one raised inside, with its place.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
