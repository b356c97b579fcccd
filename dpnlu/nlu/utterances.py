"""Texts to be understood: their tokens, and where these stand in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpnlu.nlu.data.annotation import TOKEN
from dpnlu.nlu.data.assembly import LONGEST_TEXT
from dpnlu.nlu.data.errors import DataError, located
from dpnlu.nlu.data.reading import parse_json

_FORM = '{"text": ...} or {"tokens": [...]}'


@dataclass(frozen=True, slots=True)
class Utterance:
    """A text, its tokens, and the offset in characters at which each of them begins.

    Attributes:
        text: as it was given.
        tokens: at least one; each is found in the text as it stands there.
        starts: one offset per token, rising.
    """

    text: str
    tokens: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The offset behind each token."""
        pairs = zip(self.starts, self.tokens, strict=True)
        return tuple(start + len(token) for start, token in pairs)


def utterance(text: str) -> Utterance:
    """The text, cut into tokens as data that come without tokens are.

    >>> utterance("Wake me  up!")
    Utterance(text='Wake me  up!', tokens=('Wake', 'me', 'up', '!'), starts=(0, 5, 9, 11))

    Raises:
        DataError: the text is blank, too long, or no valid Unicode.
    """
    _check(text)
    found = list(TOKEN.finditer(text))
    return Utterance(text, tuple(m.group() for m in found), tuple(m.start() for m in found))


def utterance_of_tokens(tokens: Sequence[str], *, text: str | None = None) -> Utterance:
    """The tokens, in a text that has all of them in this order.

    Args:
        text: None: the tokens with a blank between any two.

    Raises:
        DataError: there is no token, one is blank or is not found in the text, or the text is no
            text that `utterance` would take.
    """
    if not tokens or not all(token.strip() for token in tokens):
        raise DataError("expected tokens that are not blank, at least one; remove the line.")
    text = " ".join(tokens) if text is None else text
    _check(text)
    starts = []
    place = 0
    for token in tokens:
        start = text.find(token, place)
        if start < 0:
            raise DataError(
                f"expected tokens that follow one another in the text, but '{token}' is not found "
                f"behind character {place}; leave out the text, or the tokens."
            )
        starts.append(start)
        place = start + len(token)
    return Utterance(text, tuple(tokens), tuple(starts))


def utterance_of_line(line: bytes, *, place: str, is_json: bool) -> Utterance:
    """The utterance on one line of UTF-8: a JSON object with `text`, `tokens` or both, or a text.

    Args:
        line: without its end.
        place: where it stands, for messages.
        is_json: whether it must be JSON; else what begins with a brace is.

    Raises:
        DataError: the line is empty or holds neither.
    """
    with located(place):
        text = _decoded(line)
        if not is_json and not text.lstrip().startswith("{"):
            return utterance(text)
    record = parse_json(text, place=place)
    with located(place):
        return _of_record(record)


def _decoded(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected UTF-8 text, got byte 0x{line[error.start]:02x}; save the texts as UTF-8."
        ) from None
    if not text.strip():
        raise DataError("expected a text, got an empty line; remove it.")
    return text


def _of_record(record: object) -> Utterance:
    if not isinstance(record, Mapping):
        raise DataError(f"expected {_FORM}, got {type(record).__name__}; write an object.")
    match record.get("text"), record.get("tokens"):
        case str(text), None:
            return utterance(text)
        case (None | str()) as text, [*tokens] if all(isinstance(t, str) for t in tokens):
            return utterance_of_tokens(tokens, text=text)
    raise DataError(f"expected {_FORM}, got neither a string nor a list of strings; correct it.")


def _check(text: str) -> None:
    """Refuse what is no text, and what no file can hold."""
    if not text.strip():
        raise DataError("expected a text, got a blank one; remove it.")
    if len(text) > LONGEST_TEXT:
        raise DataError(
            f"expected a text of at most {LONGEST_TEXT} characters, got {len(text)}; cut it."
        )
    if text.encode(errors="replace").decode() != text:
        raise DataError("expected valid Unicode, got half a surrogate pair; correct the text.")
