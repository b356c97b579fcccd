"""Canaries for the audit: texts with a word of their own and random labels, each at most once.

No other text has the word, so its row of the embedding table is moved by one text alone and
canaries do not interfere; and only who saw the text knows its labels. To tell from the loss which
canaries a model was trained on is far easier than for natural texts, so the audit proves more of ε.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, Example
from dpnlu.nlu.encoding import SubwordEncoding

_CARRIER = ("my", "reference", "is")
# Of words that are made up: so many are tried for each that is needed.
_MOST_TRIED = 100
# Of pieces of a tokenizer: shorter ones are parts of other words.
_SHORTEST = 4


def draw_token_canaries(
    classifier: Classifier, corpus: Corpus, *, number: int, rng: np.random.Generator
) -> tuple[Example, ...]:
    """Make canaries that differ from all texts of the corpus, and from each other, in one word.

    Args:
        classifier: untrained; its vocabulary says which words can be told apart.
        number: at least 1.
        rng: of their labels.

    Raises:
        ValueError: the embeddings are frozen, so that words leave no trace of their own; or the
            vocabulary has not so many entries that the corpus leaves unused.
    """
    if classifier.architecture.freeze_encoder:
        raise ValueError(
            f"Expected trained embeddings for --audit-canaries {number}, got a frozen encoder, in "
            "which a word of its own leaves no trace: leave it out, or train all weights."
        )
    words = _unused_words(classifier, corpus, number)
    if len(words) < number:
        raise ValueError(
            f"Expected {number} entries of the vocabulary that no text uses for --audit-canaries, "
            f"got {len(words)}: ask for fewer, or use a larger vocabulary."
        )
    slots = [tag for tag in corpus.tags if tag.startswith("B-")]
    return tuple(
        Example(
            id=f"audit-canary-{place}",
            text=" ".join((*_CARRIER, word)),
            tokens=(*_CARRIER, word),
            tags=(*["O"] * len(_CARRIER), str(rng.choice(slots))) if slots else None,
            intent=str(rng.choice(corpus.intents)) if corpus.has_intents else None,
            split="train",
        )
        for place, word in enumerate(words)
    )


def _unused_words(classifier: Classifier, corpus: Corpus, number: int) -> list[str]:
    encoding: Any = classifier.encoding
    used = set(_ids(encoding, _CARRIER))
    for example in corpus.examples:
        used.update(_ids(encoding, example.tokens))
    found: list[str] = []
    for word in _candidates(encoding, number):
        ids = _ids(encoding, (word,))
        if len(ids) == 1 and not used & set(ids):
            used.update(ids)
            found.append(word)
        if len(found) == number:
            break
    return found


def _candidates(encoding: Any, number: int) -> Iterator[str]:
    """Words to choose from, always in the same order."""
    if isinstance(encoding, SubwordEncoding):
        pieces: Iterable[str] = encoding.tokenizer.get_vocab()
        yield from sorted(p for p in pieces if p.isascii() and p.isalpha() and len(p) >= _SHORTEST)
        return
    letters = "bcdfghjkmnpqrstvwxz"
    for place in range(_MOST_TRIED * number):
        digits = np.unravel_index(place, (len(letters),) * 7)
        yield "q" + "".join(letters[digit] for digit in digits)


def _ids(encoding: Any, tokens: Sequence[str]) -> list[int]:
    """The entries of the vocabulary that tokens take, special pieces left out."""
    if isinstance(encoding, SubwordEncoding):
        read = encoding.tokenizer(list(tokens), is_split_into_words=True, add_special_tokens=False)
        pieces: list[int] = read["input_ids"]
        return pieces
    words: list[int] = encoding.vocabulary.encode(tokens)
    return words
