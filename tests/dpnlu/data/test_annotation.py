"""Segments, tokens and tags."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnlu.nlu.data.annotation import (
    Segment,
    character_segments,
    inline_segments,
    tagged,
    text_of,
    tokenize,
)
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.iob import spans, violation
from dpnlu.nlu.data.snips import tokenize_snips

WORDS = st.text(alphabet="abé 1'’.,!", min_size=1, max_size=8).filter(str.strip)
SLOTS = st.sampled_from(["time", "place_name", "a-b"])
SEGMENTS = st.lists(st.tuples(WORDS, st.none() | SLOTS), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("don't", ["don't"]),
        ("rock’n’roll!", ["rock’n’roll", "!"]),
        ("'life is good'", ["'", "life", "is", "good", "'"]),
        ("at 5:30, é_1", ["at", "5", ":", "30", ",", "é_1"]),
        (" \t\n", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@given(st.text())
def test_tokens_without_blanks_are_the_text_without_blanks(text: str) -> None:
    assert "".join(tokenize(text)) == re.sub(r"\s", "", text)


@pytest.mark.parametrize(
    ("annotated", "segments"),
    [
        ("wake me", [Segment("wake me")]),
        ("[time : five am]", [Segment("five am", "time")]),
        (
            "[time:5:30] [date :  now ]",
            [Segment("5:30", "time"), Segment(" "), Segment("now", "date")],
        ),
        ("add [event] at [time : 5", [Segment("add [event] at [time : 5")]),
        ("[note this : x]", [Segment("[note this : x]")]),
        ("[time : ] x", [Segment(" x")]),
        ("", []),
    ],
)
def test_inline_slots(annotated: str, segments: list[Segment]) -> None:
    assert inline_segments(annotated) == segments


@pytest.mark.parametrize("beginning", ["[", "[time", "[time ", "[time :", "[time : five", "[ : "])
@pytest.mark.parametrize("filling", [" ", "\t\n", "[", "a", ":", " a", "[a :"])
def test_a_slot_that_never_ends_takes_linear_time(beginning: str, filling: str) -> None:
    """With 50 000 blanks a cubic search takes hours, a quadratic one minutes."""
    text = beginning + filling * 50_000
    assert inline_segments(text) == [Segment(text)]


@given(st.text(alphabet="[]: ab\t\u2003", max_size=30))
def test_inline_slots_are_those_of_a_search_that_gives_back(text: str) -> None:
    slots = re.findall(r"\[\s*([^\s\[\]:]+)\s*:\s*([^\[\]]*?)\s*\]", text)
    found = [(piece.slot, piece.text) for piece in inline_segments(text) if piece.slot]
    assert found == [(slot, value) for slot, value in slots if value]


@given(SEGMENTS)
def test_inline_annotation_survives_writing_and_parsing(
    pieces: list[tuple[str, str | None]],
) -> None:
    written = "".join(text if slot is None else f"[{slot} : {text}]" for text, slot in pieces)
    slots = [Segment(text.strip(), slot) for text, slot in pieces if slot is not None]
    parsed = inline_segments(written)
    assert [piece for piece in parsed if piece.slot is not None] == slots
    assert "".join(piece.text for piece in parsed if piece.slot is None) == "".join(
        text for text, slot in pieces if slot is None
    )


@given(SEGMENTS)
def test_each_slot_becomes_one_span_with_its_own_tokens(
    pieces: list[tuple[str, str | None]],
) -> None:
    segments = [Segment(text, slot) for text, slot in pieces]
    tokens, tags = tagged(segments)
    assert len(tokens) == len(tags)
    assert violation(tags) is None
    marked = [(span.slot, list(tokens[span.start : span.end])) for span in spans(tags)]
    assert marked == [(piece.slot, tokenize(piece.text)) for piece in segments if piece.slot]
    assert "".join(tokens) == re.sub(r"\s", "", text_of(segments))


def test_a_slot_without_tokens_leaves_no_tag() -> None:
    segments = [Segment("well"), Segment("?!", "x"), Segment("now", "time")]
    assert tagged(segments, tokenizer=tokenize_snips) == (("well", "now"), ("O", "B-time"))


@given(SEGMENTS)
def test_character_spans_mean_the_same_as_segments(pieces: list[tuple[str, str | None]]) -> None:
    edges, slots = 0, []
    for text, slot in pieces:
        if slot is not None:
            slots.append((edges, edges + len(text), slot))
        edges += len(text)
    cut = character_segments("".join(text for text, _ in pieces), slots=reversed(slots))
    # Neighbouring pieces outside slots have no edge between them in a list of spans.
    merged: list[Segment] = []
    for text, slot in pieces:
        if slot is None and merged and merged[-1].slot is None:
            merged[-1] = Segment(merged[-1].text + text)
        else:
            merged.append(Segment(text, slot))
    assert cut == merged


@pytest.mark.parametrize(
    "wrong", [[(2, 2, "x")], [(0, 9, "x")], [(0, 3, "x"), (2, 4, "y")], [(-1, 2, "x")]]
)
def test_character_spans_that_cannot_be(wrong: list[tuple[int, int, str]]) -> None:
    with pytest.raises(DataError, match=r"lie apart within 5 characters, got [xy] at"):
        character_segments("abcde", slots=wrong)
