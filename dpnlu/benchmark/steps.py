"""One logical step, ordinary and private, on the same data with the same accumulation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dpnlu.benchmark.cases import Case, Inputs
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import PhysicalBatch
from dpnlu.training.device import synchronize
from dpnlu.training.handle import privatize

Step = Callable[[], None]


@contextmanager
def ordinary(
    case: Case, model: nn.Module, *, compiles: bool = False, device: str = "cpu"
) -> Iterator[Step]:
    """Backward pass per physical batch, then the optimizer; the model goes to the device."""
    optimizer = _optimizer(model.to(device))
    batches = _inputs(case, device)
    losses_of: Callable[[Inputs], Tensor] = partial(case.losses_of, model)
    if compiles:
        losses_of = torch.compile(losses_of)

    def step() -> None:
        for inputs in batches:
            (losses_of(inputs).sum() / case.logical).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    yield step


@contextmanager
def private(
    case: Case,
    model: nn.Module,
    *,
    engine: str = "book_keeping",
    compiles: bool = False,
    device: str = "cpu",
) -> Iterator[Step]:
    """The same with clipping, noise, and a ledger on disk."""
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.01,
        steps=10**9,
        target_delta=1e-6,
        num_examples=100 * case.logical,
    )
    model.to(device)
    batches = _inputs(case, device)
    with tempfile.TemporaryDirectory(prefix="dpnlu-benchmark-") as folder:
        ledger = Path(folder) / "ledger"
        with privatize(model, _optimizer(model), plan, engine=engine, ledger=ledger) as handle:
            losses_of = partial(case.losses_of, model)
            step_on = handle.compile(losses_of) if compiles else handle.stepper(losses_of)

            def step() -> None:
                for number, inputs in enumerate(batches, start=1):
                    last = number == len(batches)
                    handle.begin(PhysicalBatch(_ids(inputs), closes_unit=last, closes_step=last))
                    step_on(inputs)
                synchronize(device)

            yield step


def _inputs(case: Case, device: str) -> list[Inputs]:
    return [(ids.to(device), intents.to(device)) for ids, intents in case.inputs()]


def _ids(inputs: Inputs) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ids of a physical batch; what matters is how many they are."""
    return np.arange(len(inputs[0]))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-4, fused=True)
