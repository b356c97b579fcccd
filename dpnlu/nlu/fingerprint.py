"""Whether a training continues on the data that it was begun with."""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpnlu.nlu.data import Corpus, Example
from dpnlu.nlu.encoding import Encoding, SubwordEncoding, WordEncoding


@dataclass(frozen=True)
class Fingerprint:
    """A keyed digest of texts, labels and vocabulary, in their order.

    Guarantee: the digest alone tells nothing about the data. With the key, whoever guesses all of
    the data can see that the guess is right; both are removed with what else an unfinished training
    keeps.

    Attributes:
        key: 32 random bytes, new for each training, in hexadecimal.
        digest: HMAC-SHA256, likewise.
    """

    key: str
    digest: str

    @classmethod
    def take(
        cls, corpus: Corpus, encoding: Encoding, beside: Sequence[Example] = ()
    ) -> Fingerprint:
        """The fingerprint of what is about to be trained on, with a new key.

        Args:
            beside: other examples that every step learns from.
        """
        key = secrets.token_hex(32)
        return cls(key, _digest(key, corpus, encoding, beside))

    def matches(self, corpus: Corpus, encoding: Encoding, beside: Sequence[Example] = ()) -> bool:
        """Whether these are the data it was taken of."""
        return hmac.compare_digest(self.digest, _digest(self.key, corpus, encoding, beside))


def _digest(key: str, corpus: Corpus, encoding: Encoding, beside: Sequence[Example]) -> str:
    found = hmac.new(bytes.fromhex(key), digestmod="sha256")
    for part in _parts(corpus, encoding, beside):
        found.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def _parts(corpus: Corpus, encoding: Encoding, beside: Sequence[Example]) -> Iterator[Any]:
    """All that decides what the model is trained and measured on, as JSON.

    Not the groups: they decide neither, and data may name them after the training began.
    """
    yield asdict(encoding.labels)
    if isinstance(encoding, WordEncoding):
        yield encoding.vocabulary.to_dict()
    elif isinstance(encoding, SubwordEncoding):
        yield encoding.tokenizer.get_vocab()
    for example in (*corpus.examples, *beside):
        yield {name: value for name, value in asdict(example).items() if name != "group"}
