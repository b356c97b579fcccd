"""The uniform format: one JSON object per line, `FILE.jsonl` or `FILE.jsonl.gz`."""

from collections.abc import Mapping
from pathlib import Path

from dpnlu.nlu.data.assembly import Row, assembled
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.reading import parse_json, read_lines
from dpnlu.nlu.data.records import Corpus


def load_jsonl(path: Path) -> Corpus:
    """Load a file with one JSON object per line.

    Keys: `text` (string, required); `intent` (string) or `tags` (IOB2, one per token), or both, the
    same on every row; `tokens` (strings; else the text is tokenised); `split` (train, valid or
    test, on every row or on none: then it is drawn 80/10/10); `user` (string or integer); `group`
    (string). Other keys and empty lines are ignored.

    Raises:
        DataError: the file or a line is not of that form; the message names the line.
    """
    rows = [
        _row(line, place=f"{path}, line {number}")
        for number, line in enumerate(read_lines(path), start=1)
        if line.strip()
    ]
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return assembled(rows, name=name, source=str(path))


def _row(line: str, *, place: str) -> Row:
    """Return the row that one line describes."""
    record = parse_json(line, place=place)
    if not isinstance(record, dict):
        raise DataError(
            f"{place}: expected a JSON object, got {type(record).__name__}; "
            'write {"text": ..., "intent": ...}.'
        )
    return Row(
        place=place,
        text=_required(record, "text", place=place),
        intent=_intent(record, place=place),
        split=_optional(record, "split", place=place),
        tokens=_strings(record, "tokens", place=place),
        tags=_strings(record, "tags", place=place),
        user=_user(record, place=place),
        group=_optional(record, "group", place=place),
    )


def _intent(record: Mapping[str, object], *, place: str) -> str | None:
    """Return the intent, which a row with tags may lack."""
    intent = _optional(record, "intent", place=place)
    if intent is None and record.get("tags") is None:
        raise DataError(
            f"{place}: expected a row with 'intent', or with 'tags', got neither; add one or "
            "remove the row."
        )
    return intent


def _required(record: Mapping[str, object], key: str, *, place: str) -> str:
    """Return the string that a row must have under `key`."""
    value = _optional(record, key, place=place)
    if value is None:
        raise DataError(
            f"{place}: expected a row with '{key}', got none; add it or remove the row."
        )
    return value


def _optional(record: Mapping[str, object], key: str, *, place: str) -> str | None:
    """Return the string under `key`, None where there is none."""
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value
    raise DataError(
        f"{place}: expected a string under '{key}', got {type(value).__name__}; quote the value."
    )


def _strings(record: Mapping[str, object], key: str, *, place: str) -> tuple[str, ...] | None:
    """Return the list of strings under `key`, None where there is none."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise DataError(
        f"{place}: expected a list of strings under '{key}', got another value; correct it."
    )


def _user(record: Mapping[str, object], *, place: str) -> str | None:
    """Return the user, who may be named by a number."""
    value = record.get("user")
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else _optional(record, "user", place=place)
