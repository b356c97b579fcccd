"""The functions of a step that are traced, and the gradients that they find.

A program returns tensors alone. What gradients are made of is known when it is traced, and does not
change: so gradients are taken apart into tensors, and put together again from those of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.clipped import Parts
from dpnlu.engines.refusals import check_losses
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.signature import Signature


class Tracing:
    """The functions that are traced for one shape of the batch.

    Attributes:
        forms: of the gradients that `find` found last.
    """

    def __init__(
        self,
        engine: BookKeeping,
        losses_of: Callable[[Any], Tensor],
        leaves: list[Any],
        nesting: TreeSpec,
        count: int,
    ) -> None:
        self._engine, self._losses_of = engine, losses_of
        self._leaves, self._nesting, self._count = leaves, nesting, count
        self._signatures: list[Signature] = []
        self.forms: Forms | None = None

    def find(self, *tensors: Tensor) -> list[Tensor]:
        """See `dpnlu.engines.compiled`."""
        losses = self._losses(tensors)
        parts, norms = self._engine.found_unchecked(losses)
        self._engine.expect(None)
        self.forms = Forms.of(parts)
        return [losses.detach(), norms.values, norms.slack, *self.forms.tensors()]

    def check(self, weights: Tensor, draws: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See `dpnlu.engines.compiled`."""
        losses = self._losses(tensors)
        agree, evidence = self._engine.evidence(losses, weights, draws)
        self._engine.expect(None)
        return agree, *vars(evidence).values()

    def check_signatures(self) -> None:
        """Whether all that was traced did the same, whatever the values.

        Raises:
            UnsupportedLayerError: it did not.
        """
        first = self._signatures[0]
        is_doubtful = all(signature.is_doubtful for signature in self._signatures)
        if is_doubtful or any(s != first or s.chooses_rows for s in self._signatures):
            raise UnsupportedLayerError(
                "Expected a forward pass that does the same operations every time and takes the "
                "examples as they come, got one that changes or picks rows by their values: use "
                "private.stepper."
            )

    def _losses(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """(B,) of a batch; those that do not count are constants."""
        *values, kept = tensors
        batch = tree_unflatten(_with_tensors(self._leaves, iter(values)), self._nesting)
        with self._engine.recording(batch, self._count):
            found = self._losses_of(batch)
        check_losses(found, self._count)
        if self._engine.is_checkpointed:
            raise UnsupportedLayerError(
                "Expected every module to run once, but activation checkpointing runs some again, "
                "with other units dropped if a program is traced: switch it off, or use "
                "private.stepper."
            )
        self._signatures.append(self._engine.signature_of(found))
        return torch.where(torch.arange(self._count, device=found.device) < kept, found, 0.0)


@dataclass(frozen=True)
class Forms:
    """Per-example gradients of all parameters, whose tensors can be exchanged for others.

    Attributes:
        kinds: the classes of each parameter's uses.
        leaves: all that the uses hold.
        nesting: how.
    """

    kinds: Mapping[Tensor, Sequence[type[Any]]]
    leaves: list[Any]
    nesting: TreeSpec

    @classmethod
    def of(cls, parts: Parts) -> Forms:
        kinds = {parameter: [type(use) for use in uses] for parameter, uses in parts.items()}
        held = [[tuple(vars(use).values()) for use in uses] for uses in parts.values()]
        return cls(kinds, *tree_flatten(held))

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def filled(self, tensors: list[Tensor]) -> Parts:
        """The gradients with these tensors in place of their own."""
        held = tree_unflatten(_with_tensors(self.leaves, iter(tensors)), self.nesting)
        return {
            parameter: [kind(*values) for kind, values in zip(kinds, uses, strict=True)]
            for (parameter, kinds), uses in zip(self.kinds.items(), held, strict=True)
        }


def _with_tensors(leaves: list[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The leaves with these tensors in place of their own."""
    return [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
