"""A study: who is a member of which model, decided before anything is trained.

K + 1 models share one recipe. Model 0 is the target, which is attacked; the others are reference
models, which the attacker trains for himself. Some training examples are *audit* examples: for
each model, a fair coin of its own decides whether the example is in. All other training examples
are in every model. Each model may also carry a canary with a secret of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attacks.canaries import CanarySpec, all_secrets, canary_tags, canary_tokens, draw_secret
from attacks.dropout import common_dropout, has_dropout
from attacks.signals import Predictions, Signals, collect
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, Example
from dpnlu.nlu.encoding import Encoded, Labels, batches, encode_all
from dpnlu.nlu.models import Batch, device_of, moved

_BATCH_SIZE = 256

# Fewer say nothing about any model.
LEAST_AUDIT_EXAMPLES = 20
# As many as the blind baseline has folds.
_LEAST_ON_EACH_SIDE = 5

# Of a model with dropout: the secrets it is asked about once more, all in one batch, and under how
# many masks. With 400 masks the ranks still moved from draw to draw, with 800 they stayed.
_LIKELIEST, _MASKS = 100, 1000


@dataclass(frozen=True, kw_only=True)
class Study:
    """Who trains on what.

    Attributes:
        base: training examples of every model.
        audit: m audit examples.
        coins: (K + 1, m) Boolean: whether the audit example is in the model.
        canaries: what the canaries look like, one entry per pattern; may be empty.
        secrets: for each of them (K + 1, length), each model's secret, as indices of candidates.
    """

    base: tuple[Example, ...]
    audit: tuple[Example, ...]
    coins: NDArray[np.bool_]
    canaries: tuple[CanarySpec, ...] = ()
    secrets: tuple[NDArray[np.int64], ...] = ()

    @classmethod
    def draw(
        cls,
        corpus: Corpus,
        *,
        audit_examples: int,
        references: int,
        canaries: Sequence[CanarySpec],
        rng: np.random.Generator,
    ) -> Study:
        """Draw audit examples, coins and secrets.

        Args:
            corpus: without repeated texts.
            audit_examples: m, at most the size of the training split.
            references: K >= 0.
        """
        examples = corpus.split("train")
        chosen = set(rng.permutation(len(examples))[:audit_examples].tolist())
        models = references + 1
        return cls(
            base=tuple(e for place, e in enumerate(examples) if place not in chosen),
            audit=tuple(e for place, e in enumerate(examples) if place in chosen),
            coins=rng.random((models, len(chosen))) < 0.5,
            canaries=tuple(canaries),
            secrets=tuple(
                np.stack([draw_secret(rng, length=canary.length) for _ in range(models)])
                for canary in canaries
            ),
        )

    def examples(self, model: int) -> tuple[Example, ...]:
        """What the model trains on."""
        members = (e for e, is_in in zip(self.audit, self.coins[model], strict=True) if is_in)
        return (*self.base, *members, *self._canaries(model))

    def check_sides(self, *, for_references: bool) -> None:
        """Whether enough audit examples are members, and enough are not, of each model.

        Args:
            for_references: whether attacks compare the references on either side as well.

        Raises:
            ValueError: they are not.
        """
        if len(self.audit) < LEAST_AUDIT_EXAMPLES:
            raise ValueError(
                f"Expected at least {LEAST_AUDIT_EXAMPLES} audit examples, got {len(self.audit)}, "
                "all that there are: use data with more rows."
            )
        members = int(self.coins[0].sum())
        others = len(self.audit) - members
        if min(members, others) < _LEAST_ON_EACH_SIDE:
            raise ValueError(
                f"Expected at least {_LEAST_ON_EACH_SIDE} audit examples that are members and as "
                f"many that are not, got {members} and {others}: use data with more rows, or raise "
                "--audit-examples."
            )
        inside = self.coins[1:].sum(axis=0)
        outside = len(self.coins) - 1 - inside
        if for_references and min(inside.max(), outside.max()) < 2:
            raise ValueError(
                "Expected some audit example in two references and some in neither of two, got "
                "none: raise --references or --audit-examples."
            )
        if not self.base and not self.coins.any(axis=1).all():
            raise ValueError(
                "Expected every model to have examples to train on, got one without: use data with "
                "more rows."
            )

    def labels(self, corpus: Corpus) -> Labels:
        """The corpus' labels, and those of the canary."""
        intents, tags = set(corpus.intents), set(corpus.tags)
        for canary in self.canaries:
            if corpus.has_intents:
                intents.add(canary.pattern.intent)
            if corpus.has_slots:
                tags |= set(canary_tags(canary.pattern, canary.length))
        return Labels(tuple(sorted(intents)), tuple(sorted(tags)))

    def _canaries(self, model: int) -> list[Example]:
        with_slots = (*self.base, *self.audit)[0].tags is not None
        return [
            canary_example(
                canary,
                secrets[model],
                name=f"{canary.pattern.name}-{copy}",
                with_slots=with_slots,
            )
            for canary, secrets in zip(self.canaries, self.secrets, strict=True)
            for copy in range(canary.repetitions)
        ]


