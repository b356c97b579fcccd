"""Engines: losses (B,) in, clipped gradient sums out.

All engines keep the same contract and differ in how they find an example's gradient:

- `BookKeeping`: one backward pass, norms and sums from the tape's records. The default.
- `PerExample`: one backward pass per example. The oracle: slow, right for whatever autograd can do.
- `Microbatch`: one ordinary backward pass per micro-batch, whose mean is clipped (eDP-SGD).
- `Opacus`: per-example gradients by Opacus' hooks. The reference.

Guarantee, of all of them, where the loss of an example depends on that example alone: each clipping
unit adds at most `max_grad_norm` in L2 norm to what `add_clipped` accumulates per unit of `scale`,
rounding of its norm included. A unit whose gradient is not finite adds exactly nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from dpnlu.engines.base import Engine
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.microbatch import Microbatch
from dpnlu.engines.opacus import Opacus
from dpnlu.engines.per_example import PerExample

ENGINES: dict[str, Callable[..., Engine]] = {
    "book_keeping": BookKeeping,
    "per_example": PerExample,
    "microbatch": Microbatch,
    "opacus": Opacus,
}
