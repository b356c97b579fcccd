"""What one model says: all that attacks are given, and how it is kept in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attacks.canaries import all_secrets
from attacks.dropout import common_dropout, has_dropout
from attacks.farm import Arrays
from attacks.inversion import Extraction
from attacks.patterns import CanarySpec
from attacks.rounding import rounded
from attacks.signals import Predictions, Signals, collect
from dpnlu.compare import answering
from dpnlu.compare.inverting import unredacted
from dpnlu.compare.study import canary_example
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Encoded, batches, encode_all
from dpnlu.nlu.metrics import Answers
from dpnlu.nlu.models import Batch, device_of, moved

_BATCH_SIZE = 256

# Of a model with dropout: the secrets it is asked about once more, all in one batch, and under how
# many masks. With 400 masks the ranks still moved from draw to draw, with 800 they stayed.
_LIKELIEST, _MASKS = 100, 1000

# Names in files.
_ACCURACY, _SECONDS, _LOSSES, _SECRET = "intent_accuracy", "train_seconds", "-losses", "-secret"
_GUESS, _SCORES = "-guess-", "-scores"
_TOKEN_LOSSES = "token_canary_loss"

# Of so many secrets drawn at random losses are read where there are too many to read them all.
_SAMPLE = 5000


@dataclass(frozen=True, kw_only=True)
class CanaryReading:
    """What a model says about the canaries of one pattern.

    Attributes:
        losses: (C,) by which it ranks C secrets: all, in lexicographic order, or, where there are
            too many, its own and a random sample.
        secret: (length,) what it was trained with, as indices of tokens.
        guesses: (length,) what each search recovered, by the name of its method; empty: none was
            asked for.
        scores: (length, V) the loss with each candidate in each position, the others as in the last
            guess; NaN past the last candidate. None without guesses.
    """

    losses: NDArray[np.float64]
    secret: NDArray[np.int64]
    guesses: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    scores: NDArray[np.float64] | None = None

    def to_arrays(self, name: str) -> Arrays:
        """The reading, for files, under the name of its pattern."""
        arrays: Arrays = {name + _LOSSES: self.losses, name + _SECRET: self.secret}
        arrays |= {name + _GUESS + method: guess for method, guess in self.guesses.items()}
        return arrays if self.scores is None else arrays | {name + _SCORES: self.scores}

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, NDArray[Any]]) -> CanaryReading:
        """The reading that `to_arrays` described; KeyError where an array is missing."""
        start = name + _GUESS
        return cls(
            losses=arrays[name + _LOSSES],
            secret=arrays[name + _SECRET],
            guesses={k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)},
            scores=arrays.get(name + _SCORES),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model says.

    Attributes:
        signals: on the audit examples.
        intent_accuracy: on the test examples; None without intents.
        canaries: by the name of their pattern.
        train_seconds: wall time of its training; None: not of interest here.
        token_losses: (t,) on the canaries of the audit; None: there are none.
        answers: to the test texts; None: an earlier version read the model, and kept none.
    """

    signals: Signals
    intent_accuracy: float | None
    canaries: Mapping[str, CanaryReading]
    train_seconds: float | None = None
    token_losses: NDArray[np.float64] | None = None
    answers: Answers | None = None

    def to_arrays(self) -> Arrays:
        """The reading, for files."""
        arrays: Arrays = dict(self.signals.to_arrays())
        if self.answers is not None:
            arrays |= answering.to_arrays(self.answers)
        if self.intent_accuracy is not None:
            arrays[_ACCURACY] = np.array(self.intent_accuracy)
        for name, canary in self.canaries.items():
            arrays |= canary.to_arrays(name)
        if self.train_seconds is not None:
            arrays[_SECONDS] = np.array(self.train_seconds)
        if self.token_losses is not None:
            arrays[_TOKEN_LOSSES] = self.token_losses
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Reading:
        """The reading that `to_arrays` described.

        Raises:
            ValueError: an array is missing.
        """
        patterns = [name.removesuffix(_LOSSES) for name in arrays if name.endswith(_LOSSES)]
        known = [signal.name for signal in fields(Signals) if signal.name in arrays]
        try:
            return cls(
                signals=Signals(**{name: arrays[name] for name in known}),
                intent_accuracy=float(arrays[_ACCURACY]) if _ACCURACY in arrays else None,
                canaries={name: CanaryReading.from_arrays(name, arrays) for name in patterns},
                train_seconds=float(arrays[_SECONDS]) if _SECONDS in arrays else None,
                token_losses=arrays.get(_TOKEN_LOSSES),
                answers=answering.from_arrays(arrays),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Expected the arrays of one model's reading, got {', '.join(arrays)}: {error}; "
                "remove the file to have it made anew."
            ) from None


