"""Packed sequences: rows of sequences of unequal lengths, step by step, longest first.

Which row belongs to which sequence depends on all lengths of the batch. So packing and unpacking
are nodes of their own in the autograd graph, which keep how it was done. From these nodes
`dpnlu.gradients.signature` can tell that rows are unpacked in the way they were packed, with no
operation in between. Where no gradient flows back to what was packed, it does not matter how it was
packed: then the losses alone decide which sequence belongs to which example.

Shapes: T steps, B sequences, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Packing:
    """How sequences were packed.

    Attributes:
        counts: (T,) number of sequences that have each step, on the CPU as torch keeps it.
        place: (B,) each sequence's place in packed order; None: that is the batch's own order.
        device: where the sequences are.
        present: (T, B) whether a sequence has that step, in packed order.
    """

    counts: Tensor
    place: Tensor | None
    device: torch.device = _CPU
    present: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = self.counts.to(self.device)
        present = torch.arange(int(self.counts[0]), device=self.device) < counts[:, None]
        object.__setattr__(self, "present", present)

    def spread(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """(R, …) -> (T, B, …) in packed order, `fill` where a sequence is over."""
        padded = rows.new_full((*self.present.shape, *rows.shape[1:]), fill)
        padded[self.present] = rows
        return padded

    def unpack(self, rows: Tensor) -> Tensor:
        """(R, …) -> (T, B, …) in the batch's own order, zero where a sequence is over."""
        return self.unsorted(self.spread(rows))

    def pack(self, padded: Tensor) -> Tensor:
        """The inverse of `unpack`."""
        return self.sorted(padded)[self.present]

    def sorted(self, states: Tensor) -> Tensor:
        """(·, B, …) from the batch's own order into packed order."""
        return states if self.place is None else states[:, self.place.argsort()]

    def unsorted(self, states: Tensor) -> Tensor:
        """(·, B, …) from packed order into the batch's own."""
        return states if self.place is None else states[:, self.place]

    def reversed(self, padded: Tensor) -> Tensor:
        """(T, B, …): each sequence reversed; what is past its end stays where it is."""
        steps = torch.arange(padded.shape[0], device=self.present.device)
        source = torch.where(steps <= self.last[:, None], self.last[:, None] - steps, steps)
        return _at_steps(padded, source)

    def at_end(self, padded: Tensor) -> Tensor:
        """(T, B, …) -> (B, …): each sequence at its last step."""
        return _at_steps(padded, self.last[:, None])[0]

    @property
    def last(self) -> Tensor:
        """(B,) last step of each sequence, in the batch's own order."""
        return self.unsorted(self.present.sum(0, keepdim=True))[0] - 1

    def equals(self, other: Packing) -> bool:
        """Whether both put the same sequences into the same rows."""
        return torch.equal(self.counts, other.counts) and self.is_undone_by(other.place)

    def is_undone_by(self, order: Tensor | None) -> bool:
        """Whether taking packed sequences in this order (None: as they are) gives the batch's."""
        if self.place is None or order is None:
            return self.place is order
        return torch.equal(self.place, order)

    def is_order(self, order: Tensor) -> bool:
        """Whether taking the batch's sequences in this order gives the packed one."""
        return self.place is not None and torch.equal(self.place.argsort(), order)


def _at_steps(padded: Tensor, steps: Tensor) -> Tensor:
    """(T, B, …) and (B, S) steps to take of each sequence -> (S, B, …).

    It gathers along dimension 1 of (B, T, …), so that examples evidently keep their places.
    """
    by_example = padded.transpose(0, 1)
    index = steps.view(*steps.shape, *(1,) * (padded.dim() - 2))
    taken = by_example.gather(1, index.expand(*steps.shape, *padded.shape[2:]))
    return taken.transpose(0, 1)


class PackRows(torch.autograd.Function):
    """(T, B, …) in the batch's own order -> (R, …)."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.pack(padded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packing.unpack(gradient), None


class UnpackRows(torch.autograd.Function):
    """(R, …) -> (T, B, …) in the batch's own order, zero where a sequence is over."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.unpack(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packing.pack(gradient), None


class SortStates(torch.autograd.Function):
    """(·, B, …) in the batch's own order -> in packed order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing.sorted(states).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packing.unsorted(gradient), None


class SpreadRows(torch.autograd.Function):
    """(R, …) -> (B, T, …) or (T, B, …) in packed order: the first step of torch's own unpacking."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, packing: Packing, batch_first: bool, fill: float, steps: int
    ) -> Tensor:
        ctx.packing, ctx.batch_first = packing, batch_first
        padded = packing.spread(rows, fill)
        if steps > len(padded):
            rest = padded.new_full((steps - len(padded), *padded.shape[1:]), fill)
            padded = torch.cat((padded, rest))
        # Not a view, as the caller may change it in place.
        return padded.transpose(0, 1).contiguous() if batch_first else padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient = gradient.transpose(0, 1) if ctx.batch_first else gradient
        present = ctx.packing.present
        return gradient[: len(present)][present], None, None, None, None
