"""Files that cannot be read, and tables."""

import gzip
import os
import socket
from pathlib import Path

import pytest

from dpnlu.nlu.data import DataError
from dpnlu.nlu.data.reading import parse_json, read_lines, read_table, read_text


def test_text_is_read_with_or_without_compression_and_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffdvořák\n".encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("dvořák\n".encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.gz") == "dvořák\n"


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028\x0b\x85\r\n\r\ntwo".encode())
    assert read_lines(tmp_path / "a.txt") == ["one\u2028\x0b\x85", "", "two"]
    (tmp_path / "b.txt").write_bytes(b"")
    assert read_lines(tmp_path / "b.txt") == []


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: expected UTF-8 text, got byte 0xe9"):
        read_text(path)
    assert read_text(path, errors="replace") == "one\ntwo\ncaf\ufffd\n"


@pytest.mark.parametrize(
    "damage",
    [b"plain", gzip.compress(b"x" * 99)[:-9], b"\x1f\x8b\x08\x00" + b"\xff" * 20],
    ids=["plain", "cut off", "nonsense"],  # compressed bytes hold the time, workers' must agree
)
def test_damaged_compression(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"a\.gz: expected gzip data"):
        read_text(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: expected a readable file, got 'No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(DataError, match="expected a readable file, got 'Is a directory'"):
        read_text(tmp_path)


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/zero")):
            with pytest.raises(DataError, match=f"{path}: expected a regular file"):
                read_text(path)


def test_a_file_without_a_name_of_its_own_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    assert read_text(tmp_path / "link") == "one"


def test_json_faults_name_the_place_and_the_line_within() -> None:
    with pytest.raises(DataError, match=r"^here: expected JSON, got .* at line 2 column 5"):
        parse_json('{\n"a" 1}', place="here")
    with pytest.raises(DataError, match=r"^here: expected JSON, got .* at column 6"):
        parse_json('{"a" 1}', place="here")


def table(path: Path, text: str) -> list[tuple[str, dict[str, str]]]:
    """Write a table and read it."""
    path.write_text(text, encoding="utf-8", newline="")
    return list(read_table(path, delimiter=";", required=("a", "b")))


def test_rows_carry_the_line_at_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = table(path, 'a;b;c\r\n1;"two\nlines";3\n\n4;"say ""x"";";6\n')
    assert rows == [
        (f"{path}, line 2", {"a": "1", "b": "two\nlines", "c": "3"}),
        (f"{path}, line 5", {"a": "4", "b": 'say "x";', "c": "6"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: expected a header line"),
        ("a;c\n1;2\n", "line 1: expected a header with the columns a, b, got a, c; add b"),
        ("a;b;a\n1;2;3\n", "line 1: expected different columns, got 'a' 2 times"),
        ("a;b\n1;2\n3\n", "line 3: expected 2 fields as in the header, got 1"),
        ("a;b\n1;2;3\n", "line 2: expected 2 fields as in the header, got 3"),
        (
            'a;b\n1;2\n3;"open\n5;6\n',
            "line 3: expected a row of fields, got unexpected end of data",
        ),
        ('a;b\n1;"x"y\n', "line 2: expected a row of fields"),
        (f"a;b\n1;{'x' * 200_000}\n", "line 2: expected a row of fields, got field larger"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path / "t.csv", text)
    assert message in str(caught.value)
