"""The common record: every format ends as a `Corpus` of `Example`s."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.iob import slot_of, violation

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One labelled utterance.

    Attributes:
        id: Stable name made of the split and the position in it, such as "train-00042".
        text: The utterance as the source spells it; like all strings here, valid Unicode.
        tokens: Its tokens; at least one, none of them blank.
        tags: One IOB2 tag per token, or None in a corpus without slots.
        intent: The label of the whole utterance, or None in a corpus without intents.
        split: "train", "valid" or "test".
        user: Who wrote it, where the source says so; the unit of user-level privacy.
        group: Which group of people it belongs to, likewise; read to compare accuracy by group,
            never an input of a model.

    Raises:
        DataError: a field breaks what is said above; the message names the id.
    """

    id: str
    text: str
    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    intent: str | None
    split: str
    user: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        _check_strings(self)
        _check_tokens(self)
        if self.tags is not None:
            _check_tags(self, tags=self.tags)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Examples of all splits, and the label sets that were declared without looking at them.

    Label sets read from private data are released with the model and are not covered by its ε;
    `labels_are_public` says whether that is so.

    Attributes:
        name: What reports call it.
        examples: In the order of the source within each split.
        declared_intents: Every possible intent, where the source declares them apart from its rows.
        declared_slots: Every possible slot name (without `B-`, `I-`), likewise.

    Raises:
        DataError: train or test is empty, train has neither two intents nor a slot, an id occurs
            twice, only some examples have tags or an intent, or a label is missing from a declared
            set.
    """

    name: str
    examples: tuple[Example, ...]
    declared_intents: tuple[str, ...] | None = None
    declared_slots: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_ids(self)
        _check_splits(self)
        _check_alike(self)
        _check_learnable(self)
        _check_declared(self)

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of split `name`, in order; "valid" may be empty.

        Raises:
            DataError: `name` is not "train", "valid" or "test".
        """
        if name not in SPLITS:
            raise DataError(
                f"Expected a split of {', '.join(SPLITS)}, got '{name}'; name one of them."
            )
        return tuple(example for example in self.examples if example.split == name)

    @property
    def intents(self) -> tuple[str, ...]:
        """The intents a model must know, sorted: the declared ones, else those of all splits.

        Empty in a corpus without intents to tell apart. All splits, not train alone, so that a
        label that occurs first in test can be encoded, and that the set is the
        same for every subset of train that a study trains on.
        """
        if not self.has_intents:
            return ()
        if self.declared_intents is not None:
            return tuple(sorted(set(self.declared_intents)))
        return tuple(sorted(_observed_intents(self.examples)))

    @cached_property
    def has_intents(self) -> bool:
        """Whether there are intents to tell apart: at least two in train."""
        return len(_observed_intents(self.split("train"))) > 1

    @property
    def slots(self) -> tuple[str, ...]:
        """The slot names a model must know, sorted: the declared ones, else those of all splits."""
        if self.declared_slots is not None:
            return tuple(sorted(set(self.declared_slots)))
        return tuple(sorted(_observed_slots(self)))

    @property
    def tags(self) -> tuple[str, ...]:
        """The IOB2 tags of all `slots`, sorted; empty in a corpus without slots.

        `B-x` and `I-x` are there for every slot x, whether or not both occur.
        """
        if not self.has_slots:
            return ()
        return tuple(sorted({"O", *(f"{edge}-{slot}" for slot in self.slots for edge in "BI")}))

    @property
    def has_slots(self) -> bool:
        """Whether the examples carry tags."""
        return self.examples[0].tags is not None

    @property
    def labels_are_public(self) -> bool:
        """Whether all label sets in use were declared, so that none was read from private rows."""
        return (self.declared_intents is not None or not self.has_intents) and (
            self.declared_slots is not None or not self.has_slots
        )


def normalized(text: str) -> str:
    """Return `text` lower-cased with white space collapsed: the form in which texts are compared.

    >>> normalized(" Wake  me UP ")
    'wake me up'
    """
    return " ".join(text.lower().split())


