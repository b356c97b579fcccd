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

_Tags = tuple[Tensor, Tensor, Tensor]  # those inside, those before, those alone
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
        forbidden = self._forbidden.to(logits.device)
        after = forbidden.index_select(
            0, previous.where(previous >= 0, len(forbidden) - 1).flatten()
        )
        return looking_ahead.masked_fill(after.view_as(looking_ahead), -torch.inf)

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
        steps = torch.arange(1, logits.shape[1] + 1, device=lengths.device)
        goes_on = (steps < lengths[:, None]).to(logits.dtype)
        tags = self._on(logits.device)
        if best:
            return _look_ahead(logits, goes_on, tags, best=True)[0]
        found: Tensor = _LookAhead.apply(logits, goes_on, tags)  # type: ignore[no-untyped-call]
        return found

    @cached_property
    def _forbidden(self) -> Tensor:
        """(L + 1, L): whether a tag may not follow each tag and, last, an unknown one."""
        inside, before, alone = self._tags
        count = len(inside) + len(before) + len(alone)
        forbidden = torch.zeros(count + 1, count, dtype=torch.bool)
        forbidden[:-1, inside] = True
        forbidden[inside, inside] = forbidden[before, inside] = False
        return forbidden

    @cached_property
    def _tags(self) -> _Tags:
        return (
            torch.tensor(self.inside, dtype=torch.long),
            torch.tensor(self.before, dtype=torch.long),
            torch.tensor(self.alone),
        )

    def _on(self, device: torch.device) -> _Tags:
        inside, before, alone = self._tags
        return inside.to(device), before.to(device), alone.to(device)


class _LookAhead(torch.autograd.Function):
    """`_look_ahead` with its gradient, so that the graph of the losses does not depend on how long
    texts are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, goes_on: Tensor, tags: _Tags) -> Tensor:
        found, anew, over, sums = _look_ahead(logits, goes_on, tags)
        ctx.save_for_backward(logits, goes_on, anew, over, sums)
        ctx.tags = tags
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, goes_on, anew, over, sums = ctx.saved_tensors
        inside, before, alone = ctx.tags
        total = _examples_last(gradient)
        shares = (anew[:, :-1] - sums[:, None]).exp_()
        slopes = over.sigmoid()
        slopes *= goes_on.T.roll(1, 0)[:, None]
        # What adds to B-x adds to I-x: so both together.
        both = total.index_select(1, inside) + total.index_select(1, before)
        ahead = torch.zeros_like(both)
        looked = ahead[0]
        for slope, share, looks, pair in zip(
            *(each.unbind() for each in (slopes, shares, ahead, both)), strict=True
        ):
            torch.mul(looked, slope, out=looks)
            looked = pair.add_(looks).addcmul_(share, looks.sum(0), value=-1)
        taken = ahead.sum(1, keepdim=True)
        shares_alone = (logits.index_select(2, alone).permute(1, 2, 0) - sums[:, None]).exp_()
        total.index_add_(1, inside, ahead)
        total.index_add_(1, before, shares.mul_(taken), alpha=-1)
        total.index_add_(1, alone, shares_alone.mul_(taken), alpha=-1)
        return total.permute(2, 0, 1), None, None


def _look_ahead(
    logits: Tensor, goes_on: Tensor, tags: _Tags, *, best: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Back from the last word, with examples last, so that sums over tags are of whole rows.

    Args:
        logits: (B, T, L).
        goes_on: (B, T), 1 where there is a word behind this one, else 0.
        best: the maximum takes the place of the sum.

    Returns:
        (B, T, L) q; and of every word, with I tags inside, (T, I + 1, B) q of those before and, as
        one, of those alone; (T, I, B) q of those inside less c; (T, B) c.
    """
    inside, before, alone = tags
    found = _examples_last(logits.detach())
    over, single = found.index_select(1, inside), found.index_select(1, alone)
    anew = found.index_select(1, torch.cat((before, alone[:1])))
    anew[:, -1] = single.amax(1) if best else single.logsumexp(1)
    ahead, sums = torch.zeros_like(over), torch.empty_like(anew[:, 0])
    looked = ahead[-1]
    words = zip(*(_backwards(each) for each in (ahead, anew, over, sums)), strict=True)
    for (looks, starts, goes, total), on in zip(
        words, _backwards(goes_on.T.roll(1, 0)), strict=True
    ):
        looks.copy_(looked)
        starts[:-1].add_(looked)
        torch.amax(starts, 0, out=total)
        if not best:  # by hand, in fewer operations than `torch.logsumexp`
            total.add_((starts - total).exp_().sum(0).log_())
        goes.add_(looked).sub_(total)
        looked = (goes.clamp(min=0) if best else F.softplus(goes, threshold=_LINEAR)).mul_(on)
    found.index_add_(1, inside, ahead).index_add_(1, before, ahead)
    return found.permute(2, 0, 1).contiguous(), anew, over, sums


def _examples_last(values: Tensor) -> Tensor:
    """(B, T, L) -> (T, L, B), a copy whatever the shape: it is written to."""
    return values.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def _backwards(steps: Tensor) -> tuple[Tensor, ...]:
    return steps.unbind()[::-1]
