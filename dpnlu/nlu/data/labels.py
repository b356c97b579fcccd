"""Label sets declared in a file of their own, without looking at the data."""

from pathlib import Path

from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.reading import parse_json, read_text

FORM = '{"intents": [...], "slots": [...]}'


def read_labels(path: Path) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return the intents and the slots that a JSON file declares, None for what it does not.

    Args:
        path: A file with `{"intents": [...], "slots": [...]}`; one of both may be absent or null,
            and labels may be written as numbers.

    Raises:
        DataError: the file cannot be read, is not of that form, or has a label that is blank.
    """
    content = parse_json(read_text(path), place=str(path))
    declared = content if isinstance(content, dict) else {}
    intents, slots = (
        None if declared.get(key) is None else _labels(declared[key], key=key, path=path)
        for key in ("intents", "slots")
    )
    if intents is None and slots is None:
        raise DataError(f"{path}: expected {FORM}, got no intents and no slots; declare them.")
    return intents, slots


def _labels(values: object, *, key: str, path: Path) -> tuple[str, ...]:
    """Return the labels under a key as strings."""
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list under '{key}', got {type(values).__name__}.")
    return tuple(_label(value, key=key, path=path) for value in values)


def _label(value: object, *, key: str, path: Path) -> str:
    """Return one label as a string that a file can hold."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if (isinstance(value, str) and value.strip()) or is_number:
        label = str(value)
        if label.encode(errors="replace").decode() == label:
            return label
    raise DataError(
        f"{path}: expected labels as strings that are not blank under '{key}', got {value!a}; "
        "correct it."
    )
