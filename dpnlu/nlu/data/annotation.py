"""Annotated text cut into segments, and segments into tokens with tags.

All formats that mark slots in the text itself meet here: each becomes a list of segments, and a
segment's edges are token edges, so that a slot never covers half a token.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dpnlu.nlu.data.errors import DataError

TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
# Every repetition takes all it can and gives nothing back, so that the time is linear in the text.
INLINE_SLOT = re.compile(r"\[\s*+([^\s\[\]:]++)\s*+:([^\[\]]*+)\]")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an utterance, inside one slot or (None) outside every slot."""

    text: str
    slot: str | None = None


def tokenize(text: str) -> list[str]:
    """Return words (with inner apostrophes) and single signs; case is kept, blanks vanish.

    >>> tokenize("Don't wake me at 5:30!")
    ["Don't", 'wake', 'me', 'at', '5', ':', '30', '!']
    """
    return TOKEN.findall(text)


def inline_segments(annotated: str) -> list[Segment]:
    """Cut text with inline slots such as `wake me at [time : five am]` into segments.

    Brackets that are not of the form `[slot : value]` are ordinary text.

    >>> inline_segments("wake me [time : now]")
    [Segment(text='wake me ', slot=None), Segment(text='now', slot='time')]
    """
    pieces = INLINE_SLOT.split(annotated)
    outside = [Segment(text) for text in pieces[::3]]
    slots = [
        Segment(text.strip(), slot) for slot, text in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    ordered = [piece for pair in zip(outside, slots, strict=False) for piece in pair]
    return [piece for piece in [*ordered, outside[-1]] if piece.text]


def character_segments(text: str, *, slots: Iterable[tuple[int, int, str]]) -> list[Segment]:
    """Cut `text` into segments at slots given as character spans.

    Args:
        text: The utterance.
        slots: (start, end, slot) with `end` excluded, in any order.

    Raises:
        DataError: a span is empty, leaves the text or overlaps another one.
    """
    segments = []
    done = 0
    for start, end, slot in sorted(slots):
        if not done <= start < end <= len(text):
            raise DataError(
                f"Expected slots that lie apart within {len(text)} characters, got {slot} "
                f"at {start}:{end}; correct the span."
            )
        segments += [Segment(text[done:start]), Segment(text[start:end], slot)]
        done = end
    return [piece for piece in [*segments, Segment(text[done:])] if piece.text]


def text_of(segments: Iterable[Segment]) -> str:
    """Return the text of the segments, white space collapsed."""
    return " ".join("".join(segment.text for segment in segments).split())


def tagged(
    segments: Iterable[Segment], *, tokenizer: Callable[[str], list[str]] = tokenize
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tokens of the segments and their IOB2 tags, two tuples of one length.

    Args:
        segments: The utterance, from left to right.
        tokenizer: Cuts one segment's text into tokens.
    """
    tokens: list[str] = []
    tags: list[str] = []
    for segment in segments:
        new = tokenizer(segment.text)
        tokens += new
        tags += _tags(len(new), slot=segment.slot)
    return tuple(tokens), tuple(tags)


def _tags(count: int, *, slot: str | None) -> list[str]:
    """Return the tags of a segment of `count` tokens."""
    if slot is None:
        return ["O"] * count
    return [f"B-{slot}", *[f"I-{slot}"] * (count - 1)][:count]
