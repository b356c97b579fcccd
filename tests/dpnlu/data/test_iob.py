"""IOB tags against a second library and against the definition."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from seqeval.scheme import IOB2, Entities

from dpnlu.nlu.data.iob import Span, iob2, slot_of, spans, tags_of, violation

TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=8)
ODD_TAGS = st.lists(
    st.sampled_from(["O", "B-a", "I-a", "I-b", "a", "B-", "", "E-a", "o"]), max_size=5
)


def _naively_valid(tags: list[str]) -> bool:
    """Whether the tags are IOB2, by the definition."""
    formed = all(tag == "O" or (tag[:2] in {"B-", "I-"} and len(tag) > 2) for tag in tags)
    pairs = pairwise(["O", *tags])
    return formed and all(
        before != "O" and before[2:] == tag[2:] for before, tag in pairs if tag.startswith("I-")
    )


@given(ODD_TAGS | TAGS)
def test_violation_is_the_end_of_the_longest_valid_beginning(tags: list[str]) -> None:
    lengths = [length for length in range(len(tags) + 1) if _naively_valid(tags[:length])]
    longest = max(lengths)
    assert violation(tags) == (None if longest == len(tags) else longest)


@given(TAGS)
def test_spans_agree_with_seqeval(tags: list[str]) -> None:
    tags = list(iob2(tags))
    entities = Entities([tags], IOB2).entities[0]
    assert spans(tags) == tuple(Span(e.start, e.end, e.tag) for e in entities)


@given(TAGS)
def test_tags_survive_the_way_to_spans_and_back(tags: list[str]) -> None:
    valid = iob2(tags)
    assert tags_of(spans(valid), length=len(valid)) == valid


@given(TAGS)
def test_iob2_is_valid_and_leaves_iob2_alone(tags: list[str]) -> None:
    converted = iob2(tags)
    assert violation(converted) is None
    assert iob2(converted) == converted
    assert [slot_of(tag) for tag in converted] == [slot_of(tag) for tag in tags]
    if violation(tags) is None:
        assert converted == tuple(tags)
