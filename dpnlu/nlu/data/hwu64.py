"""HWU64 (Liu et al., 2019): semicolon-separated tables with slots written into the text."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dpnlu.nlu.data.annotation import inline_segments, tagged, text_of
from dpnlu.nlu.data.assembly import Row, assembled, with_drawn_valid
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.jsonl import load_jsonl
from dpnlu.nlu.data.reading import read_table
from dpnlu.nlu.data.records import Corpus

FOLDS = {"train": "KFold_1_trainset.csv", "test": "KFold_1_testset.csv"}
UNIFORM = "hwu64.jsonl.gz"
FULL = "NLU-Data-Home-Domain-Annotated-All.csv"
FOLD_COLUMNS = ("scenario", "intent", "answer_annotation")
FULL_COLUMNS = ("userid", "status", *FOLD_COLUMNS)
IRRELEVANT = "IRR_"


def load_hwu64(path: Path) -> Corpus:
    """Load HWU64 from a folder with its tables; intents are `<scenario>_<intent>`.

    The first of these that the folder holds is taken:

    1. `KFold_1_trainset.csv` and `KFold_1_testset.csv`: a tenth of train is drawn as valid.
    2. `hwu64.jsonl.gz`, the same rows in the uniform format.
    3. `NLU-Data-Home-Domain-Annotated-All.csv`, all rows collected: those with a status `IRR_*`
       and those without text are left out, a split is drawn, `userid` becomes the user.

    Raises:
        DataError: none of them is there, or a file is damaged; the message names file and line.
    """
    if (path / FOLDS["train"]).is_file():
        rows = [
            row for split, name in FOLDS.items() for row in _fold_rows(path / name, split=split)
        ]
        return assembled(with_drawn_valid(rows), name="hwu64", source=str(path))
    if (path / UNIFORM).is_file():
        return load_jsonl(path / UNIFORM)
    if (path / FULL).is_file():
        return assembled(list(_full_rows(path / FULL)), name="hwu64", source=str(path))
    raise DataError(
        f"{path}: expected one of {FOLDS['train']}, {UNIFORM}, {FULL} in the folder, got none; "
        "check the path."
    )


def _fold_rows(path: Path, *, split: str) -> Iterator[Row]:
    """Yield the rows of one table of the authors' cross-validation."""
    for place, record in read_table(path, delimiter=";", required=FOLD_COLUMNS):
        yield replace(_row(record, place=place), split=split)


def _full_rows(path: Path) -> Iterator[Row]:
    """Yield the relevant rows of the full table."""
    for place, record in read_table(path, delimiter=";", required=FULL_COLUMNS):
        if not record["status"].startswith(IRRELEVANT) and record["answer_annotation"].strip():
            yield replace(_row(record, place=place), user=record["userid"] or None)


def _row(record: dict[str, str], *, place: str) -> Row:
    """Return the row that a record of either table describes."""
    segments = inline_segments(record["answer_annotation"])
    tokens, tags = tagged(segments)
    return Row(
        place=place,
        text=text_of(segments),
        tokens=tokens,
        tags=tags,
        intent=f"{record['scenario']}_{record['intent']}",
    )