def read_signals(
    classifier: Classifier, examples: Sequence[Example], *, decimals: int | None = None
) -> Signals:
    """What a classifier says about examples.

    Args:
        decimals: to which its probabilities are seen; None: all.
    """
    encoded = encode_all(classifier.encoding, examples)
    return _signals(classifier, encoded, decimals)


def read_canary(
    classifier: Classifier,
    canary: CanarySpec,
    secret: NDArray[np.int64],
    *,
    extracted: Mapping[str, Extraction],
    decimals: int | None = None,
) -> CanaryReading:
    """What a classifier says about its canary.

    Args:
        secret: (length,) its own.
        extracted: what searches recovered, by method.
        decimals: to which its probabilities are seen; None: all.
    """
    if canary.is_enumerable:
        losses = read_canary_losses(classifier, canary, decimals=decimals)
    else:
        sample = np.random.default_rng(0).integers(canary.sizes, size=(_SAMPLE, canary.length))
        losses = _losses_of(classifier, canary, np.concatenate((secret[None], sample)), decimals)
    *_, last = (None, *extracted.values())
    return CanaryReading(
        losses=losses,
        secret=secret,
        guesses={method: np.array(found.choices) for method, found in extracted.items()},
        scores=None if last is None else _padded(last.scores),
    )


def _padded(scores: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    table = np.full((len(scores), max(map(len, scores))), np.nan)
    for row, found in zip(table, scores, strict=True):
        row[: len(found)] = found
    return table


def read_canary_losses(
    classifier: Classifier, canary: CanarySpec, *, decimals: int | None = None
) -> NDArray[np.float64]:
    """The loss on the canary with each possible secret, (C,) in lexicographic order.

    The classifier ranks the secrets by it.

    Where the secret is a slot, it is the loss of the tags alone (Parikh et al., 2022): the carrier
    phrase has settled the intent before a secret is read, so that its loss says little of the
    secret and blurs the ranking. The likeliest secrets of a model trained with dropout come first,
    in the order of their mean loss under dropout, which is what training made small; not if only
    rounded probabilities are seen.
    """
    secrets = all_secrets(canary.length, candidates=canary.sizes)
    losses = _losses_of(classifier, canary, secrets, decimals)
    if decimals is not None or not has_dropout(classifier.model):
        return losses
    likeliest = losses.argsort(kind="stable")[:_LIKELIEST]
    masks = torch.Generator().manual_seed(0)
    with common_dropout(classifier.model, generator=masks):
        under_each = islice(_losses(classifier, canary, secrets[likeliest], None), _MASKS)
        under_dropout = np.mean(list(under_each), axis=0)
    # The others follow, in their order and with their ties.
    _, order = np.unique(losses, return_inverse=True)
    ranking: NDArray[np.float64] = under_dropout.max() + 1.0 + order
    ranking[likeliest] = under_dropout
    return ranking


def _losses_of(
    classifier: Classifier, canary: CanarySpec, secrets: NDArray[np.int64], decimals: int | None
) -> NDArray[np.float64]:
    """The loss on the canary with each of these secrets (C, length), in evaluation mode."""
    pieces = np.array_split(secrets, max(1, len(secrets) // 2000))
    return np.concatenate([next(_losses(classifier, canary, piece, decimals)) for piece in pieces])


def _losses(
    classifier: Classifier, canary: CanarySpec, secrets: NDArray[np.int64], decimals: int | None
) -> Iterator[NDArray[np.float64]]:
    """The loss on the canary with each of these secrets, read again and again."""
    classifier = unredacted(classifier)
    with_slots = bool(classifier.encoding.labels.tags)
    examples = [
        canary_example(canary, secret, name="candidate", with_slots=with_slots)
        for secret in secrets
    ]
    encoded = encode_all(classifier.encoding, examples)
    while True:
        signals = _signals(classifier, encoded, decimals)
        by_tags = signals.slot_loss if canary.pattern.slot is not None else None
        yield signals.loss if by_tags is None else by_tags


def _signals(classifier: Classifier, encoded: Sequence[Encoded], decimals: int | None) -> Signals:
    model: Any = classifier.model

    def predict(batch: Batch) -> Predictions:
        batch = moved(batch, device_of(model))
        outputs = model(batch)
        # The loss of these logits is the one that was trained, a chain's included.
        tags = outputs.tags_given(batch)
        said = Predictions(outputs.intents, batch.get("intents"), tags, batch.get("tags"))
        return said if decimals is None else rounded(said, decimals=decimals)

    return collect(model, predict, batches(classifier.encoding, encoded, size=_BATCH_SIZE))