def canary_example(
    canary: CanarySpec, secret: NDArray[np.int64], *, name: str, with_slots: bool
) -> Example:
    """The utterance that carries a secret."""
    tokens = canary_tokens(canary.pattern, secret)
    return Example(
        id=f"canary-{name}",
        text=" ".join(tokens),
        tokens=tokens,
        tags=canary_tags(canary.pattern, canary.length) if with_slots else None,
        intent=canary.pattern.intent,
        split="train",
    )


def read_signals(classifier: Classifier, examples: Sequence[Example]) -> Signals:
    """What a classifier says about examples."""
    encoded = encode_all(classifier.encoding, examples)
    return _signals(classifier, encoded)


def read_canary_losses(classifier: Classifier, canary: CanarySpec) -> NDArray[np.float64]:
    """By what the classifier ranks every possible secret, in lexicographic order: its loss on the
    canary with that secret.

    Where the secret is a slot, it is the loss of the tags alone (Parikh et al., 2022): the carrier
    phrase has settled the intent before a secret is read, so that its loss says little of the
    secret and blurs the ranking. The likeliest secrets of a model trained with dropout come first,
    in the order of their mean loss under dropout, which is what training made small.
    """
    secrets = all_secrets(canary.length)
    pieces = np.array_split(secrets, max(1, len(secrets) // 2000))
    losses = np.concatenate([next(_losses(classifier, canary, piece)) for piece in pieces])
    if not has_dropout(classifier.model):
        return losses
    likeliest = losses.argsort(kind="stable")[:_LIKELIEST]
    masks = torch.Generator().manual_seed(0)
    with common_dropout(classifier.model, generator=masks):
        under_each = islice(_losses(classifier, canary, secrets[likeliest]), _MASKS)
        under_dropout = np.mean(list(under_each), axis=0)
    # The others follow, in their order and with their ties.
    _, order = np.unique(losses, return_inverse=True)
    ranking: NDArray[np.float64] = under_dropout.max() + 1.0 + order
    ranking[likeliest] = under_dropout
    return ranking


def _losses(
    classifier: Classifier, canary: CanarySpec, secrets: NDArray[np.int64]
) -> Iterator[NDArray[np.float64]]:
    """The loss on the canary with each of these secrets, read again and again."""
    with_slots = bool(classifier.encoding.labels.tags)
    examples = [
        canary_example(canary, secret, name="candidate", with_slots=with_slots)
        for secret in secrets
    ]
    encoded = encode_all(classifier.encoding, examples)
    while True:
        signals = _signals(classifier, encoded)
        by_tags = signals.slot_loss if canary.pattern.slot is not None else None
        yield signals.loss if by_tags is None else by_tags


def _signals(classifier: Classifier, encoded: Sequence[Encoded]) -> Signals:
    model: Any = classifier.model

    def predict(batch: Batch) -> Predictions:
        outputs = model(moved(batch, device_of(model)))
        return Predictions(outputs.intents, batch.get("intents"), outputs.tags, batch.get("tags"))

    return collect(model, predict, batches(classifier.encoding, encoded, size=_BATCH_SIZE))
