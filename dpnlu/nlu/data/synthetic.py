"""A corpus grown from a grammar: any size, no licence, no personal data, public label sets.

It is meant to be learnt about as well as real data, which is not perfectly: some requests are
ambiguous, some labels are wrong, and some phrasings and most names are rare enough to be memorised.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

from dpnlu.nlu.data.annotation import Segment, inline_segments, tagged, text_of
from dpnlu.nlu.data.assembly import Row, assembled
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.grammar import AMBIGUITIES, CLOSINGS, INTENTS, OPENINGS, PHRASES, SLOTS
from dpnlu.nlu.data.records import Corpus, normalized

DEFAULT_SIZE = 2_000
# One row of every intent must fit into train, which takes four fifths of the rows.
MIN_SIZE = 20
# The grammar has not much more to say: beyond, utterances that are new become rare.
MAX_SIZE = 1_000_000

AMBIGUOUS_SHARE = 0.01
RARE_SHARE = 0.10
POLITE_SHARE = 0.30
WRONG_INTENT_SHARE = 0.015
MISSED_SLOT_SHARE = 0.02

SLOT = re.compile(r"\[(\w+)\]")
ALTERNATIVES = re.compile(r"\{([^{}]*)\}")
PHRASE = re.compile(r"<(\w+)>")

T = TypeVar("T")


def synthetic_corpus(size: int, *, seed: int = 0) -> Corpus:
    """Grow a corpus of `size` different utterances with intents and slots.

    Guarantee: the same on every machine and in every Python for the same arguments; no text occurs
    twice in the whole corpus; every intent occurs in train; 80/10/10 are train, valid and test.

    Args:
        size: Number of utterances in all splits together; 20 to a million.
        seed: Decides which; a non-negative integer.

    Raises:
        DataError: `size` is too small or too large.
    """
    if size < MIN_SIZE:
        raise DataError(
            f"Expected a synthetic corpus of at least {MIN_SIZE} rows, got {size}; ask for more."
        )
    if size > MAX_SIZE:
        raise DataError(
            f"Expected a synthetic corpus of at most {MAX_SIZE} rows, got {size}; ask for fewer."
        )
    held_out = size // 10
    splits = ["train"] * (size - 2 * held_out) + ["valid"] * held_out + ["test"] * held_out
    utterances = _utterances(random.Random(seed))
    rows = [
        _row(next(utterances), split=split, place=f"synthetic row {number}")
        for number, split in enumerate(splits, start=1)
    ]
    return assembled(
        rows,
        name="synthetic",
        source="synthetic",
        declared_intents=tuple(sorted(INTENTS)),
        declared_slots=SLOTS,
    )


def _row(utterance: tuple[list[Segment], str], *, split: str, place: str) -> Row:
    """Return the row of an utterance and its intent."""
    segments, intent = utterance
    tokens, tags = tagged(segments)
    return Row(
        place=place, text=text_of(segments), intent=intent, split=split, tokens=tokens, tags=tags
    )


def _utterances(rng: random.Random) -> Iterator[tuple[list[Segment], str]]:
    """Yield different utterances with their intents for ever."""
    seen: set[str] = set()
    for carrier, intent in _requests(rng):
        segments = _segments(carrier, rng)
        text = normalized(text_of(segments))
        if text not in seen:
            seen.add(text)
            yield segments, intent


def _requests(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield carrier phrases with the intents that annotators give them for ever."""
    # Train comes first, so one clear request of every intent at the start puts all of them there.
    for intent, carriers in INTENTS.items():
        yield carriers.common[0], intent
    while True:
        yield _request(rng)


def _request(rng: random.Random) -> tuple[str, str]:
    """Return a carrier phrase and its intent: ambiguous, rare or wrong at times."""
    if rng.random() < AMBIGUOUS_SHARE:
        ambiguity = _pick(AMBIGUITIES, rng)
        return _pick(ambiguity.carriers, rng), _pick(ambiguity.intents, rng)
    intent = _pick(tuple(INTENTS), rng)
    carriers = INTENTS[intent]
    carrier = _pick(carriers.rare if rng.random() < RARE_SHARE else carriers.common, rng)
    if rng.random() < WRONG_INTENT_SHARE:
        intent = _pick([other for other in INTENTS if other != intent], rng)
    return carrier, intent


def _segments(carrier: str, rng: random.Random) -> list[Segment]:
    """Return a carrier phrase filled in, with courtesies around it and a slot missed at times."""
    opening = f"{_pick(OPENINGS, rng)} " if rng.random() < POLITE_SHARE / 2 else ""
    closing = f" {_pick(CLOSINGS, rng)}" if rng.random() < POLITE_SHARE / 2 else ""
    segments = inline_segments(_grown(SLOT.sub(r"[\1 : <\1>]", opening + carrier + closing), rng))
    marked = [position for position, segment in enumerate(segments) if segment.slot]
    if marked and rng.random() < MISSED_SLOT_SHARE:
        missed = _pick(marked, rng)
        segments[missed] = Segment(segments[missed].text)
    return segments


def _grown(pattern: str, rng: random.Random) -> str:
    """Return a phrase of the grammar's notation; inner alternatives are decided first."""
    while "{" in pattern or "<" in pattern:
        pattern = ALTERNATIVES.sub(lambda match: _pick(match[1].split("|"), rng), pattern)
        pattern = PHRASE.sub(lambda match: _pick(PHRASES[match[1]], rng), pattern)
    return pattern


def _pick(options: Sequence[T], rng: random.Random) -> T:
    """Return one of the options."""
    # random() alone is promised to yield the same numbers in every Python; choice() is not.
    return options[int(rng.random() * len(options))]
