"""Products of two tensors by Einstein's notation, one of them weights: as products of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import (
    Dense,
    Gradients,
)
from dpnlu.gradients.layout import Layout, full_precision
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.records import GradientRule


def einsum(recorder: Recorder, equation: Any, *operands: Any) -> Any:
    """What `torch.einsum` returns; NotImplemented but for one batched operand and one of weights,
    with every label written out once."""
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return NotImplemented
    left, _, output = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    places = [
        place for place, operand in enumerate(operands) if recorder.is_batch_independent(operand)
    ]
    if len(places) != 1 or len(labels) != 2 or not _is_plain(*labels, output):
        return NotImplemented
    free = places[0]
    value = torch.einsum(equation, *operands)
    terms = operands[1 - free].detach(), operands[free], labels[1 - free], labels[free], output
    rule = _contracted(*terms) or _elementwise(*terms)
    if rule is None:
        return NotImplemented
    if value.requires_grad:
        positions = [dim for dim, label in enumerate(output) if label in labels[1 - free]]
        recorder.record(value, rule, dims=positions)
    return value


# A label that equations written by others do not use.
_BATCH = "Z"


def _is_plain(*terms: str) -> bool:
    """Whether labels are letters, none of them twice in a term."""
    return all(
        term.isalpha() and len(set(term)) == len(term) and _BATCH not in term for term in terms
    )


def _contracted(
    received: Tensor, weight: Tensor, read: str, shared: str, output: str
) -> GradientRule | None:
    """y[output] = Σ x[read] w[shared]: of the weights' labels some are summed over with x's, the
    others are the output's alone.

    Returns:
        None where a label is in all three, or of x and summed over alone.
    """
    summed = [label for label in shared if label in read]
    made = [label for label in shared if label in output]
    positions = [label for label in read if label not in summed]
    is_product = set(summed).isdisjoint(made) and set(summed) | set(made) == set(shared)
    if not is_product or not positions or set(positions) - set(output):
        return None

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        batch = output[layout.dim]
        left = _rows(received, read, batch, summed, layout)
        right = _rows(gradient, output, batch, made, layout)
        inputs, outputs = "".join(summed), "".join(made)
        if shared in (inputs + outputs, outputs + inputs) and weight.is_contiguous():
            yield weight, OuterProducts(left, right, transposed=shared == inputs + outputs)
            return
        products = torch.einsum("bti,bto->bio", left, right)
        sizes = dict(zip(shared, weight.shape, strict=True))
        apart = products.reshape(len(products), *(sizes[label] for label in inputs + outputs))
        order = [1 + (inputs + outputs).index(label) for label in shared]
        yield weight, Dense(apart.permute(0, *order))

    return rule


def _elementwise(
    received: Tensor, weight: Tensor, read: str, shared: str, output: str
) -> GradientRule | None:
    """The same where labels may be in all three. A dimension of the weights may hold the examples
    too, as if each had weights of its own: then it has no part in those of the others.

    Returns:
        None where a label is of one term alone and summed over.
    """
    if not set(shared) <= set(read + output) or not set(read) <= set(shared + output):
        return None

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        batch = output[layout.dim]
        terms, values = [], []
        for labels, tensor in ((output, gradient), (read, received)):
            terms.append(_BATCH + batch + labels.replace(batch, ""))
            values.append(layout.apart(full_precision(tensor), labels.index(batch)))
        equation = f"{terms[0]},{terms[1]}->{_BATCH}"
        if batch not in shared:
            yield weight, Dense(torch.einsum(equation + shared, *values))
            return
        place = shared.index(batch)
        own = torch.einsum(equation + batch + shared.replace(batch, ""), *values)
        entries = torch.arange(weight.shape[place], device=weight.device)
        entries = layout.apart(entries, 0, fill=-1)
        example, inner = (entries >= 0).nonzero(as_tuple=True)
        apart = own.new_zeros(len(own), weight.shape[place], *own.shape[2:])
        apart[example, entries[example, inner]] = own[example, inner]
        yield weight, Dense(apart.movedim(1, 1 + place))

    return rule


def _rows(values: Tensor, labels: str, batch: str, inner: list[str], layout: Layout) -> Tensor:
    """Values labelled so -> (B, T, ·): what is `inner` flattened, of each position."""
    apart = layout.apart(full_precision(values), labels.index(batch))
    rest = [label for label in labels if label != batch]
    places = [place for place, label in enumerate(rest, start=2) if label not in inner]
    order = [2 + rest.index(label) for label in inner]
    moved = apart.permute(0, 1, *places, *order)
    positions = moved.shape[1 : 2 + len(places)].numel()
    return moved.reshape(layout.batch, positions, moved.shape[2 + len(places) :].numel())


REWRITES: dict[Any, Any] = {torch.einsum: einsum}
