"""A study: who is a member of which model, decided before anything is trained.

K + 1 models share one recipe. Model 0 is the target, which is attacked; the others are reference
models, which the attacker trains. Some training examples are *audit* examples: for
each model, a fair coin of its own decides whether it is a member. All other training examples
are in every model. Each model may also carry a canary with a secret of its own.

Where users are protected, the coins are those of users: a user is in a model with all of their
examples, or with none, and is judged by the mean of the scores of the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from attacks.canaries import draw_secret
from attacks.patterns import CanarySpec, canary_tags, canary_tokens
from dpnlu.compare.settings import LEAST_AUDIT_EXAMPLES
from dpnlu.mechanism.users import Users
from dpnlu.nlu.data import Corpus, Example
from dpnlu.nlu.encoding import Labels
from dpnlu.runs.experiment import users_of

# As many as the blind baseline has folds.
_LEAST_ON_EACH_SIDE = 5


@dataclass(frozen=True, kw_only=True)
class Study:
    """Who trains on what.

    Attributes:
        base: training examples of every model.
        audit: m audit examples.
        membership: (K + 1, m) Boolean: whether the audit example is in the model.
        users: whose the audit examples are, where users are judged; None: examples are.
        canaries: what the canaries look like, one entry per pattern; may be empty.
        secrets: for each of them (K + 1, length), each model's secret, as indices of candidates.
        token_canaries: t canaries of the audit, each in a model at most once.
        token_membership: (K + 1, t) Boolean: whether the canary is in the model.
    """

    base: tuple[Example, ...]
    audit: tuple[Example, ...]
    membership: NDArray[np.bool_]
    users: Users | None = None
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
        by_user: bool = False,
    ) -> Study:
        """Draw audit examples, who is a member, and secrets.

        Args:
            corpus: without repeated texts.
            audit_examples: m, or how many users; at most all of the training split.
            references: K >= 0.
            by_user: judge users, with all of their examples.

        Raises:
            DataError: an example of the training split has no user.
        """
        examples = corpus.split("train")
        owners = users_of(examples).owners if by_user else np.arange(len(examples))
        chosen = rng.permutation(owners.max() + 1)[:audit_examples]
        is_audit, models = np.isin(owners, chosen), references + 1
        audit = tuple(e for e, is_one in zip(examples, is_audit, strict=True) if is_one)
        users = users_of(audit) if by_user else None
        coins = rng.random((models, len(chosen))) < 0.5
        return cls(
            base=tuple(e for e, is_one in zip(examples, is_audit, strict=True) if not is_one),
            audit=audit,
            membership=coins if users is None else coins[:, users.owners],
            users=users,
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

    @property
    def unit(self) -> str:
        """What is judged: an example or a user."""
        return "example" if self.users is None else "user"

    @property
    def members(self) -> NDArray[np.bool_]:
        """(K + 1, U) whether the audit example, or user, is in the model."""
        if self.users is None:
            return self.membership
        _, first = np.unique(self.users.owners, return_index=True)
        return self.membership[:, first]

    def of_units(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """(m,) scores of the audit examples -> (U,) those of the units, means over their examples;
        of examples the same."""
        if self.users is None:
            return scores
        return np.bincount(self.users.owners, weights=scores) / self.users.counts

    def texts(self) -> list[str]:
        """(U,) what is known of each audit example, or user, without a model."""
        if self.users is None:
            return [example.text for example in self.audit]
        said: list[list[str]] = [[] for _ in range(len(self.users))]
        for owner, example in zip(self.users.owners, self.audit, strict=True):
            said[owner].append(example.text)
        return [" ".join(texts) for texts in said]

    def check_sides(self, *, for_references: bool) -> None:
        """Raise ValueError unless enough audit examples are members of the models, and enough not.

        Args:
            for_references: whether attacks compare the references on either side as well.
        """
        membership, count = self.members, self.members.shape[1]
        if count < LEAST_AUDIT_EXAMPLES:
            raise ValueError(
                f"Expected at least {LEAST_AUDIT_EXAMPLES} audit {self.unit}s, got {count}, all "
                "that there are: use data with more rows."
            )
        members = int(membership[0].sum())
        others = count - members
        if min(members, others) < _LEAST_ON_EACH_SIDE:
            raise ValueError(
                f"Expected at least {_LEAST_ON_EACH_SIDE} audit {self.unit}s that are members and "
                f"as many that are not, got {members} and {others}: use data with more rows, or "
                "raise --audit-examples."
            )
        inside = membership[1:].sum(axis=0)
        outside = len(membership) - 1 - inside
        if for_references and min(inside.max(), outside.max()) < 2:
            raise ValueError(
                f"Expected some audit {self.unit} in two references and some in neither of two, "
                "got none: raise --references or --audit-examples."
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
        """The same study, with canaries for the audit, each in a model by a coin of its own and,
        where users are judged, said by a user of its own."""
        if self.users is not None:
            canaries = [replace(canary, user=canary.id) for canary in canaries]
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
                # One person says their secret again and again.
                user=None if self.users is None else f"canary-{canary.pattern.name}",
            )
            for canary, secrets in zip(self.canaries, self.secrets, strict=True)
            for copy in range(canary.repetitions)
        ]


def canary_example(
    canary: CanarySpec,
    secret: NDArray[np.int64],
    *,
    name: str,
    with_slots: bool,
    user: str | None = None,
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
        user=user,
    )
