"""The trace: what the tape recorded, and the way back from losses to per-example gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]
from torch.utils.checkpoint import CheckpointError

from dpnlu.gradients.computed import Computations
from dpnlu.gradients.errors import UnsupportedLayerError, naming_refusals
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout, full_precision
from dpnlu.gradients.nodes import Nodes
from dpnlu.gradients.records import EntryPoint, Lookup, Place, Product, Record

# Where gradients at all places at once take too much memory, they are found in at most so many
# pieces of about equal size, but of at least so many bytes.
_PIECES, _PIECE = 2, 2**23


@dataclass
class Trace:
    """What one or several forward passes did with the trainable parameters.

    Attributes:
        records: operations that applied parameters to the batch.
        entry_points: where batch-independent tensors, parameters or computed from them, enter it.
        lookups: batch-independent table lookups, by the id of their output.
        products: linear layers applied to batch-independent tensors.
        indirect: parameters of all other batch-independent computations, by id.
        seen: the nodes of operations that the tape saw.
    """

    records: list[Record] = field(default_factory=list)
    entry_points: list[EntryPoint] = field(default_factory=list)
    lookups: dict[int, Lookup] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    indirect: dict[int, Tensor] = field(default_factory=dict)
    seen: Nodes = field(default_factory=Nodes)

    @property
    def places(self) -> list[Place]:
        """Where gradients arrive with the examples apart."""
        uses: list[Record | EntryPoint] = [*self.records, *self.entry_points]
        return [use.place for use in uses]

    def backward(
        self,
        losses: Tensor,
        *,
        piece: Sequence[int] | None = None,
        parameters: Sequence[Tensor] = (),
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """Back-propagate the sum of `losses` (B,) once.

        Args:
            piece: the numbers of some of `places`; None: all.
            parameters: whose own gradients are wanted, too.

        Returns:
            What arrives at each of these places, then the parameters' gradients; None where nothing
            does.
        """
        places = self.places
        if piece is not None:
            places = [places[number] for number in piece]
        inputs = [*(place.edge for place in places), *parameters]
        if not inputs or not len(losses):
            return [None] * len(inputs)
        found = list(back_propagate(losses.sum(), inputs, retain_graph=retain_graph))
        for number, place in enumerate(places):
            gradient = found[number]
            found[number] = None if gradient is None else place.seen(gradient)
        return found

    def pieces(self) -> list[list[int]]:
        """The numbers of `places`, in pieces whose gradients take little memory beside all of them;
        the places of a small model are one piece."""
        ends = list(itertools.accumulate(place.nbytes for place in self.places))
        total = ends[-1] if ends else 0
        count = max(1, min(_PIECES, total // _PIECE))
        pieces: list[list[int]] = [[] for _ in range(count)]
        for number, (end, place) in enumerate(zip(ends, self.places, strict=True)):
            middle = end - place.nbytes / 2
            pieces[min(count - 1, int(middle * count / max(1, total)))].append(number)
        return [piece for piece in pieces if piece] or [[]]

    def usual_layouts(
        self, batch: int, arrived: Sequence[Tensor | None] | None = None
    ) -> list[Layout]:
        """Where the examples lie at each of `places`, unless it is known otherwise.

        Args:
            arrived: where this is None it does not matter.

        Raises:
            UnsupportedLayerError: there is a place where no dimension can hold them.
        """
        places = self.places
        return [
            Layout(batch, place.dims[0]) if gradient is None else place.usual_layout(batch)
            for place, gradient in zip(places, arrived or places, strict=True)
        ]

    def expected_layouts(self, batch: int) -> list[Layout | None]:
        """The usual layouts, None where no dimension can hold the examples."""
        return [next(place.layouts(batch), None) for place in self.places]

    def gradients(
        self,
        arrived: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        *,
        piece: Sequence[int] | None = None,
    ) -> dict[Tensor, list[Gradients]]:
        """The per-example gradients, from what arrived at each of `places`.

        Args:
            piece: the numbers of the places, if these are not all; what the others add is left out.

        Returns:
            Parameter -> its uses, whose gradients add up. A parameter on which the losses do not
            depend is absent.
        """
        numbers = range(len(self.records) + len(self.entry_points)) if piece is None else piece
        pairs: list[tuple[Tensor, Gradients]] = []
        for number, gradient, layout in zip(numbers, arrived, layouts, strict=True):
            if gradient is not None:
                pairs += self._at(number, gradient, layout)
        return self._by_parameter(pairs)

    def _at(
        self, number: int, gradient: Tensor, layout: Layout
    ) -> Iterable[tuple[Tensor, Gradients]]:
        """The per-example gradients from what arrived at one of `places`."""
        if number >= len(self.records):
            entry_point = self.entry_points[number - len(self.records)]
            return [self._at_entry(entry_point, gradient, layout)]
        record = self.records[number]
        with naming_refusals(record.place.module):
            return list(record.rule(gradient, layout))

    def _at_entry(
        self, entry_point: EntryPoint, gradient: Tensor, layout: Layout
    ) -> tuple[Tensor, Gradients]:
        """The per-example gradients of the tensor that entered there or, if its rows were looked
        up, of their table."""
        gradient = full_precision(gradient)
        lookup = self.lookups.get(id(entry_point.target))
        if lookup is not None and entry_point.aligned:
            return lookup.aligned_rows(gradient, layout)
        apart = entry_point.rule(gradient, layout)
        if lookup is None or id(lookup.table) in self.indirect:
            return entry_point.target, Dense(apart)
        return lookup.rows(apart)

    def _by_parameter(
        self, pairs: Iterable[tuple[Tensor, Gradients]]
    ) -> dict[Tensor, list[Gradients]]:
        """Group by parameter; gradients of tensors that were computed from parameters are
        back-propagated to these first."""
        found: dict[Tensor, list[Gradients]] = {}
        computed: dict[Tensor, Tensor] = {}
        for target, gradients in pairs:
            if target.is_leaf:
                found.setdefault(target, []).append(gradients)
            else:
                arrived = gradients.dense().reshape(-1, *target.shape)
                computed[target] = computed[target] + arrived if target in computed else arrived
        if computed:
            origins = {entry_point.target: entry_point.origin for entry_point in self.entry_points}
            entered = [
                (origins.get(target) or get_gradient_edge(target), gradient)
                for target, gradient in computed.items()
            ]
            inside = Computations(self.indirect, self.lookups.values(), self.products)
            for parameter, gradients in inside.gradients(entered):
                found.setdefault(parameter, []).append(gradients)
        return found


def back_propagate(
    output: Tensor, inputs: Sequence[Any], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """Compute the gradients of a scalar, None where it does not depend on an input.

    A tape that is active stays active. Under `torch.autograd.grad` it would not: torch hands that
    call to the tape as one operation, and suspends the tape meanwhile.

    Args:
        inputs: tensors or gradient edges.

    Raises:
        UnsupportedLayerError: activation checkpointing computes something else than before.
    """
    found: Sequence[Tensor | None]
    try:
        if _len_torch_function_stack():
            run, ones = torch.autograd.graph._engine_run_backward, (torch.ones_like(output),)
            found = run(
                (output,), ones, retain_graph, False, tuple(inputs), True, accumulate_grad=False
            )
        else:
            found = torch.autograd.grad(
                output, inputs, allow_unused=True, retain_graph=retain_graph
            )
    except CheckpointError as error:
        raise UnsupportedLayerError(
            "Expected activation checkpointing to compute what it computed before, got something "
            f"else ({str(error).strip().splitlines()[0]}): compute what depends on parameters "
            "alone inside what is checkpointed, or switch it off."
        ) from error
    return found
