"""Comma-separated tables with a header: text, intent and, if known, split, user and group."""

from pathlib import Path

from dpnlu.nlu.data.assembly import Row, assembled
from dpnlu.nlu.data.reading import read_table
from dpnlu.nlu.data.records import Corpus


def load_table(path: Path) -> Corpus:
    """Load `FILE.csv` with the columns `text` and `intent`; it has no slots.

    Optional columns: `split` (on every row or on none: then it is drawn 80/10/10), `user` and
    `group`. Others are ignored.

    Raises:
        DataError: the file or a row is not of that form; the message names the line.
    """
    rows = [
        Row(
            place=place,
            text=record["text"],
            intent=record["intent"].strip(),
            split=record.get("split", "").strip() or None,
            user=record.get("user", "").strip() or None,
            group=record.get("group", "").strip() or None,
        )
        for place, record in read_table(path, delimiter=",", required=("text", "intent"))
    ]
    return assembled(rows, name=path.stem, source=str(path))
