"""The uses of the weights of a GRU layer or a plain recurrent one, by the compiled scan over time.

Where that is not to be had, a layer is run step by step as recorded linear maps.

Shapes: D directions, T steps, B sequences, I inputs, H hidden units, G gates. Steps of the second
direction are counted as it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout, by_example
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.records import GradientRule
from dpnlu.gradients.recurrent.gru_compiled import CompiledGRU, PackedGRU
from dpnlu.gradients.recurrent.native import scan_for
from dpnlu.gradients.recurrent.passes import Reverse
from dpnlu.gradients.recurrent.plain_compiled import CompiledPlain, PackedPlain

States = tuple[Tensor, ...]
Weights = tuple[Tensor, ...]
# (recorder, inputs (T, B, I), states before (D, B, H), weights of each direction, how to reverse
# sequences for the second one) -> states (T, B, D H).
Layer = Callable[[Recorder, Tensor, States, Sequence[Weights], Reverse], States]


def gru_layer(stepwise: Layer) -> Layer:
    """A GRU layer; `stepwise` runs it where there is no compiled scan for its weights."""

    def run(
        recorder: Recorder,
        inputs: Tensor,
        states: States,
        weights: Sequence[Weights],
        reverse: Reverse,
    ) -> States:
        every = _all_of(weights)
        scan = scan_for(*every)
        if scan is None:
            return stepwise(recorder, inputs, states, weights, reverse)
        rows = inputs.shape[0] * inputs.shape[1]
        packed = recorder.memory.prepared(
            every, lambda: PackedGRU.of(scan, weights, rows), PackedGRU
        )
        taps = [_tap(inputs, weights) for _ in range(2)]
        used = [weight.view_as(weight) for weight in every]
        layer: Any = CompiledGRU
        hidden, before = layer.apply(*taps, inputs, *states, reverse, packed, *used)
        read = _read(inputs, weights, reverse)
        for kind, (tap, lefts) in enumerate(zip(taps, (read, before), strict=True)):
            recorder.record(tap, _uses(weights, lefts, kinds=(kind,)), dims=(2,))
        return (hidden,)

    return run


def plain_layer(stepwise: Layer, *, rectifies: bool) -> Layer:
    """A layer of plain cells, with max(0, x) or tanh; `stepwise` runs it where there is no compiled
    scan for its weights."""

    def run(
        recorder: Recorder,
        inputs: Tensor,
        states: States,
        weights: Sequence[Weights],
        reverse: Reverse,
    ) -> States:
        every = _all_of(weights)
        scan = scan_for(*every)
        if scan is None:
            return stepwise(recorder, inputs, states, weights, reverse)
        rows = inputs.shape[0] * inputs.shape[1]
        packed = recorder.memory.prepared(
            every,
            lambda: PackedPlain.of(scan, weights, rows, rectifies=rectifies),
            PackedPlain,
            rectifies,
        )
        tap, used = _tap(inputs, weights), [weight.view_as(weight) for weight in every]
        layer: Any = CompiledPlain
        hidden, before = layer.apply(tap, inputs, *states, reverse, packed, *used)
        read = _read(inputs, weights, reverse)
        recorder.record(tap, _uses(weights, read, before, kinds=(0, 1)), dims=(2,))
        return (hidden,)

    return run


def _all_of(weights: Sequence[Weights]) -> Weights:
    return tuple(weight for of_one in weights for weight in of_one)


def _tap(inputs: Tensor, weights: Sequence[Weights]) -> Tensor:
    """(D, T, B, G H) zeros."""
    first = weights[0][0]
    zero = first.new_zeros(()).requires_grad_()
    return zero.expand(len(weights), *inputs.shape[:2], len(first))


def _read(inputs: Tensor, weights: Sequence[Weights], reverse: Reverse) -> list[Tensor]:
    """What each direction reads, (T, B, I)."""
    received = inputs.detach()
    return [reverse(received) if place else received for place in range(len(weights))]


def _uses(
    weights: Sequence[Weights], *lefts: Sequence[Tensor], kinds: Sequence[int]
) -> GradientRule:
    """The rule for the gradient of products with W_ih or W_hh, or of both.

    Args:
        weights: of each direction W_ih (G H, I), W_hh (G H, H), and biases b_ih, b_hh (G H,) if
            there are any.
        lefts: of each kind, what the matrix of each direction was multiplied with, (T, B, ·).
        kinds: 0 for W_ih and b_ih, 1 for W_hh and b_hh.
    """

    def rule(delta: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        for place, of_one in enumerate(weights):
            right = by_example(delta[place], layout, dim=1)
            for kind, left in zip(kinds, lefts, strict=True):
                if of_one[kind].requires_grad:
                    yield of_one[kind], OuterProducts(by_example(left[place], layout, dim=1), right)
            biases = [of_one[2 + kind] for kind in kinds if len(of_one) > 2]
            if any(bias.requires_grad for bias in biases):
                sums = Dense(right.sum(1))
                yield from ((bias, sums) for bias in biases if bias.requires_grad)

    return rule
