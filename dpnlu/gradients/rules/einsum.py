"""`torch.einsum` of a batched tensor and weights, as a product of matrices."""

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
    """What `torch.einsum` returns for one batched operand and one of weights, with every label
    written out and none twice in a term; NotImplemented for all else."""
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return NotImplemented
    left, _, output = equation.replace(" ", "").partition("->")
    labels = left.split(",")
    weights = [place for place in (0, 1) if recorder.is_batch_independent(operands[place])]
    if len(weights) != 1 or len(labels) != 2 or not _is_plain(*labels, output):
        return NotImplemented
    place = weights[0]
    value = torch.einsum(equation, *operands)
    terms = operands[1 - place].detach(), operands[place], labels[1 - place], labels[place], output
    rule = _contracted(*terms) or _elementwise(*terms)
    if rule is None:
        return NotImplemented
    if value.requires_grad:
        positions = [dim for dim, label in enumerate(output) if label in labels[1 - place]]
        recorder.record(value, rule, dims=positions)
    return value


# A label of ours for the examples; equations that use it are not rewritten.
_BATCH = "Z"


def _is_plain(*terms: str) -> bool:
    """Whether labels are letters, none of them twice in a term."""
    return all(
        term.isalpha() and len(set(term)) == len(term) and _BATCH not in term for term in terms
    )


def _contracted(
    received: Tensor, weight: Tensor, of_input: str, of_weight: str, output: str
) -> GradientRule | None:
    """y[output] = Σ x[of_input] w[of_weight], where every label of the weights is either one of the
    input that is summed over, or one of the output that the input has not.

    Returns:
        None if a label is in all three terms, or in the input alone and summed over.
    """
    summed = [label for label in of_weight if label in of_input]
    made = [label for label in of_weight if label in output]
    positions = [label for label in of_input if label not in summed]
    is_product = set(summed).isdisjoint(made) and set(summed) | set(made) == set(of_weight)
    if not is_product or not positions or set(positions) - set(output):
        return None

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        batch = output[layout.dim]
        left = _rows(received, of_input, batch, summed, layout)
        right = _rows(gradient, output, batch, made, layout)
        inputs, outputs = "".join(summed), "".join(made)
        if of_weight in (inputs + outputs, outputs + inputs) and weight.is_contiguous():
            yield weight, OuterProducts(left, right, transposed=of_weight == inputs + outputs)
            return
        products = torch.einsum("bti,bto->bio", left, right)
        sizes = dict(zip(of_weight, weight.shape, strict=True))
        apart = products.reshape(len(products), *(sizes[label] for label in inputs + outputs))
        order = [1 + (inputs + outputs).index(label) for label in of_weight]
        yield weight, Dense(apart.permute(0, *order))

    return rule


def _elementwise(
    received: Tensor, weight: Tensor, of_input: str, of_weight: str, output: str
) -> GradientRule | None:
    """The same with labels that may be in all three terms. If the label of the examples is one of
    the weights' too, each example has weights of its own, and gradient 0 for the others.

    Returns:
        None if a label is in one term alone and summed over.
    """
    if not set(of_weight) <= set(of_input + output) or not set(of_input) <= set(of_weight + output):
        return None

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        batch = output[layout.dim]
        terms, values = [], []
        for labels, tensor in ((output, gradient), (of_input, received)):
            terms.append(_BATCH + batch + labels.replace(batch, ""))
            values.append(layout.apart(full_precision(tensor), labels.index(batch)))
        equation = f"{terms[0]},{terms[1]}->{_BATCH}"
        if batch not in of_weight:
            yield weight, Dense(torch.einsum(equation + of_weight, *values))
            return
        place = of_weight.index(batch)
        own = torch.einsum(equation + batch + of_weight.replace(batch, ""), *values)
        entries = torch.arange(weight.shape[place], device=weight.device)
        entries = layout.apart(entries, 0, fill=-1)
        example, inner = (entries >= 0).nonzero(as_tuple=True)
        apart = own.new_zeros(len(own), weight.shape[place], *own.shape[2:])
        apart[example, entries[example, inner]] = own[example, inner]
        yield weight, Dense(apart.movedim(1, 1 + place))

    return rule


def _rows(values: Tensor, labels: str, batch: str, inner: list[str], layout: Layout) -> Tensor:
    """Values with these labels -> (B, T, ·): the dimensions `inner` flattened, of each position."""
    apart = layout.apart(full_precision(values), labels.index(batch))
    rest = [label for label in labels if label != batch]
    places = [place for place, label in enumerate(rest, start=2) if label not in inner]
    order = [2 + rest.index(label) for label in inner]
    moved = apart.permute(0, 1, *places, *order)
    positions = moved.shape[1 : 2 + len(places)].numel()
    return moved.reshape(layout.batch, positions, moved.shape[2 + len(places) :].numel())


REWRITES: dict[Any, Any] = {torch.einsum: einsum}
