"""The trace: what the tape recorded, and the way back from losses to per-example gradients."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import _len_torch_function_stack  # type: ignore[attr-defined]
from torch.utils.checkpoint import CheckpointError

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import (
    Dense,
    Gradients,
)
from dpnlu.gradients.layout import Layout, candidates, full_precision
from dpnlu.gradients.rows import Rows

# (gradient w.r.t. a recorded output, where the examples lie in it) -> per-example gradients of the
# tensors that made it.
Finish = Callable[[Tensor, Layout], Iterable[tuple[Tensor, Gradients]]]
# (gradient that arrives where a free tensor met the batch, likewise) -> (B, *shape of that tensor).
PerExample = Callable[[Tensor, Layout], Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in the graph where a gradient arrives with the examples apart.

    Attributes:
        edge: where exactly.
        shape: what the gradient is to be seen as.
        strides: how it lies in what arrives, in contiguous memory; None: as it is.
        dims: the dimensions that may hold the examples, the likeliest first.
        module: name of the module that ran.
    """

    edge: GradientEdge
    shape: torch.Size
    dims: Sequence[int]
    module: str
    strides: tuple[int, ...] | None = None

    def seen(self, gradient: Tensor) -> Tensor:
        """What arrives at the edge, in its shape."""
        if self.strides is None:
            return gradient
        return gradient.contiguous().as_strided(self.shape, self.strides)

    def layouts(self, batch: int) -> Iterator[Layout]:
        """How the examples may lie in it."""
        return candidates(self.shape, self.dims, batch)

    def described(self, batch: int) -> str:
        """The same for batches of any size and length in which the examples lie alike."""
        layout = next(self.layouts(batch), None)
        if layout is None:
            return f"{self.module} apart"
        return f"{self.module} {layout.dim} {self.shape[layout.dim] // batch}"

    def usual_layout(self, batch: int) -> Layout:
        """How they lie unless it is known otherwise.

        Raises:
            UnsupportedLayerError: no dimension can hold the examples.
        """
        layout = next(self.layouts(batch), None)
        if layout is None and batch:
            raise UnsupportedLayerError(
                f"Module {self.module}: expected the {batch} examples in dimension 0 of what it "
                f"computes, got shape {tuple(self.shape)}: put the examples first "
                "(batch_first=True), and let nothing be added up or picked over them."
            )
        return layout or Layout(batch, self.dims[0])


@dataclass(frozen=True, kw_only=True)
class Record(Place):
    """A batched output of trainable weights."""

    finish: Finish


@dataclass(frozen=True, kw_only=True)
class Meeting(Place):
    """A place where a free tensor met the batch.

    Attributes:
        target: the free tensor.
        origin: where its gradient goes on from here.
        per_example: its gradients from what arrives.
        aligned: what arrives has the target's shape, and an example's own rows are its share of it.
    """

    target: Tensor
    origin: GradientEdge
    per_example: PerExample
    aligned: bool = False


@dataclass(frozen=True)
class Lookup:
    """Rows of a trainable table looked up by ids free of the batch: positions, token types.

    Attributes:
        output: the rows; held so that its id stays its own.
        edge: where their gradient arrives.
    """

    output: Tensor
    edge: GradientEdge
    ids: Tensor
    table: Tensor
    padding_idx: int | None

    def aligned_rows(self, gradient: Tensor, layout: Layout) -> tuple[Tensor, Gradients]:
        """The table's gradients from that of `output`, of which each example has rows of its
        own."""
        return self._rows(layout.apart(self._kept_ids()), layout.apart(gradient))

    def rows(self, gradients: Tensor) -> tuple[Tensor, Gradients]:
        """The table's gradients from those of `output`, (B, *output.shape)."""
        ids = self._kept_ids()
        return self._rows(ids.expand(len(gradients), *ids.shape), gradients)

    def _kept_ids(self) -> Tensor:
        if self.padding_idx is None:
            return self.ids
        return self.ids.masked_fill(self.ids == self.padding_idx % self.table.shape[0], -1)

    def _rows(self, ids: Tensor, gradients: Tensor) -> tuple[Tensor, Gradients]:
        batch, (rows, width) = len(ids), self.table.shape
        positions = ids.shape[1:].numel()
        ids, values = ids.reshape(batch, positions), gradients.reshape(batch, positions, width)
        if positions < rows:
            return self.table, Rows(ids, values, (rows, width))
        # A short table's gradients are smaller than its rows. Those of padding go beside it.
        offsets = (rows + 1) * torch.arange(batch, device=ids.device)
        places = ids.where(ids >= 0, rows) + offsets[:, None]
        sums = values.new_zeros(batch * (rows + 1), width)
        sums.index_add_(0, places.flatten(), values.flatten(0, 1))
        return self.table, Dense(sums.view(batch, rows + 1, width)[:, :rows])


