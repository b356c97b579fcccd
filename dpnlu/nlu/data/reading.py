"""Files to text, JSON and table rows; every failure is a `DataError` with file and line."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from dpnlu.nlu.data.errors import DataError


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return the text of a UTF-8 file; a name that ends in `.gz` is decompressed.

    Args:
        path: The file. A byte order mark at its start is dropped.
        errors: What to do with bytes that are not UTF-8: "strict" refuses them,
            "replace" puts U+FFFD in their place.

    Raises:
        DataError: the file is absent, unreadable, damaged, no regular file, or not UTF-8 under
            "strict".
    """
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: expected UTF-8 text, got byte 0x{data[error.start]:02x}; "
            "save the file as UTF-8."
        ) from None


def read_lines(path: Path, *, errors: str = "strict") -> list[str]:
    """Return the lines of a UTF-8 file, without line ends and without a last empty line.

    Args:
        path: The file, as for `read_text`.
        errors: As for `read_text`.

    Raises:
        DataError: as for `read_text`.
    """
    # Not str.splitlines: JSON strings may hold U+2028 and other characters it breaks at.
    lines = read_text(path, errors=errors).split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def parse_json(text: str, *, place: str) -> object:
    """Return the JSON value that `text` holds.

    Args:
        text: One JSON document.
        place: Where it stands, for the message.

    Raises:
        DataError: `text` is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = (
            f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        )
        raise DataError(f"{place}: expected JSON, got {error.msg} at {where}; repair it.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: expected JSON that can be read, got {error}; repair it."
        ) from None


def read_table(
    path: Path, *, delimiter: str, required: Collection[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row of a delimited file with a header as (place, column -> field).

    Args:
        path: A UTF-8 file, its fields optionally quoted by `"`. Empty lines are skipped.
        delimiter: The character between two fields.
        required: Columns that the header must have; others are passed on as well.

    Yields:
        The file and line at which the row begins, and its fields by column.

    Raises:
        DataError: no header, a required column absent or there twice, a row of another length, bad
            quoting.
    """
    header: list[str] | None = None
    for place, fields in _csv_rows(path, delimiter=delimiter):
        if header is None:
            header = _header(fields, place=place, required=required)
        else:
            yield place, _record(fields, header=header, place=place)
    if header is None:
        raise DataError(
            f"{path}: expected a header line, got an empty file; add the columns' names."
        )


def _read_bytes(path: Path) -> bytes:
    """Return the file's bytes, decompressed if its name says so."""
    try:
        # A pipe may wait for ever, and a device never end.
        if not path.is_file() and not path.is_dir() and path.exists():
            raise DataError(
                f"{path}: expected a regular file, got a pipe, a socket or a device; save what "
                "it yields to a file."
            )
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected gzip data, got {error}; fetch the file again.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{path}: expected a readable file, got '{reason}'; check the path."
        ) from None


def _csv_rows(path: Path, *, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each non-empty row with the file and line at which it begins."""
    # strict: without it one unclosed quote silently swallows the rest of the file.
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{place}: expected a row of fields, got {error}; check its quotes."
            ) from None
        if fields is None:
            return
        if fields:
            yield place, fields


def _header(fields: list[str], *, place: str, required: Collection[str]) -> list[str]:
    """Return the columns' names after checking that the required ones are there."""
    header = [field.strip() for field in fields]
    repeated = [column for column in required if header.count(column) > 1]
    if repeated:
        raise DataError(
            f"{place}: expected different columns, got '{repeated[0]}' {header.count(repeated[0])} "
            "times; rename all but one."
        )
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(
            f"{place}: expected a header with the columns {', '.join(required)}, "
            f"got {', '.join(header)}; add {', '.join(missing)}."
        )
    return header


def _record(fields: list[str], *, header: list[str], place: str) -> dict[str, str]:
    """Return column -> field after checking that there is one field for each column."""
    if len(fields) != len(header):
        raise DataError(
            f"{place}: expected {len(header)} fields as in the header, got {len(fields)}; "
            "quote fields that contain the separator."
        )
    return dict(zip(header, fields, strict=True))
