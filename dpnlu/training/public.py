"""Public examples beside the private ones of every step (AdaMix, Golatkar et al. 2022).

The optimizer acts on the released mean of the private gradients plus the mean gradient of a batch
of public examples, which needs neither clipping nor noise; and the norms of the latter can tell the
clipping bound of the step (`public:Q`). Both are computed before the first private example of the
step is, at weights that were released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dpnlu.engines.base import Engine
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.plain import gradient_of, norm_of, nothing_accumulated
from dpnlu.engines.reruns import losses_for
from dpnlu.mechanism.ranges import check_count, check_not_negative


class PublicGradientError(RuntimeError):
    """A gradient of public examples is infinite or not a number."""


@dataclass(frozen=True, kw_only=True)
class PublicExamples:
    """Public examples, and how they are learnt from beside private ones.

    Guarantee: what is computed of them depends on them and on released weights alone, so that ε is
    that of the private training without them; as long as nobody chose them, or their weight, by
    looking at the private examples.

    Attributes:
        examples: indexed from 0.
        losses_of: batch -> (B,) losses, as `PrivateTraining.stepper` takes it.
        collate_fn: a list of examples -> a batch, as in torch's `DataLoader`.
        batch_size: how many are drawn, without repetition, for every step; all, if there are fewer.
        physical_batch_size: how many to compute at once; None: the whole batch.
        weight: of their mean gradient, >= 0; that of the private ones has 1. With 0 they tell at
            most the clipping bound.
        rng: draws them.

    Raises:
        ValueError: there are none, or a number is out of range.
    """

    examples: Dataset[Any] | Sequence[Any]
    losses_of: Callable[[Any], Tensor]
    collate_fn: Callable[[list[Any]], Any] = default_collate
    batch_size: int = 128
    physical_batch_size: int | None = None
    weight: float = 1.0
    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def __post_init__(self) -> None:
        if not self.count:
            raise ValueError("Expected public examples to learn from beside the private, got none.")
        check_count("batch_size", self.batch_size)
        if self.physical_batch_size is not None:
            check_count("physical_batch_size", self.physical_batch_size)
        check_not_negative("weight", self.weight)

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(cast(Sized, self.examples))

    def listed(self) -> list[Any]:
        """All examples, in order."""
        return [self.examples[number] for number in range(self.count)]

    def drawn(self) -> Iterator[tuple[Any, int]]:
        """A batch drawn anew: its physical batches, and how many examples each has."""
        ids = self.rng.choice(self.count, size=min(self.batch_size, self.count), replace=False)
        size = self.physical_batch_size or len(ids)
        for start in range(0, len(ids), size):
            some = ids[start : start + size].tolist()
            yield self.collate_fn([self.examples[number] for number in some]), len(some)


class PublicGradients:
    """What public examples say of the next step: a mean gradient, and a clipping bound.

    Attributes:
        mean: parameter -> weight times the mean gradient, at the present weights; nothing before
            `prepare`, and nothing where the weight is 0.
        is_prepared: whether they were computed at the present weights.
    """

    def __init__(
        self, public: PublicExamples, *, engine: Engine, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Nothing is computed yet.

        Args:
            engine: sees the norms of single examples; its clipper gets the bound.
            parameters: the trained ones.
        """
        self._public, self._engine, self._parameters = public, engine, list(parameters)
        self.mean: Mapping[nn.Parameter, Tensor] = {}
        self.is_prepared = False

    @classmethod
    def of(
        cls, public: PublicExamples | None, *, engine: Engine, parameters: Sequence[nn.Parameter]
    ) -> PublicGradients | None:
        """Those of some examples, if there are any."""
        return None if public is None else cls(public, engine=engine, parameters=parameters)

    def prepare(self) -> None:
        """Compute them, unless that was done for these weights; call before any private example of
        the step is computed: the engine forgets what it saw.

        Raises:
            PublicGradientError: they are not finite.
        """
        if self.is_prepared:
            return
        quantile = self._engine.clipper.public_quantile
        sums: list[Tensor] = []
        norms = [torch.zeros(0)]
        total = min(self._public.batch_size, self._public.count)
        for batch, count in self._public.drawn():
            losses = losses_for(self._engine, self._public.losses_of, batch, count)
            if self._public.weight:
                share = losses.sum() * (self._public.weight / total)
                sums = self._added(sums, share, keep_graph=quantile is not None)
            if quantile is not None:
                norms.append(self._norms(losses))
            if isinstance(self._engine, BookKeeping):
                self._engine.expect(None)
        found = torch.cat(norms)
        _check_finite([*sums, found])
        self.mean = dict(zip(self._parameters, sums, strict=True)) if sums else {}
        if quantile is not None:
            bound = float(torch.quantile(found.double(), quantile))
            self._engine.clipper.bound = self._engine.clipper.within_limits(bound)
        self.is_prepared = True

    def weights_changed(self) -> None:
        """Weights are not what they were: these gradients were those of others."""
        self.mean, self.is_prepared = {}, False

    def _added(self, sums: list[Tensor], share: Tensor, *, keep_graph: bool) -> list[Tensor]:
        with nothing_accumulated(self._parameters):
            found = gradient_of(share, self._parameters, keep_graph=keep_graph)
        # Not in place: gradients of several parameters may be one tensor.
        return list(torch._foreach_add(sums, found)) if sums else found

    def _norms(self, losses: Tensor) -> Tensor:
        """(B,) norms of the gradients of single examples, on the CPU."""
        if isinstance(self._engine, BookKeeping):
            return self._engine.norms(losses).cpu()
        found = [gradient_of(one, self._parameters, keep_graph=True) for one in losses]
        return torch.stack([norm_of(gradients) for gradients in found]).cpu()


def _check_finite(tensors: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise PublicGradientError(
            "Expected finite gradients of public examples, got some that are infinite or not a "
            "number: training has diverged, or the loss overflows; lower the learning rate or the "
            "public weight, or compute in float32."
        )
