"""From a source's rows to a corpus: splits drawn where absent, tokens cut, ids given."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpnlu.nlu.data.annotation import tokenize
from dpnlu.nlu.data.errors import DataError, located
from dpnlu.nlu.data.records import Corpus, Example, normalized

# A longer text is no utterance; all the others in its batch would be padded to its length.
LONGEST_TEXT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as its source has it.

    Attributes:
        place: File and line or row, for messages.
        text: The utterance; white space is collapsed on assembly.
        intent: Its label; None where the source has none.
        split: A key of `SPLIT_NAMES`, or None to have it drawn.
        tokens: None to have the text tokenised.
        tags: IOB2, or None.
        user: Who wrote it, if known.
        group: Which group of people it belongs to, if known.
    """

    place: str
    text: str
    intent: str | None
    split: str | None = None
    tokens: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    user: str | None = None
    group: str | None = None


def assembled(
    rows: Sequence[Row],
    *,
    name: str,
    source: str,
    declared_intents: tuple[str, ...] | None = None,
    declared_slots: tuple[str, ...] | None = None,
) -> Corpus:
    """Make a corpus of rows; an id is the split and the position in it.

    Args:
        rows: In the order of the source. All have a split, or none has: then each text is put
            into train, valid or test (80/10/10) by `drawn_split`.
        name: The corpus's name.
        source: The file or folder, for messages.
        declared_intents: As in `Corpus`.
        declared_slots: As in `Corpus`.

    Raises:
        DataError: a row or the whole is not fit to be a corpus; the message names the place.
    """
    _refuse_mixed_splits(rows)
    counts: Counter[str] = Counter()
    examples = []
    for row in rows:
        with located(row.place):
            split = drawn_split(row.text) if row.split is None else _split_name(row.split)
            examples.append(_example(row, split=split, position=counts[split]))
        counts[split] += 1
    with located(source):
        return Corpus(
            name=name,
            examples=tuple(examples),
            declared_intents=declared_intents,
            declared_slots=declared_slots,
        )


def drawn_split(text: str) -> str:
    """Return the split of a text whose source has none: 80/10/10, equal texts together."""
    return {0: "valid", 1: "test"}.get(_bucket(text), "train")


def with_drawn_valid(rows: Sequence[Row]) -> list[Row]:
    """Move a tenth of the train rows to valid, for a source without a validation split.

    The choice depends on nothing but a row's text, so equal texts stay together.
    """
    return [
        replace(row, split="valid") if row.split == "train" and _bucket(row.text) == 0 else row
        for row in rows
    ]


def _bucket(text: str) -> int:
    """Return a number from 0 to 9 that only the normalised text decides, on any machine."""
    digest = hashlib.sha256(normalized(text).encode("utf-8", errors="surrogatepass")).hexdigest()
    return int(digest[:8], 16) % 10


def _refuse_mixed_splits(rows: Sequence[Row]) -> None:
    """Refuse rows of which only some say their split."""
    without = next((row for row in rows if row.split is None), None)
    if without is not None and any(row.split is not None for row in rows):
        raise DataError(
            f"{without.place}: expected a split on every row or on none, got none here; "
            "name this row's split."
        )


def _split_name(given: str) -> str:
    """Return the split that a source's own word for it means."""
    if given not in SPLIT_NAMES:
        raise DataError(f"expected a split of {', '.join(SPLIT_NAMES)}, got '{given}'; rename it.")
    return SPLIT_NAMES[given]


def _example(row: Row, *, split: str, position: int) -> Example:
    """Return the example that a row describes."""
    if len(row.text) > LONGEST_TEXT:
        raise DataError(
            f"expected an utterance of at most {LONGEST_TEXT} characters, got {len(row.text)}; cut "
            "it, or remove the row."
        )
    text = " ".join(row.text.split())
    return Example(
        id=f"{split}-{position:05d}",
        text=text,
        tokens=tuple(tokenize(text)) if row.tokens is None else row.tokens,
        tags=row.tags,
        intent=row.intent,
        split=split,
        user=row.user,
        group=row.group,
    )


SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
