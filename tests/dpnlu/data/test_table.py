"""Comma-separated tables."""

from pathlib import Path

import pytest

from dpnlu.nlu.data import DataError, load_corpus, load_table


def write(path: Path, text: str) -> Path:
    """Write a table."""
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    lines = (
        "user,split,intent,id,text,group",
        'u1,train,alarm,1,"Wake me, now",north',
        ",train,music,2,play,",
        "u2,validation, music ,3,stop,  ",
        "u1,test,alarm,4,ring, 7 ",
    )
    path = write(tmp_path / "home.csv", "\n".join(lines))
    corpus = load_corpus(str(path))
    assert corpus.name == "home"
    assert not corpus.has_slots
    assert [row.id for row in corpus.examples] == [
        "train-00000",
        "train-00001",
        "valid-00000",
        "test-00000",
    ]
    assert corpus.examples[0].tokens == ("Wake", "me", ",", "now")
    assert [row.intent for row in corpus.examples] == ["alarm", "music", "music", "alarm"]
    assert [row.user for row in corpus.examples] == ["u1", None, "u2", "u1"]
    assert [row.group for row in corpus.examples] == ["north", None, None, "7"]


def test_a_split_is_drawn_where_there_is_none(tmp_path: Path) -> None:
    lines = "".join(f"say {n},i{n % 2}\n" for n in range(200))
    corpus = load_table(write(tmp_path / "home.csv", f"text,intent\n{lines}"))
    assert {row.split for row in corpus.examples} == {"train", "valid", "test"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x", "expected 3 fields as in the header, got 1"),
        (" ,music,test", "non-empty text"),
        ("x,,test", "non-empty intent"),
        ("x,music,exam", "got 'exam'"),
        ("x,music,", "split on every row or on none"),
        ('"x,music,test', "expected a row of fields"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path / "home.csv", f"text,intent,split\nwake,alarm,train\n{row}\n")
    with pytest.raises(DataError) as caught:
        load_table(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "home.csv", "utterance,label\nx,y\n")
    with pytest.raises(DataError, match=r"home\.csv, line 1: .*add text, intent"):
        load_table(path)
