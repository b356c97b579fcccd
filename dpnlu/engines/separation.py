"""Whether gradients keep the examples apart, and which rows are whose.

The losses are back-propagated a second time with weights, powers of two drawn for each example.
Multiplying by a power of two commutes with rounding: where examples do not mix, the rows of an
example are exactly as many times what they were. Where they do, the others' weights, up to 2³¹
times as large, show in them. What this lets pass is an influence of one example on the gradients of
another that is smaller than their rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.records import Place
from dpnlu.gradients.trace import Trace, back_propagate

# Exponents of the random powers of two; few where they would leave a narrow range of numbers.
_EXPONENTS, _FEW_EXPONENTS = 32, 4
# A row may differ by so many units in the last place of its largest entry, where kernels add up in
# another order every time; numbers of few digits by fewer.
_UNITS, _FEW_UNITS = 16, 2
# Entries that are compared at once: comparing takes several times the memory of what it compares.
_AT_ONCE = 2**18


def draw_weights(losses: Tensor, *, narrow: bool, generator: torch.Generator) -> Tensor:
    """(B,) random powers of two, of as many exponents as the range of numbers allows.

    Args:
        narrow: some gradients are kept in float16.
    """
    count = _FEW_EXPONENTS if narrow else _EXPONENTS
    order = torch.randperm(len(losses), generator=generator) % count
    apart = (count - 1) // max(1, min(len(losses), count) - 1)
    return torch.exp2((order * apart).to(losses))


@dataclass(frozen=True)
class Separated:
    """What arrives at some places, with the examples apart.

    Attributes:
        piece: the numbers of the places.
        arrived: by a backward pass from the losses; None: nothing.
        layouts: where the examples lie.
    """

    piece: list[int]
    arrived: list[Tensor | None]
    layouts: list[Layout]


def do_rows_agree(
    trace: Trace,
    losses: Tensor,
    arrived: Sequence[Tensor | None],
    layouts: Sequence[Layout],
    weights: Tensor,
) -> Tensor:
    """() whether at each place the rows of an example are its own, if they lie as expected; the
    graph of the losses stays."""
    again = trace.backward(losses * weights, retain_graph=True)
    return _all_agree(arrived, again, layouts, weights)


def _all_agree(
    arrived: Sequence[Tensor | None],
    again: Sequence[Tensor | None],
    layouts: Sequence[Layout],
    weights: Tensor,
) -> Tensor:
    agree = [
        rows_agree(first, second, layout, weights).all()
        for first, second, layout in zip(arrived, again, layouts, strict=True)
        if first is not None and second is not None
    ]
    return torch.stack(agree).all() if agree else weights.new_ones((), dtype=torch.bool)


def rows_agree(first: Tensor, second: Tensor, layout: Layout, weights: Tensor) -> Tensor:
    """(B,) whether each example's rows in `second` are those of `first` times its weight; where
    they are not finite nothing can be said."""
    return _agree(layout.apart(first), layout.apart(second), weights)


def _agree(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    rows = max(1, _AT_ONCE // max(1, first.shape[1:].numel()))
    found = [_rows_agree(*some) for some in _split(rows, first, second, weights)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _split(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of each at a time; of none, all at once."""
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _rows_agree(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    expected = first * weights.to(first.dtype).view(-1, *(1,) * (first.dim() - 1))
    known = torch.isfinite(expected) & torch.isfinite(second)
    expected = torch.where(known, expected, 0).flatten(1)
    difference = (torch.where(known, second, 0).flatten(1) - expected).abs()
    if not difference.shape[1]:
        return known.new_ones(len(first))
    info = torch.finfo(first.dtype)
    largest = expected.abs().amax(1, keepdim=True)
    units = _UNITS if info.bits > 16 else _FEW_UNITS
    # What underflow takes away is not multiplied with the rest.
    smallest = 64 * info.smallest_normal * info.eps * weights[:, None].to(first)
    lost = units * info.eps * largest + smallest
    return (difference <= lost).all(1)


def separate(
    trace: Trace,
    losses: Tensor,
    expected: Sequence[Layout | None],
    *,
    chooses_rows: bool,
    generator: torch.Generator,
) -> Iterator[Separated]:
    """Find where the examples truly lie at each place, piece by piece; the graph of the losses
    stays.

    Args:
        losses: (B,), B >= 2.
        expected: where they are expected at each place; None: nowhere.
        chooses_rows: rows were chosen by their values, which the message says.
        generator: of weights.

    Raises:
        UnsupportedLayerError: examples mix.
    """
    places = trace.places
    narrow = torch.float16 in {losses.dtype, *(place.dtype for place in places)}
    weights = draw_weights(losses, narrow=narrow, generator=generator)
    mixed: list[tuple[int, Tensor, Tensor]] = []
    for piece in trace.pieces():
        yield _separated(trace, losses, weights, piece, expected, mixed)
    if not mixed:
        return
    numbers, arrived = [number for number, *_ in mixed], [first for _, first, _ in mixed]
    owned = _owners(trace, losses, arrived, numbers, narrow=narrow)
    for number, one, other in reversed(mixed):
        owner = owned.get(number)
        if owner is None or not bool(rows_agree(one, other, owner, weights).all()):
            raise UnsupportedLayerError(_mixing(trace, losses, number, chooses_rows=chooses_rows))
    yield Separated(numbers, list(arrived), [owned[number] for number in numbers])


def _separated(
    trace: Trace,
    losses: Tensor,
    weights: Tensor,
    piece: Sequence[int],
    expected: Sequence[Layout | None],
    mixed: list[tuple[int, Tensor, Tensor]],
) -> Separated:
    """The places of a piece where a layout fits; of the others, the number and what arrived without
    weights and with them are added to `mixed`."""
    first = trace.backward(losses, piece=piece, retain_graph=True)
    second = trace.backward(losses * weights, piece=piece, retain_graph=True)
    layouts = _fitting_layouts(trace, piece, first, second, expected, weights)
    found = Separated([], [], [])
    for number, one, other, layout in zip(piece, first, second, layouts, strict=True):
        if layout is not None:
            found.piece.append(number)
            found.arrived.append(one)
            found.layouts.append(layout)
        elif one is not None and other is not None:
            mixed.append((number, one, other))
    return found


def layouts_of(pieces: Iterable[Separated]) -> list[Layout]:
    """The layouts at all places, in order."""
    found: dict[int, Layout] = {}
    for some in pieces:
        found |= zip(some.piece, some.layouts, strict=True)
    return [found[number] for number in sorted(found)]


def _fitting_layouts(
    trace: Trace,
    piece: Sequence[int],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    expected: Sequence[Layout | None],
    weights: Tensor,
) -> list[Layout | None]:
    """The layouts at the places of a piece; None where none fits."""
    here = [expected[number] for number in piece]
    usual = [layout for layout in here if layout is not None]
    if len(usual) == len(here) and bool(_all_agree(first, second, usual, weights)):
        return here
    places = trace.places
    tried = [[expected[number], *places[number].layouts(len(weights))] for number in piece]
    return [_fitting(*each, weights) for each in zip(first, second, tried, strict=True)]


def _fitting(
    first: Tensor | None,
    second: Tensor | None,
    layouts: Sequence[Layout | None],
    weights: Tensor,
) -> Layout | None:
    """The first of the layouts by which the rows of an example are its own; where nothing arrived
    any does."""
    if first is None or second is None:
        return Layout(len(weights))
    tried = (layout for layout in layouts if layout is not None)
    return next((one for one in tried if bool(rows_agree(first, second, one, weights).all())), None)


def _owners(
    trace: Trace,
    losses: Tensor,
    arrived: Sequence[Tensor],
    unknown: Sequence[int],
    *,
    narrow: bool,
) -> dict[int, Layout]:
    """Whose each row is at the places `unknown`, where every row is somebody's.

    The weights of the examples spell their numbers, digit by digit.

    Args:
        arrived: at these places.
    """
    firsts = dict(zip(unknown, arrived, strict=True))
    batch, places = len(losses), trace.places
    base = _FEW_EXPONENTS if narrow else _EXPONENTS // 2
    owners: dict[tuple[int, int], Tensor] = {}
    for power in _powers(base, batch):
        digits = torch.arange(batch, device=losses.device) // power % base
        weighted = losses * torch.exp2(digits.to(losses))
        again = trace.backward(weighted, piece=unknown, retain_graph=True)
        seconds = dict(zip(unknown, again, strict=True))
        for number, dim in [(place, dim) for place in unknown for dim in places[place].dims]:
            first, second = firsts[number], seconds[number]
            if second is not None and dim < first.dim():
                digit = _digits(_as_rows(first, dim), _as_rows(second, dim), base)
                known = owners.get((number, dim), torch.zeros_like(digit))
                spelt = known + digit * power
                owners[number, dim] = torch.where((digit < 0) | (known < 0), -2, spelt)
    found: dict[int, Layout] = {}
    for (number, dim), owner in owners.items():
        owner = torch.where(_as_rows(firsts[number], dim).any(1), owner, -1)
        if number not in found and bool(((owner >= -1) & (owner < batch)).all()):
            found[number] = Layout(batch, dim, owners=owner)
    return found


def _as_rows(values: Tensor, dim: int) -> Tensor:
    """(…, n, …) -> (n, k)."""
    rows = values.movedim(dim, 0)
    return rows.reshape(len(rows), rows.shape[1:].numel())


def _powers(base: int, batch: int) -> Iterator[int]:
    power = 1
    while power < batch:
        yield power
        power *= base


def _digits(first: Tensor, second: Tensor, base: int) -> Tensor:
    """(n, k) twice -> (n,) the digit d with second = 2^d first in each row; -1 where there is
    none."""
    place = first.abs().argmax(1, keepdim=True)
    ratio = (second.gather(1, place) / first.gather(1, place))[:, 0]
    digit = torch.log2(ratio.clamp(min=0.25).nan_to_num(0.25, posinf=0.25)).round()
    fits = (digit >= 0) & (digit < base) & _agree(first, second, torch.exp2(digit))
    return torch.where(fits | ~first.any(1), digit.clamp(min=0).long(), -1)


def _mixing(trace: Trace, losses: Tensor, number: int, *, chooses_rows: bool) -> str:
    """What to say of a place where examples mix, with the first two that do."""
    place = trace.places[number]
    pair = _mixed_pair(place, losses)
    evidence = ""
    if pair is not None:
        evidence = f": the loss of example {pair[0]} depends on what it is for example {pair[1]}"
    routing = (
        "; rows are chosen by their values, by routing, sorting or a mask" if chooses_rows else ""
    )
    return (
        f"Module {place.module}: examples mix in what is made of its output, of shape "
        f"{tuple(place.shape)}{evidence}{routing}; "
        "expected the loss of one example to depend on that example alone: remove what mixes them "
        "(batch statistics, in-batch negatives, a mean over the batch inside the loss)."
    )


def _mixed_pair(place: Place, losses: Tensor) -> tuple[int, int] | None:
    """An example whose loss reaches the rows of another, and that one."""
    layout = next(place.layouts(len(losses)), None)
    if layout is None:
        return None
    for number, loss in enumerate(losses):
        (found,) = back_propagate(loss, [place.edge], retain_graph=True)
        if found is None:
            continue
        touched = layout.apart(place.seen(found)).flatten(1).ne(0).any(1)
        touched[number] = False
        if bool(touched.any()):
            return number, int(touched.nonzero()[0])
    return None
