"""Data sets of the Hugging Face hub, or a local folder that `datasets` can read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpnlu.nlu.data.annotation import inline_segments, tagged, text_of
from dpnlu.nlu.data.assembly import SPLIT_NAMES, Row, assembled, with_drawn_valid
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.iob import iob2, slot_of
from dpnlu.nlu.data.records import SPLITS, Corpus

# Role -> the columns that may play it; the first one present does.
COLUMN_NAMES = {
    "text": ("text", "utterance", "utt", "sentence"),
    "intent": ("intent", "label"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "slots"),
    "annotated": ("annot_utt",),
    "split": ("split", "partition"),
    "user": ("user", "user_id", "speaker_id", "worker_id"),
    "group": ("group",),
}
# Some sets publish their test rows without labels; such a label has this number.
UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class Column:
    """A column and, where its values are numbers of labels, the labels' names."""

    name: str
    labels: tuple[str, ...] | None


def load_hub(name: str) -> Corpus:
    """Load `NAME[:CONFIG]` through `datasets.load_dataset`; code of the data set is not run.

    Columns are found by their usual names (`COLUMN_NAMES`), label numbers become label names, IOB1
    tags become IOB2. Label sets that the features declare become the corpus's declared ones. Rows
    whose label is -1 (withheld) are left out. A column `split` or `partition` goes before the
    files' own splits. A source with one split only is drawn 80/10/10; without test, validation
    becomes test; without validation, a tenth of train is drawn.

    Args:
        name: A data set of the hub or a local folder of csv, json or parquet files, then
            optionally `:` and the configuration.

    Raises:
        DataError: `datasets` is absent or cannot load it, or it has no utterances with intents or
            slots; the message names split and row where there is one.
    """
    source = f"hf:{name}"
    splits = _load(name)
    columns = _columns(next(iter(splits.values())).features, source=source)
    rows = [
        row
        for split, records in splits.items()
        if split in SPLIT_NAMES or len(splits) == 1
        for row in _rows(records, columns=columns, split=split, source=source)
    ]
    return assembled(
        _with_all_splits(rows),
        name=name,
        source=source,
        declared_intents=columns["intent"].labels if "intent" in columns else None,
        declared_slots=_slots(columns["tags"].labels) if "tags" in columns else None,
    )


def _load(name: str) -> Mapping[str, Any]:
    """Return the splits of a data set by name."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"hf:{name}: expected the package datasets, which is not installed; "
            "run pip install 'dpnlu[hub]'."
        ) from None
    path, _, config = name.partition(":")
    if not path.strip():
        raise DataError(f"hf:{name}: expected hf:NAME[:CONFIG], got no name; name a data set.")
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(path, config or None)
    except Exception as error:  # what may go wrong there has no end
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hf:{name}: expected a data set that can be loaded, got '{reason}'; "
            "check name, configuration and network."
        ) from None
    return splits


def _columns(features: Mapping[str, Any], *, source: str) -> dict[str, Column]:
    """Return role -> column for the roles that some column of the data set plays."""
    found = {}
    for role, candidates in COLUMN_NAMES.items():
        name = next((name for name in candidates if name in features), None)
        if name is not None:
            found[role] = Column(name, _label_names(features[name]))
    has_labels = not found.keys().isdisjoint({"intent", "tags", "annotated"})
    if not has_labels or found.keys().isdisjoint({"text", "tokens", "annotated"}):
        raise DataError(
            f"{source}: expected a column named {' or '.join(COLUMN_NAMES['text'])} and one named "
            f"{' or '.join(COLUMN_NAMES['intent'] + COLUMN_NAMES['tags'])}, got "
            f"{', '.join(features)}; rename them."
        )
    return found


def _label_names(feature: Any) -> tuple[str, ...] | None:
    """Return the names behind the numbers of a label column, or of a column of label lists."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else tuple(names)


def _slots(tags: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the slots of a declared set of tags."""
    if tags is None:
        return None
    return tuple(sorted({slot for slot in map(slot_of, tags) if slot is not None}))


def _rows(
    records: Iterable[Mapping[str, Any]],
    *,
    columns: Mapping[str, Column],
    split: str,
    source: str,
) -> Iterator[Row]:
    """Yield the labelled rows of one split."""
    for number, record in enumerate(records, start=1):
        if "intent" not in columns or record[columns["intent"].name] != UNLABELLED:
            values = {role: _named(record[column.name], column) for role, column in columns.items()}
            row = _row(values, place=f"{source}, {split} row {number}")
            own = str(values.get("split") or split)
            yield replace(row, split=SPLIT_NAMES.get(own, own))


def _named(value: Any, column: Column) -> Any:
    """Return a value, or a list of them, with label numbers replaced by the labels' names."""
    if isinstance(value, list):
        return [_named(item, column) for item in value]
    labels = column.labels or ()
    return labels[value] if isinstance(value, int) and 0 <= value < len(labels) else value


def _row(values: Mapping[str, Any], *, place: str) -> Row:
    """Return the row that a record describes, given as role -> value."""
    text, tokens, tags = _utterance(values, place=place)
    intent, user = values.get("intent"), values.get("user")
    if text is None or ("intent" in values and not isinstance(intent, str | int)):
        raise DataError(
            f"{place}: expected a text and one intent, got an empty or another value; "
            "correct or remove the row."
        )
    return Row(
        place=place,
        text=text,
        intent=None if intent is None else str(intent),
        tokens=tokens,
        tags=tags,
        user=None if user is None else str(user),
        group=_group(values.get("group"), place=place),
    )


def _utterance(
    values: Mapping[str, Any], *, place: str
) -> tuple[str | None, tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return text, tokens and tags; tags without a column of tokens belong to blank-cut ones."""
    text = _text(values.get("text"), place=place)
    annotated = values.get("annotated")
    tokens = _strings(values.get("tokens"), place=place)
    tags = _strings(values.get("tags"), place=place)
    if tags is None and isinstance(annotated, str):
        segments = inline_segments(annotated)
        return text_of(segments), *tagged(segments)
    if tags is not None and tokens is None and text is not None:
        tokens = tuple(text.split())
    if text is None and tokens is not None:
        text = " ".join(tokens)
    return text, tokens, None if tags is None else iob2(tags)


def _text(value: Any, *, place: str) -> str | None:
    """Return a text; a number, as which a table's column may have been read, is one too."""
    if value is None or isinstance(value, str | int | float):
        return None if value is None else str(value)
    raise DataError(
        f"{place}: expected a string as text, got {type(value).__name__}; join or convert it."
    )


def _group(value: Any, *, place: str) -> str | None:
    """Return the name of a group; a whole number, as which a table's column may have been read,
    is one too."""
    if value is None or isinstance(value, str | int):
        return None if value is None else str(value)
    raise DataError(
        f"{place}: expected a string as group, got {type(value).__name__}; convert the column or "
        "rename it."
    )


def _strings(value: Any, *, place: str) -> tuple[str, ...] | None:
    """Return a list of strings, or one string cut at blanks, as a tuple."""
    if value is None:
        return None
    items = value.split() if isinstance(value, str) else value
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return tuple(items)
    raise DataError(
        f"{place}: expected tokens and tags as lists of strings or of named labels, "
        f"got {type(value).__name__}; convert them."
    )


def _with_all_splits(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows with the splits that the source lacks taken from those it has."""
    present = {row.split for row in rows}
    if len(present) == 1:
        return [replace(row, split=None) for row in rows]
    if "test" not in present:
        rows = [replace(row, split="test") if row.split == "valid" else row for row in rows]
    return rows if present == set(SPLITS) else with_drawn_valid(rows)
