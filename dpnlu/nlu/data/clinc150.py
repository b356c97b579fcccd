"""CLINC150 (Larson et al., 2019): a JSON file of [text, intent] pairs, out-of-scope rows apart."""

from collections.abc import Iterator
from pathlib import Path

from dpnlu.nlu.data.assembly import Row, assembled
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.reading import parse_json, read_text
from dpnlu.nlu.data.records import Corpus

SPLITS_IN_FILE = ("train", "val", "test")


def load_clinc150(path: Path) -> Corpus:
    """Load `data_full.json` or a file of its form; it has no slots.

    Rows under `oos_train`, `oos_val` and `oos_test` follow the in-scope rows of their split, with
    the intent the file gives them (`oos`).

    Raises:
        DataError: the file is not of that form; the message names the key and the row.
    """
    content = parse_json(read_text(path), place=str(path))
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected an object with the lists {', '.join(SPLITS_IN_FILE)}, "
            f"got {type(content).__name__}; pass data_full.json."
        )
    rows = [row for split in SPLITS_IN_FILE for row in _split_rows(content, split=split, path=path)]
    return assembled(rows, name="clinc150", source=str(path))


def _split_rows(content: dict[str, object], *, split: str, path: Path) -> Iterator[Row]:
    """Yield the rows of one split, in scope first."""
    for key in (split, f"oos_{split}"):
        pairs = content.get(key, [] if key.startswith("oos_") else None)
        if not isinstance(pairs, list):
            raise DataError(
                f"{path}: expected a list of [text, intent] under '{key}', got none; "
                "pass data_full.json."
            )
        for number, pair in enumerate(pairs, start=1):
            yield _row(pair, split=split, place=f"{path}, '{key}' row {number}")


def _row(pair: object, *, split: str, place: str) -> Row:
    """Return the row that a [text, intent] pair describes."""
    match pair:
        case [str(text), str(intent)]:
            return Row(place=place, text=text, intent=intent, split=split)
        case _:
            raise DataError(
                f"{place}: expected [text, intent], got {type(pair).__name__}; correct the row."
            )
