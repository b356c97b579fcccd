"""Slot tags in the IOB2 scheme, and the token spans they stand for.

IOB2: `O` outside every slot, `B-<slot>` on a slot's first token, `I-<slot>` on its other tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A slot over the tokens `start` (included) to `end` (excluded)."""

    start: int
    end: int
    slot: str


def slot_of(tag: str) -> str | None:
    """Return the slot that an IOB tag names, None for `O`."""
    return None if tag == "O" else tag[2:]


def violation(tags: Sequence[str]) -> int | None:
    """Return the first position at which `tags` are not IOB2, None where they are.

    Args:
        tags: One tag per token.

    Returns:
        The position, counted from 0, of a tag of another form, or of an `I-x` that follows
        neither `B-x` nor `I-x`.
    """
    previous = "O"
    for position, tag in enumerate(tags):
        if not _well_formed(tag) or (tag.startswith("I-") and not _continues(tag, previous)):
            return position
        previous = tag
    return None


def iob2(tags: Iterable[str]) -> tuple[str, ...]:
    """Return IOB1 tags as IOB2: an `I-x` that continues no slot becomes `B-x`.

    IOB2 tags come back unchanged, and so do tags of any other form.

    >>> iob2(["I-city", "I-city", "O", "I-date"])
    ('B-city', 'I-city', 'O', 'B-date')
    """
    converted = []
    previous = "O"
    for tag in tags:
        starts = tag.startswith("I-") and not _continues(tag, previous)
        previous = f"B-{tag[2:]}" if starts else tag
        converted.append(previous)
    return tuple(converted)


def spans(tags: Sequence[str]) -> tuple[Span, ...]:
    """Return the slots that IOB2 `tags` mark, from left to right.

    Args:
        tags: Valid IOB2 tags (`violation` is None).
    """
    starts = [position for position, tag in enumerate(tags) if tag.startswith("B-")]
    return tuple(Span(start, _end(tags, start=start), tags[start][2:]) for start in starts)


def tags_of(slots: Iterable[Span], *, length: int) -> tuple[str, ...]:
    """Return the IOB2 tags of `length` tokens that carry the given slots; inverse of `spans`.

    Args:
        slots: Non-empty spans inside the text that do not overlap.
        length: Number of tokens.
    """
    tags = ["O"] * length
    for span in slots:
        inside = [f"I-{span.slot}"] * (span.end - span.start - 1)
        tags[span.start : span.end] = [f"B-{span.slot}", *inside]
    return tuple(tags)


def _well_formed(tag: str) -> bool:
    """Whether the tag is `O`, or `B-` or `I-` with a slot's name."""
    return tag == "O" or (tag[:2] in ("B-", "I-") and bool(tag[2:].strip()))


def _continues(tag: str, previous: str) -> bool:
    """Whether the `I-` tag goes on with the slot of the tag before it."""
    return previous in (f"B-{tag[2:]}", f"I-{tag[2:]}")


def _end(tags: Sequence[str], *, start: int) -> int:
    """Return the position after the last token of the slot that begins at `start`."""
    inside = f"I-{tags[start][2:]}"
    end = start + 1
    while end < len(tags) and tags[end] == inside:
        end += 1
    return end
