"""Engines: losses (B,) in, clip outcome out.

All engines keep the same contract and differ in how they find an example's gradient:

- `BookKeeping`: one backward pass, norms and sums from the tape's records. The default.
- `PerExample`: one backward pass per example. The oracle: slow, right for whatever autograd can do.
- `Microbatch`: one ordinary backward pass per micro-batch, whose mean is clipped (eDP-SGD).
- `Opacus`: per-example gradients by Opacus' hooks. The reference.

Guarantee, of all of them, where the loss of an example depends on that example alone: each clipping
unit has a share of at most `clipper.bound` in L2 norm in the sum of the clip outcome, rounding of
its norm included; that is the plan's `max_grad_norm` unless it adapts. A unit whose gradient is not
finite has none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext

from torch import nn

from dpnlu.engines.base import Engine
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.microbatch import Microbatch
from dpnlu.engines.opacus import Opacus
from dpnlu.engines.per_example import PerExample
from dpnlu.mechanism.plan import PrivacyPlan


def _book_keeping(
    model: nn.Module, plan: PrivacyPlan, *, verify: bool = True
) -> closing[BookKeeping]:
    return closing(BookKeeping(model, plan, verify=verify))


# (model, plan) -> the engine, for as long as the context lasts; afterwards the model is as it was.
ENGINES: dict[str, Callable[..., AbstractContextManager[Engine]]] = {
    "book_keeping": _book_keeping,
    "per_example": lambda model, plan: nullcontext(PerExample(model, plan)),
    "microbatch": lambda model, plan: nullcontext(Microbatch(model, plan)),
    "opacus": lambda model, plan: closing(Opacus(model, plan)),
}
