"""Whether what the tape says of a batch is so.

Three questions, each with an answer that does not depend on how small or large gradients are:

1. *Was everything seen?* Every node of the graph that uses a trainable parameter must come from an
   operation that the tape saw. No number is looked at, so that this is asked of every batch.
2. *Is each example's gradient its own?* The losses are back-propagated a second time with weights,
   powers of two drawn for each example. Multiplying by a power of two commutes with rounding: where
   examples do not mix, the rows of an example are exactly as many times what they were. Where they
   do, the others' weights, up to 2³¹ times as large, show in them.
3. *Are the parameters' gradients right?* A weighted sum of them is compared with what automatic
   differentiation says of the same weighted losses, and the norms of some with those of gradients
   that are written out.

The second is a matter of the guarantee: what it lets pass is an influence of one example on the
gradients of another that is smaller than their rounding. The third is one of our own mistakes: an
example's contribution is clipped by its own norm whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from dpnlu.engines.clipped import Parts, weighted_sum
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Gradients, SquaredNorms
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.rounding import full_precision, growth
from dpnlu.gradients.signature import OF_A_PARAMETER, Edge
from dpnlu.gradients.trace import Place, Trace, back_propagate

# Exponents of the random powers of two; few where they would leave a narrow range of numbers.
_EXPONENTS, _FEW_EXPONENTS = 32, 4
# A row may differ by so many units in the last place of its largest entry, where kernels add up in
# another order every time; numbers of few digits by fewer.
_UNITS, _FEW_UNITS = 16, 2
# Error of a sum of gradients that passes as rounding inside an operation, relative to the sum of
# the norms of all its terms.
_TOLERANCE = 1e-4
# How many examples have their norms compared.
_NORMS = 3


# ---- was everything seen? --------------------------------------------------------------------


def check_seen(
    edges: Sequence[Edge], trace: Trace, free: Sequence[Tensor], names: Mapping[Tensor, str]
) -> None:
    """Every use of a trainable parameter, and of what was computed from some alone, was seen.

    Args:
        free: tensors free of the batch that were computed from parameters.
        names: of the trainable parameters.

    Raises:
        UnsupportedLayerError: one was not.
    """
    made = {tensor.grad_fn for tensor in free}
    unseen: list[tuple[Edge, str]] = []
    for edge in edges:
        name = edge.node.name()
        if name == "CheckpointFunctionBackward":
            raise UnsupportedLayerError(_REENTRANT)
        if name == OF_A_PARAMETER:
            used = names.get(edge.node.variable)  # type: ignore[attr-defined]
        else:
            used = _computed_from(edge.node, names) if edge.node in made else None
        if used is not None and not _is_seen(edge.user, trace):
            unseen.append((edge, used))
    if unseen:
        _check_users(edges, unseen, trace)


def _check_users(edges: Sequence[Edge], unseen: Sequence[tuple[Edge, str]], trace: Trace) -> None:
    """What used parameters unseen must be a cast that autocast kept for later, and seen itself."""
    casts = {edge.user: used for edge, used in unseen if _is_cast(edge.user)}
    unseen = [(edge, used) for edge, used in unseen if edge.user not in casts]
    unseen += [(e, casts[e.node]) for e in edges if e.node in casts and not _is_seen(e.user, trace)]
    if not unseen:
        return
    edge, used = unseen[0]
    where = "" if edge.user is None else f" (by {edge.user.name()})"
    raise UnsupportedLayerError(
        f"Expected every use of a trainable parameter where it can be recorded, but {used} is used "
        f"elsewhere{where}: let private.stepper call the function that computes the losses, call "
        "modules instead of their forward, take torch.compile and torch.jit off, or freeze it by "
        "requires_grad_(False)."
    )


def _computed_from(node: Node, names: Mapping[Tensor, str]) -> str:
    """Says what a tensor free of the batch was computed from."""
    known, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        name = names.get(getattr(node, "variable", _NOBODY))
        if name is not None:
            return f"a tensor computed from {name}"
        new = {earlier for earlier, _ in node.next_functions if earlier is not None} - known
        known |= new
        waiting.extend(new)
    return "a tensor computed from parameters"


# Stands for the parameter of nodes that are of none.
_NOBODY = torch.empty(0)


def _is_cast(node: Node | None) -> bool:
    return node is not None and node.name() == "ToCopyBackward0"


_REENTRANT = (
    "Expected activation checkpointing by torch.utils.checkpoint with use_reentrant=False, got the "
    "reentrant kind, which hides its operations: pass use_reentrant=False."
)


def _is_seen(node: Node | None, trace: Trace) -> bool:
    return node is not None and node in trace.seen


# ---- is each example's gradient its own? -----------------------------------------------------


def draw_weights(losses: Tensor, *, narrow: bool, generator: torch.Generator) -> Tensor:
    """(B,) random powers of two, of as many exponents as the range of numbers allows.

    Args:
        narrow: some gradients are kept in float16.
    """
    count = _FEW_EXPONENTS if narrow else _EXPONENTS
    order = torch.randperm(len(losses), generator=generator) % count
    apart = (count - 1) // max(1, min(len(losses), count) - 1)
    return torch.exp2((order * apart).to(losses))


def _is_narrow(losses: Tensor, arrived: Sequence[Tensor | None]) -> bool:
    kinds = {losses.dtype} | {gradient.dtype for gradient in arrived if gradient is not None}
    return torch.float16 in kinds


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


def find_layouts(
    trace: Trace,
    losses: Tensor,
    arrived: Sequence[Tensor | None],
    layouts: Sequence[Layout | None],
    *,
    chooses_rows: bool,
    generator: torch.Generator,
) -> list[Layout]:
    """Where the examples truly lie at each place; the graph of the losses stays.

    Args:
        arrived: what a backward pass from `losses` (B,), B >= 2, brought to each place.
        layouts: where they are expected; None: nowhere.
        chooses_rows: rows were chosen by their values, which the message says.
        generator: of weights.

    Raises:
        UnsupportedLayerError: examples mix.
    """
    narrow = _is_narrow(losses, arrived)
    weights = draw_weights(losses, narrow=narrow, generator=generator)
    again = trace.backward(losses * weights, retain_graph=True)
    usual = [layout for layout in layouts if layout is not None]
    if len(usual) == len(layouts) and bool(_all_agree(arrived, again, usual, weights)):
        return usual
    places, batch = trace.places, len(losses)
    tried = [[layout, *place.layouts(batch)] for layout, place in zip(layouts, places, strict=True)]
    found = [_fitting(*each, weights) for each in zip(arrived, again, tried, strict=True)]
    unknown = [number for number, layout in enumerate(found) if layout is None]
    owned = _owners(trace, losses, arrived, unknown, narrow=narrow)
    for number, layout in owned.items():
        found[number] = _fitting(arrived[number], again[number], [layout], weights)
    known = [layout for layout in found if layout is not None]
    if len(known) == len(found):
        return known
    number = max(number for number in unknown if found[number] is None)
    raise UnsupportedLayerError(_mixing(trace, losses, number, chooses_rows=chooses_rows))


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
    arrived: Sequence[Tensor | None],
    unknown: Sequence[int],
    *,
    narrow: bool,
) -> dict[int, Layout]:
    """Whose each row is at the places `unknown`, where every row is somebody's.

    The weights of the examples spell their numbers, digit by digit.
    """
    if not unknown:
        return {}
    batch, places = len(losses), trace.places
    base = _FEW_EXPONENTS if narrow else _EXPONENTS // 2
    owners: dict[tuple[int, int], Tensor] = {}
    for power in _powers(base, batch):
        digits = torch.arange(batch, device=losses.device) // power % base
        again = trace.backward(losses * torch.exp2(digits.to(losses)), retain_graph=True)
        for number, dim in [(place, dim) for place in unknown for dim in places[place].dims]:
            first, second = arrived[number], again[number]
            if first is not None and second is not None and dim < first.dim():
                digit = _digits(_as_rows(first, dim), _as_rows(second, dim), base)
                known = owners.get((number, dim), torch.zeros_like(digit))
                spelt = known + digit * power
                owners[number, dim] = torch.where((digit < 0) | (known < 0), -2, spelt)
    found: dict[int, Layout] = {}
    for (number, dim), owner in owners.items():
        first = arrived[number]
        assert first is not None
        owner = torch.where(_as_rows(first, dim).any(1), owner, -1)
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


# ---- are the parameters' gradients right? ----------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What was compared on one batch.

    Attributes:
        is_finite: () whether all of it is finite. Infinities prove nothing: plain automatic
            differentiation spreads them over all examples.
        errors: (P,) of each parameter, the distance between the two gradients of a weighted sum of
            the losses.
        tolerances: (P,) what passes as rounding.
        norms: (n,) squared norms of some examples' gradients, as they are taken for clipping.
        slack: (n,) how far these may be off.
        written_out: (n,) the squared norms of those gradients written out.
    """

    is_finite: Tensor
    errors: Tensor
    tolerances: Tensor
    norms: Tensor
    slack: Tensor
    written_out: Tensor

    def proves(self, names: Sequence[str]) -> bool:
        """Whether the batch shows the gradients to be right.

        Args:
            names: of the parameters, in the order of `errors`.

        Returns:
            False where the batch shows neither that nor the opposite.

        Raises:
            UnsupportedLayerError: they are wrong.
        """
        if not bool(self.is_finite):
            return False
        excess = self.errors - self.tolerances
        if not bool((excess <= 0).all()):
            raise UnsupportedLayerError(
                f"Expected the gradient of {names[int(excess.argmax())]} that automatic "
                "differentiation finds, got another: a defect of dpnlu. Use engine='per_example', "
                "and report the model's layers."
            )
        off = (self.norms - self.written_out).abs() - self.slack
        if not bool((off <= 0).all()):
            norm, right = (
                float(values[int(off.argmax())]) ** 0.5 for values in (self.norms, self.written_out)
            )
            raise UnsupportedLayerError(
                f"Expected the norm {right:g} of an example's gradient, got {norm:g}: a defect of "
                "dpnlu. Use engine='per_example', and report the model's layers."
            )
        return True


