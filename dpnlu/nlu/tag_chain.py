"""A linear-chain CRF over slot tags whose only transitions are the constraints of IOB2.

`I-x` may follow `B-x` and `I-x` alone; every other tag may follow any, and nothing of that is
learnt. With s the logits of the words, the tags y_1 … y_n of a text have the probability
exp(Σ s_t(y_t)) / Z, Z being the sum over all sequences that are allowed (Lafferty et al., 2001).

Only what may follow a tag tells one past from another, and only `I-x` asks: so one number per slot
carries all that a word must know of those behind it. Let O, B-* be the tags that may follow any,
and q_n = s_n. Going back from the last word,

    c_t = logsumexp of q_t over O, B-*      a_t(x) = softplus(q_t(I-x) - c_t)
    q_{t-1} = s_{t-1}, plus a_t(x) at B-x and at I-x

after which the tag of a word, given the one before it and the whole text, is a softmax of q over
the tags that may follow that one, and log Z = Σ c_t. Every number stays of the size of the logits,
however long the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# From here on softplus is the identity, in float64; its exponential is still finite in float32.
_LINEAR = 40.0


@dataclass(frozen=True)
class TagChain:
    """Which of L tags may follow which.

    Attributes:
        inside: the tags `I-x`.
        before: for each of these the tag `B-x`.
        alone: the others, `O` and the tags of slots of one word.
    """

    inside: tuple[int, ...]
    before: tuple[int, ...]
    alone: tuple[int, ...]

    @classmethod
    def of(cls, tags: Sequence[str]) -> Self:
        """The chain over tags, in the order of a model's outputs.

        Raises:
            ValueError: there is no `O`, or an `I-x` without its `B-x`.
        """
        numbers = {tag: number for number, tag in enumerate(tags)}
        inside = tuple(number for number, tag in enumerate(tags) if tag.startswith("I-"))
        missing = next((tags[i] for i in inside if f"B-{tags[i][2:]}" not in numbers), None)
        if missing is not None or "O" not in numbers:
            found = "no 'O'" if missing is None else f"'{missing}' without 'B-{missing[2:]}'"
            raise ValueError(
                f"Expected IOB2 tags, O among them and B-x with every I-x, got {found}; add the "
                "missing tag, or learn each word's tag by itself (slot_loss='words')."
            )
        before = tuple(numbers[f"B-{tags[i][2:]}"] for i in inside)
        return cls(inside, before, tuple(sorted(set(numbers.values()) - {*inside, *before})))

    def conditional(self, logits: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, L) logits whose softmax at each word is p(its tag | the tag before it, the text).

        The tags before are the true ones; behind a word without a tag every tag may follow. What
        may not follow has -inf.

        Args:
            logits: (B, T, L), any finite values.
            tags: (B, T), negative where there is none.
            lengths: (B,) words of each text, behind which `logits` mean nothing.
        """
        looking_ahead = self._looking_ahead(logits, lengths)
        previous = F.pad(tags, (1, 0), value=self.alone[0])[:, :-1]
        inside, before = self._on(logits.device)[:2]
        follows = (previous[:, :, None] == inside) | (previous[:, :, None] == before)
        may = torch.ones_like(looking_ahead, dtype=torch.bool)
        may = may.index_copy(2, inside, follows | (previous < 0)[:, :, None])
        return looking_ahead.masked_fill(~may, -torch.inf)

    def likeliest(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) the likeliest allowed tags of each text (Viterbi); what stands behind its length
        means nothing.

        Args:
            logits, lengths: as for `conditional`.
        """
        looking_ahead = self._looking_ahead(logits, lengths, best=True)
        inside, before, _ = self._on(logits.device)
        outside = looking_ahead.index_fill(2, inside, -torch.inf)
        best = outside.max(2)
        scores, chosen = list(best.values.unbind(1)), list(best.indices.unbind(1))
        tags = [chosen[0]]
        for step in range(1, len(chosen)):
            follows = (tags[-1][:, None] == inside) | (tags[-1][:, None] == before)
            on = looking_ahead[:, step].index_select(1, inside).masked_fill(~follows, -torch.inf)
            value, place = F.pad(on, (0, 1), value=-torch.inf).max(1)
            number = F.pad(inside, (0, 1)).take(place)
            tags.append(torch.where(value > scores[step], number, chosen[step]))
        return torch.stack(tags, dim=1)

    def _looking_ahead(self, logits: Tensor, lengths: Tensor, *, best: bool = False) -> Tensor:
        """(B, T, L) q of the module's text; with `best` the maximum takes the place of the sum."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        inside, before, alone = self._on(logits.device)
        steps = torch.arange(1, logits.shape[1] + 1, device=lengths.device)
        goes_on = (steps < lengths[:, None]).to(logits.dtype)
        ordered = logits.index_select(2, torch.cat((inside, before, alone)))
        look = _likeliest_ahead if best else _LookAhead.apply
        found: Tensor = look(ordered, goes_on, len(self.inside))
        return found.index_select(2, torch.tensor(self._order, device=logits.device))

    @cached_property
    def _order(self) -> list[int]:
        """Where each tag stands among those inside, before and alone, one behind the other."""
        places = {tag: at for at, tag in enumerate((*self.inside, *self.before, *self.alone))}
        return [places[tag] for tag in range(len(places))]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        inside, before, alone = (
            torch.tensor(numbers, dtype=torch.long, device=device)
            for numbers in (self.inside, self.before, self.alone)
        )
        return inside, before, alone


class _LookAhead(torch.autograd.Function):
    """(B, T, L) s -> q, with the tags inside first, in the order of theirs before, which follow.

    A function of its own, so that the graph of the losses does not depend on how long texts are.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, goes_on: Tensor, inside: int) -> Tensor:
        found = logits.clone()
        for step in reversed(range(logits.shape[1] - 1)):
            behind = found[:, step + 1]
            over = behind[:, :inside] - behind[:, inside:].logsumexp(1, keepdim=True)
            ahead = F.softplus(over, threshold=_LINEAR) * goes_on[:, step, None]
            found[:, step, : 2 * inside] += ahead.repeat(1, 2)
        ctx.inside = inside
        ctx.save_for_backward(found, goes_on)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        found, goes_on = ctx.saved_tensors
        inside, anew = ctx.inside, found[:, :, ctx.inside :]
        shares = anew.softmax(2)
        slopes = (found[:, :, :inside] - anew.logsumexp(2, keepdim=True)).sigmoid()
        total = gradient.clone()
        for step in range(1, found.shape[1]):
            before = total[:, step - 1]
            ahead = before[:, :inside] + before[:, inside : 2 * inside]
            ahead = ahead * slopes[:, step] * goes_on[:, step - 1, None]
            total[:, step, :inside] += ahead
            total[:, step, inside:] -= shares[:, step] * ahead.sum(1, keepdim=True)
        return total, None, None


def _likeliest_ahead(logits: Tensor, goes_on: Tensor, inside: int) -> Tensor:
    """The same with maxima, without a gradient."""
    found = logits.detach().clone()
    for step in reversed(range(logits.shape[1] - 1)):
        behind = found[:, step + 1]
        over = behind[:, :inside] - behind[:, inside:].amax(1, keepdim=True)
        ahead = over.clamp(min=0) * goes_on[:, step, None]
        found[:, step, : 2 * inside] += ahead.repeat(1, 2)
    return found