@dataclass(frozen=True)
class Product:
    """A layer applied to what is free of the batch, such as relative positions or a prompt.

    Attributes:
        edge: where the gradient of what it returned arrives.
        left: (…, d) what it received.
        weight: (p, d).
        bias: (p,).
    """

    edge: GradientEdge
    left: Tensor
    weight: Tensor
    bias: Tensor | None

    def gradients(self, arrived: Tensor) -> Iterator[tuple[Tensor, Gradients]]:
        """Of weight and bias, from that of what the layer returned, (B, …, p)."""
        batch, (outputs, inputs) = len(arrived), self.weight.shape
        right = arrived.reshape(batch, -1, outputs)
        left = full_precision(self.left.detach()).reshape(-1, inputs)
        if not isinstance(right, FakeTensor):
            used = (right != 0).any(2).any(0).nonzero()[:, 0]  # few positions may be near enough
            left, right = left[used], right[:, used]
        yield self.weight, OuterProducts(left.expand(batch, *left.shape), right)
        if self.bias is not None:
            yield self.bias, Dense(right.sum(1))


@dataclass
class Nodes:
    """Nodes of the autograd graph, by torch's count of them, which rises as they are made."""

    _spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> None:
        """Those numbered from `start` to before `end`."""
        if self._spans and self._spans[-1][1] == start:
            self._spans[-1] = (self._spans[-1][0], end)
        elif end > start:
            bisect.insort(self._spans, (start, end))

    def __contains__(self, node: Node | None) -> bool:
        if node is None:
            return False
        number = node._sequence_nr()
        place = bisect.bisect_right(self._spans, (number, math.inf)) - 1
        return place >= 0 and number < self._spans[place][1]