def _check_strings(example: Example) -> None:
    """Refuse a blank id, text, intent or group, an unknown split, and what no file can hold."""
    labels = [label for label in (example.intent, example.group) if label is not None]
    strings = (example.id, example.text, *example.tokens, *labels, *(example.tags or ()))
    if broken := next((text for text in strings if not _is_unicode(text)), None):
        raise DataError(
            f"Example {example.id}: expected valid Unicode, got {broken!a}, "
            "which has half a surrogate pair; correct or remove the row."
        )
    for field in ("id", "text", "intent", "group"):
        value = getattr(example, field)
        if value is not None and not value.strip():
            remedy = "leave it out" if field == "group" else "remove the row"
            raise DataError(
                f"Example {example.id}: expected a non-empty {field}, got a blank one; fill it in "
                f"or {remedy}."
            )
    if example.split not in SPLITS:
        raise DataError(
            f"Example {example.id}: expected a split of {', '.join(SPLITS)}, "
            f"got '{example.split}'; rename it."
        )


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can write the text: JSON smuggles in halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_tokens(example: Example) -> None:
    """Refuse an utterance without tokens and a blank token."""
    if not example.tokens:
        raise DataError(
            f"Example {example.id}: expected at least one token, got none; remove the row."
        )
    for position, token in enumerate(example.tokens):
        if not token.strip():
            raise DataError(
                f"Example {example.id}: expected non-blank tokens, got a blank one at position "
                f"{position}; remove it and its tag."
            )


def _check_tags(example: Example, *, tags: tuple[str, ...]) -> None:
    """Refuse tags that do not fit the tokens or are not IOB2."""
    if len(tags) != len(example.tokens):
        raise DataError(
            f"Example {example.id}: expected one tag per token, got {len(tags)} tags for "
            f"{len(example.tokens)} tokens; give as many tags as tokens."
        )
    position = violation(tags)
    if position is not None:
        raise DataError(
            f"Example {example.id}: expected IOB2 tags, got '{tags[position]}' at position "
            f"{position}; use O, B-slot, and I-slot only after B-slot or I-slot."
        )


def _check_ids(corpus: Corpus) -> None:
    """Refuse an id that stands for two examples."""
    counts = Counter(example.id for example in corpus.examples)
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise DataError(
            f"Corpus {corpus.name}: expected unique ids, got '{repeated}' "
            f"{counts[repeated]} times; give every example its own id."
        )


def _check_splits(corpus: Corpus) -> None:
    """Refuse a corpus without rows to train on, or without rows to test on."""
    for split in ("train", "test"):
        if not corpus.split(split):
            raise DataError(
                f"Corpus {corpus.name}: expected at least one row in {split}, got none; "
                "add rows, or leave the split out of every row to have one drawn."
            )


def _check_alike(corpus: Corpus) -> None:
    """Refuse a corpus in which some examples have tags, or an intent, and others do not."""
    first = corpus.examples[0]
    for example in corpus.examples:
        if (example.tags is not None) != corpus.has_slots:
            raise DataError(
                f"Corpus {corpus.name}: expected tags on all examples or on none, got "
                f"{first.id} and {example.id} unlike; tag rows without slots with O."
            )
        if (example.intent is None) != (first.intent is None):
            raise DataError(
                f"Corpus {corpus.name}: expected an intent on all examples or on none, got "
                f"{first.id} and {example.id} unlike; label the rows without one, or no row."
            )


def _check_learnable(corpus: Corpus) -> None:
    """Refuse a corpus without two intents to tell apart and without a slot to find, in train."""
    train = corpus.split("train")
    if corpus.has_intents or any(slot_of(tag) for example in train for tag in example.tags or ()):
        return
    intents = _observed_intents(train)
    found = f"only '{intents.pop()}'" if intents else "none"
    raise DataError(
        f"Corpus {corpus.name}: expected at least two intents in train, or a slot, got {found} and "
        "no slot; a classifier needs rows of another intent, or tags other than O."
    )


def _check_declared(corpus: Corpus) -> None:
    """Refuse a label that is missing from the declared set."""
    labels = (
        ("intent", _observed_intents(corpus.examples), corpus.declared_intents),
        ("slot", _observed_slots(corpus), corpus.declared_slots),
    )
    for kind, observed, declared in labels:
        unknown = sorted(observed - set(declared)) if declared is not None else []
        if unknown:
            raise DataError(
                f"Corpus {corpus.name}: expected only declared {kind}s, got '{unknown[0]}'; "
                "declare it or correct the rows."
            )


def _observed_intents(examples: Iterable[Example]) -> set[str]:
    """Return the intents that occur in the examples."""
    return {example.intent for example in examples if example.intent is not None}


def _observed_slots(corpus: Corpus) -> set[str]:
    """Return the slots that occur in any split."""
    tags = {tag for example in corpus.examples for tag in example.tags or ()}
    return {slot for slot in map(slot_of, tags) if slot is not None}
