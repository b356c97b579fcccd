"""One logical step, ordinary and private, on the same data with the same accumulation."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dpnlu.benchmark.cases import Case, Inputs
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import PhysicalBatch
from dpnlu.training.device import synchronize
from dpnlu.training.handle import PrivateTraining, privatize

Step = Callable[[], None]


@contextmanager
def ordinary(
    case: Case, model: nn.Module, *, compiles: bool = False, device: str = "cpu"
) -> Iterator[Step]:
    """Backward pass per physical batch, then the optimizer; the model goes to the device."""
    optimizer = optimizer_of(model.to(device))
    same = [_moved(inputs, device) for inputs in case.inputs()]
    logical_batches = _shuffled(case, device) if case.sampled else itertools.repeat(same)
    losses_of: Callable[[Inputs], Tensor] = partial(case.losses_of, model)
    if compiles:
        losses_of = torch.compile(losses_of)

    def step() -> None:
        for inputs in next(logical_batches):
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
    engine: str | None = None,
    compiles: bool = False,
    backend: str = "inductor",
    microbatches: int | None = None,
    device: str = "cpu",
) -> Iterator[Step]:
    """The same with clipping, noise, and a ledger on disk.

    Args:
        engine: None: what suits the plan; see `privatize`.
        backend: of compiled steps.
        microbatches: how many are clipped in place of examples, each a physical batch.
    """
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.1,
        steps=10**9,
        target_delta=1e-6,
        num_examples=10 * case.logical,
        clipping_unit="example" if microbatches is None else "microbatch",
        microbatches=microbatches,
    )
    model.to(device)
    with tempfile.TemporaryDirectory(prefix="dpnlu-benchmark-") as folder:
        ledger = Path(folder) / "ledger"
        with privatize(model, optimizer_of(model), plan, engine=engine, ledger=ledger) as handle:
            losses_of = partial(case.losses_of, model)
            step_on = (
                handle.compile(losses_of, backend=backend)
                if compiles
                else handle.stepper(losses_of)
            )

            if case.sampled:
                yield _through_loader(case, handle, step_on, device)
            else:
                yield _repeated(case, handle, step_on, device)


def _repeated(
    case: Case, handle: PrivateTraining, step_on: Callable[[Inputs], bool], device: str
) -> Step:
    """The same physical batches in every step."""
    batches = [_moved(inputs, device) for inputs in case.inputs()]

    def step() -> None:
        for number, inputs in enumerate(batches, start=1):
            last = number == len(batches)
            closes_unit = last or handle.plan.microbatches is not None
            batch = PhysicalBatch(_ids(inputs), closes_unit=closes_unit, closes_step=last)
            handle.steps.announce(batch)
            step_on(inputs)
        synchronize(device)

    return step


def _through_loader(
    case: Case, handle: PrivateTraining, step_on: Callable[[Inputs], bool], device: str
) -> Step:
    """Poisson batches, drawn and put together anew in every step."""
    loader = handle.loader(case.examples(), physical_batch_size=case.physical)
    answers = (step_on(_moved(inputs, device)) for inputs in loader)

    def step() -> None:
        while not next(answers):
            pass
        synchronize(device)

    return step


def _shuffled(case: Case, device: str) -> Iterator[Iterator[Inputs]]:
    """Logical batches of `case.logical` examples as physical ones, all examples once an epoch."""
    examples = case.examples()
    while True:
        order = torch.randperm(len(examples)).tolist()
        for start in range(0, len(order), case.logical):
            yield (
                _moved(
                    default_collate([examples[one] for one in order[first:][: case.physical]]),
                    device,
                )
                for first in range(start, start + case.logical, case.physical)
            )


def _moved(inputs: Inputs, device: str) -> Inputs:
    ids, intents = inputs
    return ids.to(device), intents.to(device)


def _ids(inputs: Inputs) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ids of a physical batch; what matters is how many they are."""
    return np.arange(len(inputs[0]))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The one of every benchmark: AdamW, all parameters in one operation."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-4, fused=True)
