"""ε of several examples together, such as all copies of one text.

Under addition and removal of all R of them a batch holds K of the copies, K binomial, and the sum
moves by at most K times the sensitivity: a mixture of Gaussians. R times the ε of one example, with
a δ that grows besides, would bound it too, and say far less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from dpnlu.accounting.accountants import epsilon, spent
from dpnlu.accounting.composition import composed_epsilon, tilt_towards
from dpnlu.accounting.events import SampledGaussian, check_delta
from dpnlu.accounting.mixture import Copies, mixture_distributions, sampled_mixture_losses
from dpnlu.accounting.pld import grid_of

# What shares of δ improbable numbers of copies, and improbable outcomes, may take.
_LEFT_OUT, _TAIL = 1e-4, 1e-6
# Beyond, it says nothing that infinity does not, and takes long.
LARGEST_EPSILON = 1e4


def group_epsilon(events: Iterable[SampledGaussian], *, size: int, delta: float) -> float:
    """The ε at `delta` under addition and removal of `size` examples at once.

    Guarantee: an upper bound, for any `size` examples. Beyond `LARGEST_EPSILON` it is infinity.

    Args:
        events: what was released.
        size: at least 1; 1 gives the ε of one example.
        delta: in [1e-12, 1), of the whole group.

    Raises:
        ValueError: a number out of range, or truncated batches, for which there is no analysis.
    """
    check_delta(delta)
    if size < 1:
        raise ValueError(f"Expected a group of at least one example, got {size}.")
    released = list(events)
    if size == 1:
        return epsilon(released, delta=delta)
    if any(event.max_batch_size is not None for event in released):
        raise ValueError(
            f"Expected batches that are not truncated for a group of {size}, got some that are: "
            "their ε is known for one example alone."
        )
    return spent(released, lambda merged: _composed(merged, size, delta))


@lru_cache(maxsize=256)
def _composed(events: tuple[SampledGaussian, ...], size: int, delta: float) -> float:
    steps = sum(event.steps for event in events)
    left_out, tail = _LEFT_OUT * delta / steps, _TAIL * delta / steps
    counts = [event.steps for event in events]
    laws = [
        (e.noise_multiplier, Copies.binomial(size, e.sample_rate, left_out=left_out))
        for e in events
    ]
    # Batches with an improbable number of copies count as ones that give all away.
    rest = delta * (1 - _LEFT_OUT)
    tilts = [
        tilt_towards(
            rest,
            [sampled_mixture_losses(s, law, tail=tail, removed=removed) for s, law in laws],
            counts,
        )
        for removed in (True, False)
    ]
    larger = max(tilts, key=lambda tilt: tilt.epsilon)
    if larger.epsilon > LARGEST_EPSILON:
        return math.inf
    grid = grid_of(steps, larger, larger.epsilon)
    pairs = [mixture_distributions(s, law, grid=grid, tail=tail) for s, law in laws]
    found = max(
        composed_epsilon(
            [(pair[way], n) for pair, n in zip(pairs, counts, strict=True)], tilts[way], rest
        )
        for way in (0, 1)
    )
    # Those that remain are likelier by so much than they were with the others.
    return found - steps * math.log1p(-left_out)
