"""What the tape writes down: which operations use trainable parameters, and how their gradients
are found.

A trainable parameter acts on the examples in one of three ways:

- an operation applies it to a batched tensor: a `Record`;
- it is a batch-independent tensor that enters the batch, as a bias that is added: an `EntryPoint`;
- a batch-independent tensor is computed from it, which then enters the batch. Most such
  computations are left to autograd; a table lookup is a `Lookup`, a linear layer a `Product`,
  whose gradients are cheaper in forms of their own than written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout, candidates, full_precision
from dpnlu.gradients.rows import Rows

# (gradient of a recorded output, where the examples lie in it) -> the tensors that the operation
# applied, each with its per-example gradients.
GradientRule = Callable[[Tensor, Layout], Iterable[tuple[Tensor, Gradients]]]
# (gradient that arrives where a batch-independent tensor enters the batch, where the examples lie
# in it) -> per-example gradients of that tensor, (B, *shape).
EntryRule = Callable[[Tensor, Layout], Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in the autograd graph where a gradient arrives with the examples apart.

    Attributes:
        edge: the edge of the graph.
        shape: shape of the gradient.
        dims: the dimensions that may hold the examples, the likeliest first.
        module: name of the module that ran.
        dtype: of the gradient.
        strides: strides of the gradient in what arrives, if that has another shape; None: it has
            not.
    """

    edge: GradientEdge
    shape: torch.Size
    dims: Sequence[int]
    module: str
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the gradient."""
        return self.shape.numel() * self.dtype.itemsize

    def seen(self, gradient: Tensor) -> Tensor:
        """What arrives at the edge, in the shape of this place."""
        if self.strides is None:
            return gradient
        return gradient.contiguous().as_strided(self.shape, self.strides)

    def layouts(self, batch: int) -> Iterator[Layout]:
        """The layouts that `batch` examples may have, the usual one first."""
        return candidates(self.shape, self.dims, batch)

    def described(self, batch: int) -> str:
        """A description that is equal for batches of any size and length with the same layout."""
        layout = next(self.layouts(batch), None)
        if layout is None:
            return f"{self.module} apart"
        return f"{self.module} {layout.dim} {self.shape[layout.dim] // batch}"

    def usual_layout(self, batch: int) -> Layout:
        """The layout, unless another is known.

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


@dataclass(frozen=True)
class Record:
    """An operation that applied trainable weights to a batched tensor.

    Attributes:
        place: where the gradient of its output arrives.
        rule: turns that gradient into per-example gradients of the weights.
    """

    place: Place
    rule: GradientRule


@dataclass(frozen=True, kw_only=True)
class EntryPoint:
    """Where a batch-independent tensor enters the batch.

    Attributes:
        place: where the gradient arrives with the examples apart.
        target: the batch-independent tensor.
        origin: the edge at which back-propagation of the target's gradient continues.
        rule: turns what arrives into per-example gradients of the target.
        aligned: what arrives has the target's shape, and the rows that belong to an example are its
            gradient of these rows of the target.
    """

    place: Place
    target: Tensor
    origin: GradientEdge
    rule: EntryRule
    aligned: bool = False


@dataclass(frozen=True)
class Lookup:
    """Rows of a trainable table looked up by batch-independent ids: positions, token types.

    Attributes:
        output: the rows; held so that its id stays its own.
        edge: where their gradient arrives.
        ids: numbers of the rows, of any shape.
        table: (V, d).
        padding_idx: number of the row that gets no gradient; None: there is none.
    """

    output: Tensor
    edge: GradientEdge
    ids: Tensor
    table: Tensor
    padding_idx: int | None

    def aligned_rows(self, gradient: Tensor, layout: Layout) -> tuple[Tensor, Gradients]:
        """The table's gradients from the gradient of `output`, in which each example has rows of
        its own."""
        return self._rows(layout.apart(self._kept_ids()), layout.apart(gradient))

    def rows(self, gradients: Tensor) -> tuple[Tensor, Gradients]:
        """The table's gradients from the per-example gradients of `output`, (B, *output.shape)."""
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
        # Gradients of a short table take less memory than one row per position. What belongs to
        # padding is added to a row beside the table's.
        offsets = (rows + 1) * torch.arange(batch, device=ids.device)
        places = ids.where(ids >= 0, rows) + offsets[:, None]
        sums = values.new_zeros(batch * (rows + 1), width)
        sums.index_add_(0, places.flatten(), values.flatten(0, 1))
        return self.table, Dense(sums.view(batch, rows + 1, width)[:, :rows])


@dataclass(frozen=True, eq=False)
class Product:
    """A linear layer applied to a batch-independent tensor: relative positions, a prompt.

    Attributes:
        edge: where the gradient of its output arrives.
        origin: the edge at which back-propagation of its input's gradient continues; None: the
            input needs no gradient.
        left: (…, d) its input.
        weight: (p, d).
        bias: (p,), or None.
    """

    edge: GradientEdge
    origin: GradientEdge | None
    left: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def learned(self) -> list[Tensor]:
        """Those of weight and bias that are trained."""
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]

    def used_rows(self, arrived: Tensor) -> tuple[Tensor, Tensor]:
        """Those rows of the output that any example uses, from its per-example gradients (B, …, p):
        their numbers (R,), and their gradients (B, R, p).

        Few relative positions occur in short texts: the others have gradient zero.
        """
        rows = arrived.reshape(len(arrived), -1, self.weight.shape[0])
        if isinstance(rows, FakeTensor):  # of a step that is compiled for all values
            return torch.arange(rows.shape[1], device=rows.device), rows
        is_used = (rows.amax(2) != 0) | (rows.amin(2) != 0)  # on a CPU much faster than any()
        used = is_used.any(0).nonzero()[:, 0]
        return used, rows[:, used]

    def gradients(self, used: Tensor, arrived: Tensor) -> Iterator[tuple[Tensor, Gradients]]:
        """Those of weight and bias, from the per-example gradients of the rows used."""
        left = self.left.detach().reshape(-1, self.weight.shape[1])[used]
        left, right = full_precision(left), full_precision(arrived)
        yield self.weight, OuterProducts(left.expand(len(right), *left.shape), right)
        if self.bias is not None and self.bias.requires_grad:
            yield self.bias, Dense(right.sum(1))

    def back(self, used: Tensor, arrived: Tensor, others: Tensor | None) -> Tensor:
        """The per-example gradients of the input, (B, …, d), from those of the rows used.

        Args:
            others: what comes to the input from other places: it is added to, in place.
        """
        whole = self.left.new_zeros(len(arrived), *self.left.shape) if others is None else others
        weight = self.weight.detach()
        rows = (arrived.to(weight.dtype) @ weight).to(whole.dtype)
        whole.view(len(arrived), -1, weight.shape[1]).index_add_(1, used, rows)
        return whole
