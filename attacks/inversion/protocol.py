"""How inversion knows a model: by its input vectors, and by what it predicts from them.

A cloze is a text with holes, of which everything but the tokens in the holes is known. Shapes: K
clozes, n holes (the most of any cloze), V candidates (the most of any hole), S input vectors of a
text (the most of any), p of them in one hole (likewise), d their width, B rows: fillings of clozes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from attacks._validate import shown
from attacks.signals import Predictions


@dataclass(frozen=True, kw_only=True)
class Cloze:
    """A text with holes, and the labels it was trained with.

    Attributes:
        tokens: None where a token is secret.
        candidates: for each hole, the tokens that may stand there.
        intent: None where the model has none, or the attacker does not know it.
        tags: IOB2, one per token, those in the holes included; None likewise.

    Raises:
        ValueError: no hole, not one list of candidates per hole, a list without a choice or with
            repeated tokens, not one tag per token, or no label at all.
    """

    tokens: tuple[str | None, ...]
    candidates: tuple[tuple[str, ...], ...]
    intent: str | None = None
    tags: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.holes or len(self.candidates) != len(self.holes):
            raise ValueError(
                f"Expected one list of candidates for each hole, and a hole, got {len(self.holes)} "
                f"holes and {len(self.candidates)} lists: write None for each secret token."
            )
        for tokens in self.candidates:
            if len(tokens) < 2 or len(set(tokens)) < len(tokens):
                raise ValueError(
                    f"Expected at least two different candidates for a hole, got {shown(tokens)}: "
                    "list each token once; what is known is no hole."
                )
        if self.tags is not None and len(self.tags) != len(self.tokens):
            raise ValueError(
                f"Expected a tag for each of {len(self.tokens)} tokens, got {len(self.tags)}: "
                "secret tokens have tags, too."
            )
        if self.intent is None and self.tags is None:
            raise ValueError(
                "Expected an intent or tags, got neither: without a label there is nothing that "
                "one secret explains better than another."
            )

    @property
    def holes(self) -> tuple[int, ...]:
        """Which tokens are secret."""
        return tuple(place for place, token in enumerate(self.tokens) if token is None)

    @property
    def combinations(self) -> int:
        """The number of possible secrets."""
        return math.prod(len(tokens) for tokens in self.candidates)

    def secret(self, choices: Sequence[int]) -> tuple[str, ...]:
        """The tokens that indices of candidates `(n,)` stand for."""
        return tuple(t[choice] for t, choice in zip(self.candidates, choices, strict=True))

    def filled(self, choices: Sequence[int]) -> tuple[str, ...]:
        """The text with these candidates in its holes."""
        secret = iter(self.secret(choices))
        return tuple(next(secret) if token is None else token for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The input vectors of K clozes; detached from whatever they were computed from.

    Attributes:
        vectors: (K, S, d); what stands in holes is replaced, what stands past the end is not read.
        places: (K, n, p) which of the S vectors a hole takes; S where there is no such vector.
        candidates: (K, n, V, p, d) what may stand there; zeros past the last candidate.
        sizes: (K, n) the number of candidates; 1 for a hole that a shorter cloze does not have.
    """

    vectors: Tensor
    places: Tensor
    candidates: Tensor
    sizes: Tensor


class Invertible(Protocol):
    """A model together with the clozes that are put to it."""

    @property
    def network(self) -> nn.Module:
        """The model: it is put into evaluation mode, and its dropout can be drawn."""
        ...

    @property
    def clozes(self) -> tuple[Cloze, ...]: ...

    @property
    def inputs(self) -> Inputs: ...

    def predict(self, vectors: Tensor, cloze: Tensor) -> Predictions:
        """What the model says of rows, differentiable in their vectors.

        No row may depend on another.

        Args:
            vectors: (B, S, d), as in `inputs.vectors` with the holes filled.
            cloze: (B,) which cloze the row fills.

        Returns:
            Logits, and the labels of the clozes.
        """
        ...