def gather(
    parts: Parts,
    norms: SquaredNorms,
    losses: Tensor,
    draws: Tensor,
    *,
    arrived: Sequence[Tensor | None],
    bound: float,
) -> Evidence:
    """Compare with plain automatic differentiation, which needs the graph of the losses once more.

    Nothing here looks at a value, so that it can be traced.

    Args:
        parts: the per-example gradients of all parameters, and `norms` theirs.
        losses: (B,), B >= 1.
        draws: (B,) random numbers in (0, 1), for the signs of weights and for the examples whose
            norms are compared.
        arrived: what the gradients were made of.
        bound: on the norm of an example's gradient; longer ones count as if they were so long.
    """
    lengths = norms.values.detach().sqrt().clamp(min=bound)
    signs = torch.where(draws < 0.5, -1.0, 1.0)
    weights = (signs * torch.exp2(-torch.log2(lengths).round())).to(losses)
    expected = back_propagate((losses * weights).sum(), list(parts), retain_graph=True)
    coarsest = max((torch.finfo(g.dtype).eps for g in arrived if g is not None), default=0.0)
    errors, tolerances = [], []
    with full_precision(losses.device):
        # What cancels inside one parameter's gradient is of the size of others'.
        lost = 1e3 * torch.finfo(losses.dtype).eps + 4 * coarsest
        size = lost * (weights.abs() * norms.values.sqrt()).sum()
        for (parameter, uses), right in zip(parts.items(), expected, strict=True):
            errors.append(_distance(weighted_sum(uses, weights, parameter), right))
            tolerances.append(size + _tolerance(uses, weights, errors[-1], coarsest))
        counts = torch.isfinite(norms.values) & (norms.values > 0)
        chosen = torch.where(counts, 2 * draws % 1, 0).topk(min(_NORMS, len(losses))).indices
        written_out = [
            _square(parts, torch.arange(len(losses), device=one.device) == one) for one in chosen
        ]
    return Evidence(
        is_finite=torch.isfinite(norms.values).all() & torch.isfinite(losses).all(),
        errors=torch.stack(errors),
        tolerances=torch.stack(tolerances),
        norms=norms.values[chosen],
        slack=norms.slack[chosen] + _TOLERANCE * norms.values[chosen],
        written_out=torch.stack(written_out),
    )


def _square(parts: Parts, one: Tensor) -> Tensor:
    """() the squared norm of one example's gradient, written out; `one` is (B,)."""
    found = [
        weighted_sum(uses, one.to(_weight_dtype(parameter)), parameter).square().sum()
        for parameter, uses in parts.items()
    ]
    return torch.stack(found).sum()


def _weight_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _distance(found: Tensor, expected: Tensor | None) -> Tensor:
    distance: Tensor = (found if expected is None else found.sub_(expected)).norm()
    return distance


def _tolerance(uses: Sequence[Gradients], weights: Tensor, like: Tensor, coarsest: float) -> Tensor:
    """() what rounding may do to a parameter's gradient.

    Args:
        coarsest: distance from 1 to the next number, of the coarsest gradients that were used.
    """
    total = like.new_zeros(())
    for use in uses:
        share = _TOLERANCE + growth(len(weights) * (use.terms + 1), like.dtype) + 4 * coarsest
        total = total + share * (weights.abs() * use.sizes()).sum()
    return total
