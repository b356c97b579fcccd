"""SNIPS: three files per split (Goo et al., 2018), or the original one JSON file per intent."""

import re
from collections.abc import Iterator
from pathlib import Path

from dpnlu.nlu.data.annotation import Segment, tagged, text_of
from dpnlu.nlu.data.assembly import Row, assembled, with_drawn_valid
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.reading import parse_json, read_lines, read_text
from dpnlu.nlu.data.records import Corpus

GOO_FOLDER = "goo"
JSON_FOLDER = "2017-06-custom-intent-engines"
SEPARATORS = re.compile(r"[.,'?!;]")
# One published file holds an emoji that is not valid UTF-8; a strict reader fails on it.
ERRORS = "replace"


def load_snips(path: Path) -> Corpus:
    """Load SNIPS, or other data in one of its two layouts.

    The split of Goo et al. is `{train,valid,test}/{seq.in,seq.out,label}` (`dev` for `valid` is
    accepted); text and tokens are those of `seq.in`. The original is
    `<Intent>/{train_<Intent>_full,validate_<Intent>}.json`; there `validate` becomes test, a tenth
    of train is drawn as valid, and tokens follow the rule of the other layout.

    Args:
        path: The folder of either layout, or one that holds it as `goo` or as
            `2017-06-custom-intent-engines`. Where there are both, the split of Goo et al. is taken.

    Raises:
        DataError: neither layout is there, or a file in it is damaged.
    """
    for folder in (path, path / GOO_FOLDER):
        if (folder / "train" / "seq.in").is_file():
            return assembled(list(_goo_rows(folder)), name="snips", source=str(path))
    for folder in (path, path / JSON_FOLDER):
        if any(folder.glob("*/train_*_full.json")):
            rows = with_drawn_valid(list(_json_rows(folder)))
            return assembled(rows, name="snips", source=str(path))
    raise DataError(
        f"{path}: expected train/seq.in or <Intent>/train_<Intent>_full.json in the folder, "
        "got neither; check the path."
    )


def tokenize_snips(text: str) -> list[str]:
    """Return the tokens of the published split: lower case, separators as blanks.

    >>> tokenize_snips("Play Dvořák's 9th.")
    ['play', 'dvořák', 's', '9th']
    """
    return SEPARATORS.sub(" ", text).lower().split()


def _goo_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of the split by Goo et al."""
    valid = "valid" if (folder / "valid").is_dir() else "dev"
    for split in ("train", valid, "test"):
        yield from _goo_split(folder / split, split=split)


def _goo_split(folder: Path, *, split: str) -> Iterator[Row]:
    """Yield the rows of one folder with `seq.in`, `seq.out` and `label`."""
    columns = [read_lines(folder / name, errors=ERRORS) for name in ("seq.in", "seq.out", "label")]
    counts = [len(column) for column in columns]
    if len(set(counts)) > 1:
        raise DataError(
            f"{folder}: expected as many lines in seq.in, seq.out and label, "
            f"got {', '.join(map(str, counts))}; fetch the files again."
        )
    for line, (text, tags, intent) in enumerate(zip(*columns, strict=True), start=1):
        yield Row(
            place=f"{folder / 'seq.in'}, line {line}",
            text=text,
            tokens=tuple(text.split()),
            tags=tuple(tags.split()),
            intent=intent.strip(),
            split=split,
        )


def _json_rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of the original files, intents in alphabetical order."""
    intents = sorted(path.parent.name for path in folder.glob("*/train_*_full.json"))
    for intent in intents:
        yield from _json_file(folder / intent / f"train_{intent}_full.json", intent, split="train")
    for intent in intents:
        yield from _json_file(folder / intent / f"validate_{intent}.json", intent, split="test")


def _json_file(path: Path, intent: str, *, split: str) -> Iterator[Row]:
    """Yield the rows of one original file."""
    content = parse_json(read_text(path, errors=ERRORS), place=str(path))
    utterances = content.get(intent) if isinstance(content, dict) else None
    if not isinstance(utterances, list):
        raise DataError(
            f"{path}: expected an object with a list under '{intent}', got something else; "
            "check that file and folder bear the intent's name."
        )
    for number, utterance in enumerate(utterances, start=1):
        place = f"{path}, row {number}"
        segments = _segments(utterance, place=place)
        tokens, tags = tagged(segments, tokenizer=tokenize_snips)
        yield Row(
            place=place,
            text=text_of(segments),
            tokens=tokens,
            tags=tags,
            intent=intent,
            split=split,
        )


def _segments(utterance: object, *, place: str) -> list[Segment]:
    """Return the segments of one utterance of an original file."""
    match utterance:
        case {"data": [*pieces]}:
            return [_segment(piece, place=place) for piece in pieces]
        case _:
            raise DataError(
                f"{place}: expected an object with a list 'data', got {type(utterance).__name__}; "
                "correct the row."
            )


def _segment(piece: object, *, place: str) -> Segment:
    """Return one segment; without an entity it lies outside every slot."""
    match piece:
        case {"text": str(text), "entity": str(slot)}:
            return Segment(text, slot)
        case {"text": str(text), **rest} if rest.get("entity") is None:
            return Segment(text)
        case _:
            raise DataError(
                f"{place}: expected a segment with a string 'text' and perhaps a string 'entity', "
                f"got {type(piece).__name__}; correct the row."
            )
