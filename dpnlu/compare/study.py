"""A study: who is a member of which model, decided before anything is trained.

K + 1 models share one recipe. Model 0 is the target, which is attacked; the others are reference
models, which the attacker trains. Some training examples are *audit* examples: for
each model, a fair coin of its own decides whether it is a member. All other training examples
are in every model. Each model may also carry a canary with a secret of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from attacks.canaries import draw_secret
from attacks.patterns import CanarySpec, canary_tags, canary_tokens
from dpnlu.compare.settings import LEAST_AUDIT_EXAMPLES
from dpnlu.nlu.data import Corpus, Example
from dpnlu.nlu.encoding import Labels

# As many as the blind baseline has folds.
_LEAST_ON_EACH_SIDE = 5


@dataclass(frozen=True, kw_only=True)
class Study:
    """Who trains on what.

    Attributes:
        base: training examples of every model.
        audit: m audit examples.
        membership: (K + 1, m) Boolean: whether the audit example is in the model.
        canaries: what the canaries look like, one entry per pattern; may be empty.
        secrets: for each of them (K + 1, length), each model's secret, as indices of candidates.
        token_canaries: t canaries of the audit, each in a model at most once.
        token_membership: (K + 1, t) Boolean: whether the canary is in the model.
    """

    base: tuple[Example, ...]
    audit: tuple[Example, ...]
    membership: NDArray[np.bool_]
    canaries: tuple[CanarySpec, ...] = ()
    secrets: tuple[NDArray[np.int64], ...] = ()
    token_canaries: tuple[Example, ...] = ()
    token_membership: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((1, 0), bool))

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
        """Draw audit examples, who is a member, and secrets.

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
            membership=rng.random((models, len(chosen))) < 0.5,
            canaries=tuple(canaries),
            secrets=tuple(
                np.stack(
                    [
                        draw_secret(rng, length=canary.length, candidates=canary.sizes)
                        for _ in range(models)
                    ]
                )
                for canary in canaries
            ),
        )

    def examples(self, model: int) -> tuple[Example, ...]:
        """The examples that the model trains on."""
        members = (e for e, is_in in zip(self.audit, self.membership[model], strict=True) if is_in)
        return (*self.base, *members, *self._canaries(model), *self._token_canaries(model))

    def check_sides(self, *, for_references: bool) -> None:
        """Raise ValueError unless enough audit examples are members of the models, and enough not.

        Args:
            for_references: whether attacks compare the references on either side as well.
        """
        if len(self.audit) < LEAST_AUDIT_EXAMPLES:
            raise ValueError(
                f"Expected at least {LEAST_AUDIT_EXAMPLES} audit examples, got {len(self.audit)}, "
                "all that there are: use data with more rows."
            )
        members = int(self.membership[0].sum())
        others = len(self.audit) - members
        if min(members, others) < _LEAST_ON_EACH_SIDE:
            raise ValueError(
                f"Expected at least {_LEAST_ON_EACH_SIDE} audit examples that are members and as "
                f"many that are not, got {members} and {others}: use data with more rows, or raise "
                "--audit-examples."
            )
        inside = self.membership[1:].sum(axis=0)
        outside = len(self.membership) - 1 - inside
        if for_references and min(inside.max(), outside.max()) < 2:
            raise ValueError(
                "Expected some audit example in two references and some in neither of two, got "
                "none: raise --references or --audit-examples."
            )
        if not self.base and not self.membership.any(axis=1).all():
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

    def with_token_canaries(
        self, canaries: Sequence[Example], *, rng: np.random.Generator
    ) -> Study:
        """The same study, with canaries for the audit, each in a model by a coin of its own."""
        coins = rng.random((len(self.membership), len(canaries))) < 0.5
        return replace(self, token_canaries=tuple(canaries), token_membership=coins)

    def _token_canaries(self, model: int) -> list[Example]:
        if not self.token_canaries:
            return []
        coins = self.token_membership[model]
        return [e for e, is_in in zip(self.token_canaries, coins, strict=True) if is_in]

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
