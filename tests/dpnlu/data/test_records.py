"""What an `Example` and a `Corpus` refuse, and which labels a corpus has."""

from dataclasses import replace
from typing import Any

import pytest

from dpnlu.nlu.data import Corpus, DataError, Example, normalized


def example(name: str = "train-00000", **changes: Any) -> Example:
    """Return an example, valid but for the changes."""
    fields: dict[str, Any] = {
        "id": name,
        "text": "wake me up at five",
        "tokens": ("wake", "me", "up", "at", "five"),
        "tags": ("O", "O", "O", "O", "B-time"),
        "intent": "alarm",
        "split": name.split("-")[0],
    }
    return Example(**(fields | changes))


EXAMPLES = (example(), example("train-00001", intent="music"), example("test-00000"))
ONE_INTENT = (example(tags=None), example("test-00000", tags=None))
NOTHING = tuple(example(f"{split}-0", intent=None, tags=("O",) * 5) for split in ("train", "test"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "  "}, "non-empty text"),
        ({"intent": ""}, "non-empty intent"),
        ({"group": " "}, "non-empty group, got a blank one; fill it in or leave it out"),
        ({"group": "\ud83c"}, "valid Unicode"),
        ({"tokens": (), "tags": ()}, "at least one token"),
        ({"tokens": ("a", " "), "tags": None}, "blank one at position 1"),
        ({"tags": ("O",)}, "1 tags for 5 tokens"),
        ({"tags": ("O", "O", "I-x", "O", "O")}, "'I-x' at position 2"),
        ({"tags": ("O", "O", "O", "O", "time")}, "'time' at position 4"),
        ({"split": "dev"}, "got 'dev'"),
        ({"text": "half \ud83c"}, "valid Unicode, got 'half"),
        ({"intent": "\ud83c"}, "valid Unicode"),
        ({"tokens": ("\udfff",), "tags": None}, "valid Unicode"),
        ({"tags": ("O", "O", "O", "O", "B-\udfff")}, "valid Unicode"),
    ],
)
def test_example_names_its_id_and_the_fault(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"Example train-00000: .*{message}"):
        example(**changes)


def test_example_needs_an_id() -> None:
    with pytest.raises(DataError, match="non-empty id"):
        example(id=" ")


@pytest.mark.parametrize(
    ("examples", "changes", "message"),
    [
        ((), {}, "one row in train"),
        (EXAMPLES[2:], {}, "one row in train"),
        (EXAMPLES[:2], {}, "one row in test"),
        (ONE_INTENT, {}, "two intents in train, or a slot, got only 'alarm' and no slot"),
        (NOTHING, {}, "two intents in train, or a slot, got none and no slot"),
        ((*EXAMPLES, example("test-00001", intent=None)), {}, "train-00000 and test-00001"),
        ((*EXAMPLES, EXAMPLES[0]), {}, "unique ids, got 'train-00000' 2 times"),
        ((*EXAMPLES, example("test-00001", tags=None)), {}, "train-00000 and test-00001"),
        (EXAMPLES, {"declared_intents": ("alarm",)}, "declared intents, got 'music'"),
        (EXAMPLES, {"declared_slots": ("date",)}, "declared slots, got 'time'"),
    ],
)
def test_corpus_names_itself_and_the_fault(
    examples: tuple[Example, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"Corpus home: .*{message}"):
        Corpus(name="home", examples=examples, **changes)


def test_splits_are_disjoint_ordered_and_complete() -> None:
    corpus = Corpus(name="home", examples=(EXAMPLES[2], *EXAMPLES[:2]))
    assert corpus.split("train") == EXAMPLES[:2]
    assert corpus.split("valid") == ()
    assert corpus.split("test") == EXAMPLES[2:]
    with pytest.raises(DataError, match="got 'dev'"):
        corpus.split("dev")


def test_labels_that_occur_first_in_test_are_known() -> None:
    late = example("test-00001", intent="zoo", tags=("B-a", "I-a", "O", "O", "O"))
    corpus = Corpus(name="home", examples=(*EXAMPLES, late))
    assert corpus.intents == ("alarm", "music", "zoo")
    assert corpus.slots == ("a", "time")
    assert corpus.tags == ("B-a", "B-time", "I-a", "I-time", "O")


def test_declared_labels_go_before_observed_ones() -> None:
    corpus = Corpus(
        name="home",
        examples=EXAMPLES,
        declared_intents=("weather", "music", "alarm"),
        declared_slots=("time", "city"),
    )
    assert corpus.intents == ("alarm", "music", "weather")
    assert corpus.tags == ("B-city", "B-time", "I-city", "I-time", "O")


def test_corpus_without_slots_has_no_tags() -> None:
    corpus = Corpus(name="home", examples=tuple(replace(row, tags=None) for row in EXAMPLES))
    assert not corpus.has_slots
    assert corpus.tags == corpus.slots == ()


@pytest.mark.parametrize(
    ("intents", "slots", "tagged", "public"),
    [
        (None, None, True, False),
        (("alarm", "music"), None, True, False),
        (None, ("time",), True, False),
        (("alarm", "music"), ("time",), True, True),
        (("alarm", "music"), None, False, True),
    ],
)
def test_labels_are_public_only_if_all_are_declared(
    intents: tuple[str, ...] | None, slots: tuple[str, ...] | None, tagged: bool, public: bool
) -> None:
    examples = EXAMPLES if tagged else tuple(replace(row, tags=None) for row in EXAMPLES)
    corpus = Corpus(name="home", examples=examples, declared_intents=intents, declared_slots=slots)
    assert corpus.labels_are_public is public


def test_normalized() -> None:
    assert normalized("  Wake\tME\n up ") == "wake me up"
