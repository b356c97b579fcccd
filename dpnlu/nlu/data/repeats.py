"""Texts that occur more than once: they blur who is a member, so they are counted and dropped.

Texts are compared in the form of `normalized`. To drop rows, token sequences are compared as well:
texts that differ in punctuation alone may be one and the same input to a model.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dpnlu.nlu.data.records import Corpus, Example, normalized


@dataclass(frozen=True, kw_only=True)
class RepeatReport:
    """How often texts repeat in a corpus, before anything is dropped.

    Attributes:
        rows: Examples in all splits.
        distinct_texts: Different texts among them.
        repeated_rows: Rows beyond the first of their text: `rows - distinct_texts`.
        texts_in_train_and_valid: Different texts that stand in both splits.
        test_rows_in_train: Rows of test whose text is also in train.
        texts_with_several_intents: Different texts that carry more than one intent.
        dropped_train_rows: Rows that `drop_repeated` removes from train.
    """

    rows: int
    distinct_texts: int
    repeated_rows: int
    texts_in_train_and_valid: int
    test_rows_in_train: int
    texts_with_several_intents: int
    dropped_train_rows: int


def duplicate_groups(examples: Iterable[Example]) -> tuple[tuple[Example, ...], ...]:
    """Return the groups of two or more examples with one text, ordered by first occurrence."""
    groups: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[normalized(example.text)].append(example)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def drop_repeated(corpus: Corpus) -> tuple[Corpus, RepeatReport]:
    """Remove from train every row that would make membership ambiguous.

    Guarantee: in the returned corpus no text and no token sequence occurs twice in train, and none
    of train occurs in valid or test. Rows of valid and test stay, so that accuracy on them can be
    compared with what others report. The first occurrence in train is kept; ids do not change.

    Returns:
        The reduced corpus, and the counts of the given one.

    Raises:
        DataError: too little of train is left to train on.
    """
    kept = _kept_train_ids(corpus)
    examples = tuple(
        example for example in corpus.examples if example.split != "train" or example.id in kept
    )
    return replace(corpus, examples=examples), _report(
        corpus, dropped=len(corpus.examples) - len(examples)
    )


def _kept_train_ids(corpus: Corpus) -> set[str]:
    """Return the ids of the first train rows of their kind that are not held out as well."""
    held_out = (*corpus.split("valid"), *corpus.split("test"))
    seen = {form for example in held_out for form in _forms(example)}
    kept = set()
    for example in corpus.split("train"):
        if seen.isdisjoint(_forms(example)):
            kept.add(example.id)
        seen |= _forms(example)
    return kept


def _forms(example: Example) -> set[str]:
    """Return the forms in which an example may meet itself again: its text, its tokens."""
    return {normalized(example.text), normalized(" ".join(example.tokens))}


def _report(corpus: Corpus, *, dropped: int) -> RepeatReport:
    """Count the repeats of a corpus of which `dropped` rows are removed."""
    pairs = {(normalized(example.text), example.intent) for example in corpus.examples}
    intents = Counter(text for text, _ in pairs)
    train = _texts(corpus, "train")
    return RepeatReport(
        rows=len(corpus.examples),
        distinct_texts=len(intents),
        repeated_rows=len(corpus.examples) - len(intents),
        texts_in_train_and_valid=len(train & _texts(corpus, "valid")),
        test_rows_in_train=sum(normalized(row.text) in train for row in corpus.split("test")),
        texts_with_several_intents=sum(count > 1 for count in intents.values()),
        dropped_train_rows=dropped,
    )


def _texts(corpus: Corpus, split: str) -> set[str]:
    """Return the texts of one split."""
    return {normalized(example.text) for example in corpus.split(split)}
