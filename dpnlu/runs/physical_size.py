"""How many examples to compute at once: as many as the memory holds, found out on random data.

Nothing of the training data is looked at, so this costs no privacy; and how a logical batch is cut
changes neither ε nor the result.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.ranges import check_positive
from dpnlu.runs.resources import Memory, memory_of
from dpnlu.training.handle import privatize
from dpnlu.training.handover import Handover

# Of the memory that is there: texts of unlike lengths, and what else runs, need some too.
_SHARE = 0.8
# A logical batch is larger than its expected size by more standard deviations than these in one of
# a million steps.
_DEVIATIONS = 5


class UnknownMemoryError(ValueError):
    """The system does not say how much memory there is."""


def physical_batch_size(
    model: nn.Module,
    plan: PrivacyPlan,
    losses_of: Callable[[Any], Tensor],
    random_batch: Callable[[int], Any],
    *,
    engine: str | None = None,
    memory_mib: float | None = None,
) -> int:
    """The largest physical batch whose private step fits into memory.

    The size is doubled until the next one would not fit, by a line through what the last two took;
    what is left is then filled by that line. A size that a CUDA device refuses ends the search.

    Args:
        model: with weights on the device that trains; they, random numbers and modes stay.
        plan: the mechanism; no more is tried than a logical batch ever has.
        losses_of: as for `PrivateTraining.stepper`.
        random_batch: size -> a batch of random examples of that size, as large as real ones get; of
            texts the longest.
        engine: see `privatize`.
        memory_mib: how much may be used, the model included; None: 80 % of what is there.

    Raises:
        UnknownMemoryError: memory is unknown here and not given.
        ValueError: not even one example fits.
    """
    device = next(model.parameters()).device
    memory = memory_of(str(device))
    limit = _limit(device, memory) if memory_mib is None else memory_mib
    check_positive("memory_mib", limit)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return largest_size(
            lambda size: _peak_of_step(
                model, plan, losses_of, random_batch(size), engine=engine, memory=memory
            ),
            limit=limit,
            most=_most(plan),
        )


def largest_size(peak_of: Callable[[int], float], *, limit: float, most: int) -> int:
    """The largest size in [1, most] whose peak is within the limit, if peaks grow along a line.

    Args:
        peak_of: size -> peak; infinity where it fails. It is called with rising sizes.

    Raises:
        ValueError: 1 is too large.
    """
    fits, peak = 1, peak_of(1)
    if peak > limit:
        raise ValueError(
            f"Expected {limit:.0f} MiB to hold the step of one example, which takes {peak:.0f}: "
            "take a smaller model or another device, or shorten its texts."
        )
    slope = 0.0
    while fits < most:
        size = min(2 * fits, most)
        if peak + slope * (size - fits) > limit:
            break
        found = peak_of(size)
        if found > limit:
            break
        slope = max(0.0, (found - peak) / (size - fits))
        fits, peak = size, found
    if not slope or fits == most:
        return fits
    size = min(fits + math.floor((limit - peak) / slope), 2 * fits, most)
    return size if size > fits and peak_of(size) <= limit else fits


def _most(plan: PrivacyPlan) -> int:
    expected = plan.expected_batch_size
    most = math.ceil(expected + _DEVIATIONS * math.sqrt(expected))
    return min(most, plan.num_examples, plan.max_batch_size or most)


def _peak_of_step(
    model: nn.Module,
    plan: PrivacyPlan,
    losses_of: Callable[[Any], Tensor],
    batch: Any,
    *,
    engine: str | None,
    memory: Memory,
) -> float:
    """MiB at the peak of a step that ends in nothing; infinity where there is no more."""
    examples = {"unit": "example", "clipping_unit": "example", "examples_per_user": None}
    changes: dict[str, Any] = examples if plan.unit == "user" else {}
    if clipping_rule(plan.clipping).public_quantile is not None:  # by examples that are not here
        changes = changes | {"clipping": "flat"}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    nowhere = Handover(torch.optim.SGD(trained, lr=0.0))
    memory.reset_peak()
    try:
        with warnings.catch_warnings():
            # What δ deserves was said when the plan was made; and nothing here is ever sampled.
            warnings.filterwarnings("ignore", message="δ = |private.step was called outside")
            probe = replace(plan, steps=1, noise_schedule="constant", **changes)
            _step(model, nowhere, probe, losses_of, batch, engine)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf
    return memory.peak() or math.inf


def _step(
    model: nn.Module,
    nowhere: Handover,
    plan: PrivacyPlan,
    losses_of: Callable[[Any], Tensor],
    batch: Any,
    engine: str | None,
) -> None:
    with privatize(model, nowhere, plan, engine=engine, verify=False) as private:
        private.stepper(losses_of)(batch)


def _limit(device: torch.device, memory: Memory) -> float:
    """MiB that this process may have in all.

    Raises:
        UnknownMemoryError: nobody says how much that is.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return _SHARE * (free / 2**20 + (memory.current() or 0.0))
    available, current = _available(), memory.current()
    if device.type != "cpu" or available is None or current is None:
        raise UnknownMemoryError(
            f"Expected memory_mib on {device.type}, where this system does not say how much there "
            "is: give how much the training may use."
        )
    return _SHARE * (available + current)


def _available() -> float | None:
    """MiB that processes may still take, as Linux and its control group say; None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
    except (OSError, ValueError):  # no limit of its own
        return found
    return min(found, (most - used) / 2**20)
