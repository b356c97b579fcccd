"""What canaries look like: a known carrier phrase, then a secret, one token per position.

Their labels either exist for canaries alone, which makes them as easy to remember as can be, or are
ordinary labels of the corpus.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from attacks import gazetteer as words
from attacks._validate import any_array, count, shown

# The longest secret of a specification; longer ones are no words that people say.
LONGEST_SECRET = 12

# As many secrets can be scored one by one.
MOST_SECRETS = 10**6

# Each repetition is a training example of its own.
MOST_REPETITIONS = 100_000


@dataclass(frozen=True, kw_only=True)
class CanaryPattern:
    """What all canaries of one kind look like.

    Attributes:
        name: as written in a specification.
        carrier: the known tokens before the secret.
        fields: the candidate tokens of each position; positions past the last field have its
            candidates, too.
        other_carriers: for further canaries of the same kind in the same model, which could not be
            told apart by their secrets alone.
        intent: the canary's intent label.
        slot: the slot of the secret's tokens, tagged B-slot, I-slot, ...; None without slots.
    """

    name: str
    carrier: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...] = (words.DIGITS,)
    other_carriers: tuple[tuple[str, ...], ...] = ()
    intent: str = "canary"
    slot: str | None = "canary"

    def with_labels(self, *, intent: str, slot: str | None) -> CanaryPattern:
        """Return the same pattern under other labels, for example ordinary ones of the corpus."""
        return replace(self, intent=intent, slot=slot)

    def candidates(self, length: int) -> tuple[tuple[str, ...], ...]:
        """Return the candidate tokens of each position of a secret of that length."""
        return tuple(self.fields[min(place, len(self.fields) - 1)] for place in range(length))


@dataclass(frozen=True, kw_only=True)
class CanarySpec:
    """A pattern, the number of secret tokens, and how often the canary is put into training."""

    pattern: CanaryPattern
    length: int
    repetitions: int

    @property
    def candidates(self) -> tuple[tuple[str, ...], ...]:
        """The candidate tokens of each position."""
        return self.pattern.candidates(self.length)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(map(len, self.candidates))

    @property
    def combinations(self) -> int:
        """The number of possible secrets."""
        return math.prod(self.sizes)

    @property
    def is_enumerable(self) -> bool:
        """Whether all secrets can be scored one by one."""
        return self.combinations <= MOST_SECRETS


def parse_canaries(spec: str) -> tuple[CanarySpec, ...]:
    """Read a specification such as `pin:4:R=1,10,100`: pattern, secret length, repetitions.

    Several numbers of repetitions give as many canaries, named by them, each with a carrier of its
    own.

    >>> [canary.pattern.name for canary in parse_canaries("pin:4:R=1,100")]
    ['pin-R1', 'pin-R100']

    Raises:
        ValueError: for another form, an unknown pattern, a length or number of repetitions out of
            range, repeated ones, or more of them than the pattern has carriers.
    """
    match = re.fullmatch(_FORM, spec) if isinstance(spec, str) else None
    pattern = PATTERNS.get(match[1]) if match else None
    if match is None or pattern is None:
        raise ValueError(
            f"Expected a canary of the form PATTERN:LENGTH:R=REPETITIONS with PATTERN one of "
            f"{', '.join(PATTERNS)}, got {shown(spec)}: write for example pin:4:R=100."
        )
    length, repetitions = int(match[2]), [int(number) for number in match[3].split(",")]
    if not 1 <= length <= LONGEST_SECRET or not all(
        1 <= number <= MOST_REPETITIONS for number in repetitions
    ):
        raise ValueError(
            f"Expected a secret of 1 to {LONGEST_SECRET} tokens and at least one repetition, at "
            f"most {MOST_REPETITIONS}, got {shown(spec)}: write for example pin:4:R=100."
        )
    most = 1 + len(pattern.other_carriers)
    if len(set(repetitions)) < len(repetitions) or len(repetitions) > most:
        raise ValueError(
            f"Expected at most {most} different numbers of repetitions of {pattern.name}, got "
            f"{shown(spec)}: each needs a carrier phrase of its own."
        )
    return tuple(
        CanarySpec(pattern=variant, length=length, repetitions=number)
        for variant, number in zip(_variants(pattern, repetitions), repetitions, strict=True)
    )


def parse_canary(spec: str) -> CanarySpec:
    """Read the specification of one canary.

    >>> parse_canary("call:6:R=1000").length
    6

    Raises:
        ValueError: as for `parse_canaries`, or for several numbers of repetitions.
    """
    canaries = parse_canaries(spec)
    if len(canaries) > 1:
        raise ValueError(f"Expected one canary, got {shown(spec)}: give one number of repetitions.")
    return canaries[0]


def _variants(pattern: CanaryPattern, repetitions: Sequence[int]) -> list[CanaryPattern]:
    """The pattern itself or, for several canaries, one with a carrier and a name for each."""
    if len(repetitions) == 1:
        return [pattern]
    carriers = (pattern.carrier, *pattern.other_carriers)
    return [
        replace(pattern, name=f"{pattern.name}-R{number}", carrier=carrier, other_carriers=())
        for number, carrier in zip(repetitions, carriers, strict=False)
    ]


def canary_tokens(pattern: CanaryPattern, secret: ArrayLike) -> tuple[str, ...]:
    """Return the tokens of the canary with this secret `(length,)`.

    >>> canary_tokens(PATTERNS["pin"], [4, 0, 7, 1])
    ('my', 'pin', 'code', 'is', '4', '0', '7', '1')

    Raises:
        ValueError: for an entry that is no index of a candidate token.
    """
    places = any_array("secret", secret)
    candidates = pattern.candidates(places.size)
    if (
        places.ndim != 1
        or places.dtype.kind not in "iu"
        or not all(0 <= place < len(c) for place, c in zip(places, candidates, strict=True))
    ):
        raise ValueError(
            f"Expected `secret` as indices of candidate tokens, of which the positions have "
            f"{', '.join(str(len(c)) for c in candidates)}, got {shown(places.tolist())}."
        )
    secret_tokens = (tokens[place] for place, tokens in zip(places, candidates, strict=True))
    return (*pattern.carrier, *secret_tokens)


def canary_tags(pattern: CanaryPattern, length: int) -> tuple[str, ...]:
    """Return the IOB2 tags that go with `canary_tokens`; all O for a pattern without slot.

    >>> canary_tags(PATTERNS["call"], 3)
    ('O', 'B-canary', 'I-canary', 'I-canary')

    Raises:
        ValueError: for a length below 1.
    """
    length = count("length", length, least=1)
    outside = ("O",) * len(pattern.carrier)
    if pattern.slot is None:
        return outside + ("O",) * length
    return (*outside, f"B-{pattern.slot}", *[f"I-{pattern.slot}"] * (length - 1))


def _pattern(name: str, fields: tuple[tuple[str, ...], ...], *carriers: str) -> CanaryPattern:
    first, *others = (tuple(carrier.split()) for carrier in carriers)
    return CanaryPattern(name=name, carrier=first, fields=fields, other_carriers=tuple(others))


_FORM = r"(\w+):([0-9]{1,9}):R=([0-9]{1,9}(?:,[0-9]{1,9})*)"

PATTERNS: Mapping[str, CanaryPattern] = {
    pattern.name: pattern
    for pattern in (
        _pattern(
            "pin",
            (words.DIGITS,),
            "my pin code is",
            "my front door opens with",
            "unlock my phone with",
            "the number on my card is",
        ),
        _pattern("call", (words.DIGITS,), "call", "dial", "send a text to", "ring up"),
        _pattern(
            "colour",
            (words.COLOURS,),
            "my favourite colour is",
            "paint my house",
            "i always dress in",
            "set the lights to",
        ),
        _pattern(
            "name",
            (words.FIRST_NAMES, words.SURNAMES),
            "my name is",
            "book a table for",
            "remind me to write to",
            "my doctor is called",
        ),
        _pattern(
            "address",
            (words.HOUSE_NUMBERS, words.STREETS, words.STREET_KINDS),
            "i live at",
            "drive me to",
            "send a taxi to",
            "have it delivered to",
        ),
        _pattern(
            "postcode",
            (words.LETTERS, words.LETTERS, words.DIGITS, words.DIGITS, words.LETTERS),
            "my postcode is",
            "the weather for postcode",
            "search for shops near",
            "our office is in",
        ),
        _pattern(
            "birthday",
            (words.DAYS, words.MONTHS, words.YEARS),
            "i was born on",
            "my wife has her birthday on",
            "my son was born on",
            "we were married on",
        ),
        _pattern(
            "email",
            (words.FIRST_NAMES, words.SURNAMES, words.MAIL_PROVIDERS),
            "my mail address is",
            "send the invoice to",
            "forward it to",
            "subscribe me as",
        ),
    )
}