@dataclass
class Trace:
    """What one or several forward passes did with the trainable parameters.

    Attributes:
        records: operations that applied parameters to the batch.
        meetings: where tensors free of the batch, parameters or made from them, met it.
        lookups: table lookups free of the batch, by the id of their output.
        products: layers applied to what is free of the batch.
        in_free: parameters that entered computations free of the batch, by id.
        seen: the nodes of operations that were seen.
    """

    records: list[Record] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)
    lookups: dict[int, Lookup] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    in_free: dict[int, Tensor] = field(default_factory=dict)
    seen: Nodes = field(default_factory=Nodes)

    @property
    def places(self) -> list[Place]:
        """Where gradients arrive."""
        return [*self.records, *self.meetings]

    def backward(self, losses: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        """Back-propagate the sum of `losses` (B,) once; what arrives at each of `places`, None
        where nothing does."""
        places = self.places
        if not places or not len(losses):
            return [None] * len(places)
        edges = [place.edge for place in places]
        found = back_propagate(losses.sum(), edges, retain_graph=retain_graph)
        return [
            None if gradient is None else place.seen(gradient)
            for gradient, place in zip(found, places, strict=True)
        ]

    def usual_layouts(self, arrived: Sequence[Tensor | None], batch: int) -> list[Layout]:
        """Where the examples lie at each place, unless it is known otherwise.

        Raises:
            UnsupportedLayerError: there is a place where no dimension can hold them.
        """
        return [
            Layout(batch, place.dims[0]) if gradient is None else place.usual_layout(batch)
            for place, gradient in zip(self.places, arrived, strict=True)
        ]

    def expected_layouts(self, arrived: Sequence[Tensor | None], batch: int) -> list[Layout | None]:
        """The same, None where no dimension can hold the examples."""
        return [
            Layout(batch, place.dims[0]) if gradient is None else next(place.layouts(batch), None)
            for place, gradient in zip(self.places, arrived, strict=True)
        ]

    def gradients(
        self, arrived: Sequence[Tensor | None], layouts: Sequence[Layout]
    ) -> dict[Tensor, list[Gradients]]:
        """The per-example gradients, from what arrived at each of `places`.

        Returns:
            Parameter -> its uses, whose gradients add up. A parameter on which the losses do not
            depend is absent.
        """
        count = len(self.records)
        pairs: list[tuple[Tensor, Gradients]] = []
        for record, gradient, layout in zip(self.records, arrived, layouts, strict=False):
            if gradient is not None:
                with naming_refusals(record.module):
                    pairs += record.finish(gradient, layout)
        for meeting, gradient, layout in zip(
            self.meetings, arrived[count:], layouts[count:], strict=True
        ):
            if gradient is not None:
                pairs.append(self._arrival(meeting, gradient, layout))
        return self._by_parameter(pairs)

    def _arrival(
        self, meeting: Meeting, gradient: Tensor, layout: Layout
    ) -> tuple[Tensor, Gradients]:
        """What arrived at a meeting, as per-example gradients of the table or tensor behind it."""
        gradient = full_precision(gradient)
        lookup = self.lookups.get(id(meeting.target))
        if lookup is not None and meeting.aligned:
            return lookup.aligned_rows(gradient, layout)
        apart = meeting.per_example(gradient, layout)
        if lookup is None or id(lookup.table) in self.in_free:
            return meeting.target, Dense(apart)
        return lookup.rows(apart)

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
        origins = {meeting.target: meeting.origin for meeting in self.meetings}
        edges = [origins.get(target) or get_gradient_edge(target) for target in derived]
        parameters = list(self.in_free.values())
        lookups = [use for use in self.lookups.values() if id(use.table) not in self.in_free]
        inside = [use.edge for use in lookups] + [use.edge for use in self.products]
        found = iter(_each_back(edges, list(derived.values()), [*parameters, *inside]))
        for parameter, gradient in zip(parameters, found, strict=False):
            if gradient is not None:
                yield parameter, Dense(gradient)
        for use, gradient in zip(lookups, found, strict=False):
            if gradient is not None:
                yield use.rows(gradient)
        for product, gradient in zip(self.products, found, strict=True):
            if gradient is not None:
                # One that also entered in another way has both gradients already.
                pairs = product.gradients(full_precision(gradient))
                yield from ((p, use) for p, use in pairs if id(p) not in self.in_free)


def _each_back(
    outputs: list[GradientEdge], gradients: list[Tensor], inputs: list[Any]
) -> Sequence[Tensor | None]:
    """Back-propagate the gradients (B, …) of outputs for each example, side by side or, where a
    function of the model's own stands in the way, one after the other."""

    def back(grad_outputs: list[Tensor], *, batched: bool) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            outputs,
            inputs,
            grad_outputs=grad_outputs,
            is_grads_batched=batched,
            allow_unused=True,
            retain_graph=True,
        )
        return found

    if not inputs:
        return []
    try:
        return back(gradients, batched=True)
    except RuntimeError:
        each = [back(list(one), batched=False) for one in zip(*gradients, strict=True)]
        return [
            None if rows[0] is None else torch.stack([row for row in rows if row is not None])
            for rows in zip(*each, strict=True)
        ]


def back_propagate(
    output: Tensor, inputs: Sequence[Any], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """The gradients of a scalar, None where it does not depend on an input. A tape that is active
    stays so, which it does not in `torch.autograd.grad`: that is an operation that a tape sees.

    Args:
        inputs: tensors or gradient edges.

    Raises:
        UnsupportedLayerError: what is computed anew for it is not what it was.
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


@contextmanager
def naming_refusals(module: str) -> Iterator[None]:
    """Name the module in what is refused here."""
    try:
        yield
    except UnsupportedLayerError as error:
        if str(error).startswith("Module "):
            raise
        raise UnsupportedLayerError(f"Module {module}: {error}") from None
