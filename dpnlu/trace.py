"""The trace: what the tape recorded, and the way back from losses to per-example gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpnlu.course import Course, course_of
from dpnlu.gradients import Dense, Gradients, Rows

# (gradient w.r.t. a recorded output, number of examples) -> per-example gradients of the tensors
# that made it.
Finish = Callable[[Tensor, int], Iterable[tuple[Tensor, Gradients]]]


@dataclass(frozen=True)
class Record:
    """A batched output of trainable weights.

    Attributes:
        edge: where its gradient arrives.
        rows: size of its dimension 0.
    """

    edge: GradientEdge
    finish: Finish
    rows: int


@dataclass(frozen=True)
class Meeting:
    """A place where a free tensor met the batch.

    Attributes:
        edge: where its gradient arrives, examples kept apart.
        target: the free tensor.
        per_example: the gradient at `edge` -> (B, *target.shape).
        aligned: the gradient at `edge` has the target's shape, with the examples in dimension 0.
    """

    edge: GradientEdge
    target: Tensor
    per_example: Callable[[Tensor], Tensor]
    aligned: bool = False


@dataclass(frozen=True)
class Lookup:
    """Rows of a trainable table looked up by ids free of the batch: positions, token types."""

    output: Tensor
    ids: Tensor
    table: Tensor
    padding_idx: int | None

    def rows(self, gradient: Tensor, *, aligned: bool) -> tuple[Tensor, Gradients]:
        """The table's gradients from those of `output`: (B, *output.shape), or its own shape."""
        batch = gradient.shape[0]
        ids = self.ids if aligned else self.ids.expand(batch, *self.ids.shape)
        if self.padding_idx is not None:
            ids = ids.masked_fill(ids == self.padding_idx % self.table.shape[0], -1)
        values = gradient.reshape(batch, -1, self.table.shape[1])
        return self.table, Rows(ids.reshape(batch, -1), values, tuple(self.table.shape))


@dataclass
class Trace:
    """What one or several forward passes did with the trainable parameters.

    Attributes:
        records: operations that applied parameters to the batch.
        meetings: where tensors free of the batch, parameters or made from them, met it.
        lookups: table lookups free of the batch, by the id of their output.
        in_free: parameters that entered computations free of the batch, by id.
    """

    records: list[Record] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    lookups: dict[int, Lookup] = field(default_factory=dict)
    in_free: dict[int, Tensor] = field(default_factory=dict)

    def course(self, losses: Tensor) -> Course:
        """The course that led to `losses` (B,), and how the tape understood it: which operation
        used parameters, on how many rows per example."""
        graph = course_of(losses)
        records = (
            f"{record.finish.__qualname__} {record.rows / max(len(losses), 1):g}"
            for record in self.records
        )
        meetings = (meeting.per_example.__qualname__ for meeting in self.meetings)
        understood = (*records, *meetings, f"{len(self.lookups)} lookups")
        return replace(graph, steps=graph.steps + understood)

    def gradients(
        self, losses: Tensor, *, retain_graph: bool = False
    ) -> dict[Tensor, list[Gradients]]:
        """Back-propagate `losses` (B,) once and return the per-example gradients.

        Returns:
            Parameter -> its uses, whose gradients add up. A parameter on which the losses do not
            depend is absent.
        """
        edges = [record.edge for record in self.records]
        edges += [meeting.edge for meeting in self.meetings]
        if not edges or not len(losses):
            return {}
        found = torch.autograd.grad(
            losses.sum(), edges, allow_unused=True, retain_graph=retain_graph
        )
        count = len(self.records)
        pairs = [
            pair
            for record, gradient in zip(self.records, found[:count], strict=True)
            if gradient is not None
            for pair in record.finish(gradient, len(losses))
        ]
        pairs += [
            self._arrival(meeting, gradient)
            for meeting, gradient in zip(self.meetings, found[count:], strict=True)
            if gradient is not None
        ]
        return self._by_parameter(pairs)

    def _arrival(self, meeting: Meeting, gradient: Tensor) -> tuple[Tensor, Gradients]:
        """What arrived at a meeting, as per-example gradients of the table or tensor behind it."""
        lookup = self.lookups.get(id(meeting.target))
        if lookup is not None and meeting.aligned:
            return lookup.rows(gradient, aligned=True)
        apart = meeting.per_example(gradient)
        if lookup is None or id(lookup.table) in self.in_free:
            return meeting.target, Dense(apart)
        return lookup.rows(apart, aligned=False)

    def _by_parameter(
        self, pairs: Iterable[tuple[Tensor, Gradients]]
    ) -> dict[Tensor, list[Gradients]]:
        """Group by parameter; gradients of derived tensors are first taken back to parameters."""
        found: dict[Tensor, list[Gradients]] = {}
        derived: dict[Tensor, Tensor] = {}
        for target, gradients in pairs:
            if target.is_leaf:
                found.setdefault(target, []).append(gradients)
            else:
                arrived = gradients.dense().reshape(-1, *target.shape)
                derived[target] = derived[target] + arrived if target in derived else arrived
        for parameter, gradients in self._through_free(derived):
            found.setdefault(parameter, []).append(gradients)
        return found

    def _through_free(self, derived: dict[Tensor, Tensor]) -> Iterator[tuple[Tensor, Gradients]]:
        """Per-example gradients (B, *shape) of free tensors, back-propagated to the parameters."""
        if not derived:
            return
        parameters = list(self.in_free.values())
        # A table that also entered in another way gets both gradients through the parameter.
        lookups = [use for use in self.lookups.values() if id(use.table) not in self.in_free]
        inputs: list[Any] = [*parameters, *(get_gradient_edge(use.output) for use in lookups)]
        found = torch.autograd.grad(
            list(derived),
            inputs,
            grad_outputs=list(derived.values()),
            is_grads_batched=True,
            allow_unused=True,
            retain_graph=True,
        )
        for parameter, gradient in zip(parameters, found, strict=False):
            if gradient is not None:
                yield parameter, Dense(gradient)
        for use, gradient in zip(lookups, found[len(parameters) :], strict=True):
            if gradient is not None:
                yield use.rows(gradient, aligned=False)
