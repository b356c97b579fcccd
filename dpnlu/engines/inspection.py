"""A batch's gradients beside those of plain automatic differentiation, piece by piece.

The graph of the losses takes much memory while it is needed, and so would all that arrives at all
places together. So a batch that is checked is gone through in pieces of its places: first for the
sizes of the examples' gradients, then for the comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpnlu.engines.clipped import gradient_norms
from dpnlu.engines.free_memory import hand_back
from dpnlu.engines.separation import Separated
from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.rounding import coarsest_of, full_precision, growth
from dpnlu.gradients.trace import Trace
from dpnlu.gradients.uses import combine

# Error of a sum of gradients that passes as rounding inside an operation, relative to the sum of
# the norms of all its terms.
TOLERANCE = 1e-4
# Gradients of so many entries are compared in place.
_LARGE = 2**20


@dataclass
class Sketch:
    """What was seen of a batch on going through its places.

    Attributes:
        squares: (B,) squared norms of the examples' gradients, without what the uses of a parameter
            at several pieces have in common: good enough for a scale.
        coarsest: distance from 1 to the next number, of the coarsest gradients that arrived.
        layouts: of each place, by its number.
        pieces: the numbers of the places, as they were gone through.
        used: of each piece, the parameters that are used in it.
    """

    squares: Tensor
    coarsest: float = 0.0
    layouts: dict[int, Layout] = field(default_factory=dict)
    pieces: list[list[int]] = field(default_factory=list)
    used: list[list[Tensor]] = field(default_factory=list)

    def add(self, some: Separated, gradients: Mapping[Tensor, Sequence[Gradients]]) -> None:
        """Add a piece, with the gradients of the parameters that are used in it."""
        parts = {parameter: combine(uses) for parameter, uses in gradients.items()}
        self.squares = self.squares + gradient_norms(parts, self.squares).values
        self.coarsest = max(self.coarsest, coarsest_of(some.arrived))
        self.layouts |= zip(some.piece, some.layouts, strict=True)
        self.pieces.append(some.piece)
        self.used.append(list(parts))

    @property
    def in_order(self) -> list[Layout]:
        """The layouts of all places."""
        return [self.layouts[number] for number in sorted(self.layouts)]


@dataclass(frozen=True)
class Comparison:
    """Of the gradients of a weighted sum of the losses.

    Attributes:
        weights: (B,).
        errors: (P,) of each parameter, the distance between the two gradients.
        tolerances: (P,) what passes as rounding in the parameter's own gradient.
        coarsest: distance from 1 to the next number, of the coarsest gradients that were used.
    """

    weights: Tensor
    errors: Tensor
    tolerances: Tensor
    coarsest: float


def all_pieces(trace: Trace, losses: Tensor, layouts: Sequence[Layout]) -> Iterator[Separated]:
    """What arrives at the places, piece by piece; the graph of the losses stays."""
    for piece in trace.pieces():
        arrived = trace.backward(losses, piece=piece, retain_graph=True)
        yield Separated(piece, arrived, [layouts[number] for number in piece])


def sketch(trace: Trace, losses: Tensor, separated: Iterable[Separated]) -> Sketch:
    """Go through what arrives at the places; losses are (B,)."""
    found = Sketch(losses.detach().new_zeros(len(losses)))
    for some in separated:
        with full_precision(losses.device):
            found.add(some, trace.gradients(some.arrived, some.layouts, piece=some.piece))
        del some  # before there is more
        hand_back(trace)
    return found


def compare(
    trace: Trace,
    losses: Tensor,
    weights: Tensor,
    seen: Sketch,
    parameters: Sequence[Tensor],
) -> Comparison:
    """Compare the gradients of a weighted sum of the losses; their graph stays.

    A parameter's gradient by automatic differentiation is found with the first piece that uses it,
    and what the tape saw taken from it, piece by piece.

    Args:
        losses, weights: (B,), B >= 1.
        parameters: all of them.
    """
    running = _Running(len(losses), seen.coarsest)
    for number, piece in enumerate(seen.pieces):
        is_last = number + 1 == len(seen.pieces)
        used = parameters if is_last else seen.used[number]
        new = [parameter for parameter in used if parameter not in running.tolerances]
        # Products of lower precision, which a user may have asked for, would differ from ours.
        with full_precision(losses.device):
            found = trace.backward(losses * weights, piece=piece, parameters=new, retain_graph=True)
        with full_precision(losses.device), torch.no_grad():
            shared = _storages(found)
            for parameter in reversed(new):
                running.begin(parameter, found.pop(), shared)
            layouts = [seen.layouts[place] for place in piece]
            for parameter, uses in trace.gradients(found, layouts, piece=piece).items():
                running.subtract(parameter, uses)
            del found
            later = {parameter for used in seen.used[number + 1 :] for parameter in used}
            running.end(later)
            hand_back(trace)
    return Comparison(
        weights=weights,
        errors=torch.stack([running.errors[parameter] for parameter in parameters]),
        tolerances=torch.stack([running.tolerances[parameter] for parameter in parameters]),
        coarsest=seen.coarsest,
    )


class _Running:
    """A comparison that is under way.

    Attributes:
        residuals: parameter -> what is left of its gradient by automatic differentiation.
        errors: parameter -> () the norm of what was left at the end.
        tolerances: parameter -> () what rounding may have done.
    """

    def __init__(self, batch: int, coarsest: float) -> None:
        """Nothing is compared yet.

        Args:
            coarsest: distance from 1 to the next number, of the coarsest gradients that are used.
        """
        self.residuals: dict[Tensor, Tensor] = {}
        self.errors: dict[Tensor, Tensor] = {}
        self.tolerances: dict[Tensor, Tensor] = {}
        self._batch, self._coarsest = batch, coarsest

    def begin(self, parameter: Tensor, expected: Tensor | None, shared: Counter[int]) -> None:
        """Start with the gradient of automatic differentiation; None: the losses do not depend on
        the parameter."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if expected is None:
            residual = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        else:
            residual = expected.to(dtype, memory_format=torch.contiguous_format)
            # A copy of a large gradient, such as that of a table, would be the peak of all memory.
            is_own = shared[_storage(expected)] == 1 and expected.numel() >= _LARGE
            if residual is expected and not is_own:
                residual = residual.clone(memory_format=torch.contiguous_format)
        self.residuals[parameter] = residual
        self.tolerances[parameter] = residual.new_zeros(())

    def subtract(self, parameter: Tensor, uses: Sequence[Gradients]) -> None:
        """Take away what the tape saw of B weighted losses."""
        residual = self.residuals[parameter]
        for use in uses:
            use.add_weighted_sum(-residual.new_ones(self._batch), residual)
            terms = self._batch * (use.terms + 1)
            share = TOLERANCE + growth(terms, residual.dtype) + 4 * self._coarsest
            self.tolerances[parameter] = self.tolerances[parameter] + share * use.sizes().sum()

    def end(self, later: Set[Tensor]) -> None:
        """Be done with all parameters but those that are used `later`, too."""
        for parameter in [one for one in self.residuals if one not in later]:
            self.errors[parameter] = self.residuals.pop(parameter).norm()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # also defined while a program is traced


def _storages(tensors: Sequence[Tensor | None]) -> Counter[int]:
    return Counter(_storage(tensor) for tensor in tensors if tensor is not None)
