"""From the per-example gradients of tensors that were computed from parameters alone to those of
the parameters.

Autograd goes back through such a computation once for each example (`vmap`). That is dear where the
computation has many rows of which a short text uses few, as a table of relative positions. So its
last linear layers are gone through by hand, on the rows whose gradient is not zero.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.nodes import OF_A_PARAMETER
from dpnlu.gradients.records import Lookup, Product

Use = TypeVar("Use")

# Gradient edges, each with the per-example gradients (B, …) that arrived there.
Arrived = Sequence[tuple[GradientEdge, Tensor]]


@dataclass(frozen=True)
class Computations:
    """What was recorded of batch-independent computations.

    Attributes:
        parameters: those whose gradients autograd is to find, by id.
        lookups: of rows of tables.
        products: linear layers.
    """

    parameters: Mapping[int, Tensor]
    lookups: Iterable[Lookup]
    products: Sequence[Product]

    def gradients(self, arrived: Arrived) -> Iterator[tuple[Tensor, Gradients]]:
        """The parameters' gradients, from what arrived at tensors that were computed from them."""
        last = self._last_products(arrived)
        if not last:
            yield from self._by_autograd(arrived, self.products)
            return
        before: dict[GradientEdge, Tensor] = {}  # what comes to the products' inputs
        for product, gradient in _found(last, _each_back(arrived, [use.edge for use in last])):
            used = product.used_rows(gradient)
            yield from product.gradients(*used)
            if product.origin is not None:
                others = before.get(product.origin)
                before[product.origin] = product.back(*used, others)
        rest = [product for product in self.products if product not in last]
        yield from self._by_autograd(list(before.items()), rest)

    def _last_products(self, arrived: Arrived) -> list[Product]:
        """The products through whose outputs all ways lead from where gradients arrived to
        parameters, if none of them was computed from another; else none."""
        products = {use.edge.node: use for use in self.products}
        met = _met((edge for edge, _ in arrived), stops=products)
        last = [use for node, use in products.items() if node in met]
        earlier = _met(use.origin for use in last if use.origin is not None)
        by_autograd = any(id(p) in self.parameters for use in last for p in use.learned)
        is_whole = not any(node.name() == OF_A_PARAMETER for node in met)
        if by_autograd or not is_whole or any(use.edge.node in earlier for use in last):
            return []
        return last

    def _by_autograd(
        self, arrived: Arrived, products: Sequence[Product]
    ) -> Iterator[tuple[Tensor, Gradients]]:
        """Let autograd go back to parameters, lookups and products, all at once."""
        parameters = list(self.parameters.values())
        lookups = [use for use in self.lookups if id(use.table) not in self.parameters]
        inside = [use.edge for use in lookups] + [use.edge for use in products]
        found = iter(_each_back(arrived, [*parameters, *inside]))
        for parameter, gradient in _found(parameters, found):
            yield parameter, Dense(gradient)
        for use, gradient in _found(lookups, found):
            yield use.rows(gradient)
        for product, gradient in _found(products, found):
            # A parameter that autograd sees has the gradients of all its uses already.
            pairs = product.gradients(*product.used_rows(gradient))
            yield from ((p, use) for p, use in pairs if id(p) not in self.parameters)


def _found(uses: Iterable[Use], gradients: Iterable[Tensor | None]) -> Iterator[tuple[Use, Tensor]]:
    """Those uses to which a gradient came, in pairs with it."""
    for use, gradient in zip(uses, gradients, strict=False):
        if gradient is not None:
            yield use, gradient


def _met(edges: Iterable[GradientEdge], stops: Container[Node] = ()) -> set[Node]:
    """The nodes of the autograd graph on all ways back from these edges, as far as the stops."""
    met: set[Node] = set()
    waiting = [edge.node for edge in edges]
    while waiting:
        node = waiting.pop()
        if node not in met:
            met.add(node)
            if node not in stops:
                waiting += [before for before, _ in node.next_functions if before is not None]
    return met


def _each_back(arrived: Arrived, inputs: list[Any]) -> Sequence[Tensor | None]:
    """Back-propagate per-example gradients: all examples at once by `vmap` or, where a custom
    autograd function has no rule for that, one after the other."""
    outputs, gradients = [edge for edge, _ in arrived], [gradient for _, gradient in arrived]

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

    if not inputs or not outputs:
        return [None] * len(inputs)
    try:
        return back(gradients, batched=True)
    except RuntimeError:
        each = [back(list(one), batched=False) for one in zip(*gradients, strict=True)]
        return [
            None if rows[0] is None else torch.stack([row for row in rows if row is not None])
            for rows in zip(*each, strict=True)
        ]
