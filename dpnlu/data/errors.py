"""Bad input, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """The data given by the user cannot be used; the message is one line and says what to do.

    Where the fault has a place, the message begins with it: file and line, or file and row.
    """


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
