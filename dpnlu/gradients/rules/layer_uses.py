"""The uses of the weights of a layer that runs over time as one operation.

All steps of a direction share its weights, so a layer records the gradients of its products once,
with what each weight was multiplied by. They arrive at a *tap*: zeros that the layer takes beside
its inputs, of the products' shape, without influence on what it computes.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units, G gates. Steps of the second
direction are counted as it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout, by_example
from dpnlu.gradients.records import GradientRule
from dpnlu.gradients.recurrent.passes import Reverse

States = tuple[Tensor, ...]
Weights = tuple[Tensor, ...]
"""Of a direction W_ih (G H, I), W_hh (G H, H), and biases b_ih, b_hh (G H,) if there are any."""

# Of a direction, what one of its matrices was multiplied with, (T, B, ·).
Left = Callable[[int], Tensor]

INPUTS, STATES = 0, 1
"""What products are of: W_ih with the inputs, W_hh with the states."""


def all_of(weights: Sequence[Weights]) -> Weights:
    """Those of every direction, one behind the other."""
    return tuple(weight for of_one in weights for weight in of_one)


def tap_for(inputs: Tensor, weights: Sequence[Weights]) -> Tensor:
    """(D, T, B, G H), for inputs (T, B, I)."""
    first = weights[0][0]
    zero = first.new_zeros(()).requires_grad_()
    return zero.expand(len(weights), *inputs.shape[:2], len(first))


def read_by(inputs: Tensor, reverse: Reverse) -> Left:
    """What each direction reads of the inputs (T, B, I)."""
    received = inputs.detach()
    return lambda place: reverse(received) if place else received


def uses_of(weights: Sequence[Weights], lefts: dict[int, Left]) -> GradientRule:
    """The rule for what arrives at a tap.

    Args:
        weights: of each direction.
        lefts: `INPUTS` or `STATES`, or both where their products have the same gradients -> what
            these products were of.
    """

    def rule(delta: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        for place, of_one in enumerate(weights):
            right = by_example(delta[place], layout, dim=1)
            for kind, left in lefts.items():
                if of_one[kind].requires_grad:
                    yield of_one[kind], OuterProducts(by_example(left(place), layout, dim=1), right)
            biases = [of_one[2 + kind] for kind in lefts if len(of_one) > 2]
            if any(bias.requires_grad for bias in biases):
                sums = Dense(right.sum(1))
                yield from ((bias, sums) for bias in biases if bias.requires_grad)

    return rule
