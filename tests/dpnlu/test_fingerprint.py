"""Other data have another fingerprint, and a fingerprint without its key says nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpnlu.nlu.classifier import Architecture, build
from dpnlu.nlu.data import Corpus, Example, HashedVocabulary, WordList
from dpnlu.nlu.encoding import Encoding, Labels, WordEncoding
from dpnlu.nlu.fingerprint import Fingerprint


def _example(split: str, number: int, intent: str) -> Example:
    return Example(
        id=f"{split}-{number}",
        text=f"play {number}",
        tokens=("play", str(number)),
        tags=("O", "B-what"),
        intent=intent,
        split=split,
    )


CORPUS = Corpus(
    name="c",
    examples=tuple(
        _example(split, number, intent)
        for split in ("train", "test")
        for number, intent in enumerate(("ask", "tell", "ask"))
    ),
)
LABELS = Labels(CORPUS.intents, CORPUS.tags)
ENCODING = WordEncoding(LABELS, WordList(words=("play", "stop"), is_public=True))


def _with_first(**changed: object) -> Corpus:
    first, *others = CORPUS.examples
    return replace(CORPUS, examples=(replace(first, **changed), *others))  # type: ignore[arg-type]


def _with_words(*words: str) -> Encoding:
    return WordEncoding(LABELS, WordList(words=words, is_public=True))


def test_groups_are_no_part_of_it() -> None:
    """They are read for evaluation only, and a training begun without them is resumed."""
    found = Fingerprint.take(CORPUS, ENCODING)
    assert found.matches(_with_first(group="north"), ENCODING)
    assert not found.matches(_with_first(user="u1"), ENCODING)


OTHERS: dict[str, tuple[Corpus, Encoding]] = {
    "another text": (_with_first(text="play 9", tokens=("play", "9")), ENCODING),
    "other tokens": (_with_first(tokens=("pla", "y0")), ENCODING),
    "other tags": (_with_first(tags=("O", "O")), ENCODING),
    "another label": (_with_first(intent="tell"), ENCODING),
    "an intent renamed": (CORPUS, replace(ENCODING, labels=Labels(("ask", "say"), LABELS.tags))),
    "another order": (replace(CORPUS, examples=CORPUS.examples[::-1]), ENCODING),
    "one example less": (replace(CORPUS, examples=CORPUS.examples[:-1]), ENCODING),
    "a word list in another order": (CORPUS, _with_words("stop", "play")),
    "a longer word list": (CORPUS, _with_words("play", "stop", "go")),
    "another kind of vocabulary": (CORPUS, WordEncoding(LABELS, HashedVocabulary(9))),
}


@pytest.mark.parametrize("change", OTHERS)
def test_other_data_are_noticed(change: str) -> None:
    taken = Fingerprint.take(CORPUS, ENCODING)
    assert taken.matches(CORPUS, ENCODING)
    assert not taken.matches(*OTHERS[change])


def test_the_digest_alone_tells_nothing_of_the_data() -> None:
    """Its key is new each time: who guesses the data cannot see that the guess is right."""
    one, two = (Fingerprint.take(CORPUS, ENCODING) for _ in range(2))
    assert one.digest != two.digest and one.key != two.key and len(bytes.fromhex(one.key)) == 32


def test_another_tokenizer_is_noticed(tiny_encoder: Path) -> None:
    def encoding(*new: str) -> Any:
        architecture = Architecture(name=f"encoder:{tiny_encoder}")
        made: Any = build(architecture, LABELS, HashedVocabulary(9)).encoding
        made.tokenizer.add_tokens(list(new))
        return made

    taken = Fingerprint.take(CORPUS, encoding())
    assert taken.matches(CORPUS, encoding())
    assert not taken.matches(CORPUS, encoding("another"))
