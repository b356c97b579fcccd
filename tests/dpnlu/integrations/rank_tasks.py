"""What tests have ranks do, and one process to compare with."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpnlu
from dpnlu.integrations.distributed import privatize_distributed
from dpnlu.integrations.losses import sequence_losses
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import PrivateTraining
from dpnlu.training.several_processes import SeveralProcesses
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import flat, weights

TIMEOUT = timedelta(seconds=60)
KINDS = (torch.float32, torch.float64)


@dataclass
class Course:
    """What was done on a rank.

    Attributes:
        physical: ids of each physical batch.
        parts: ids of each logical batch, or of this rank's part of it.
        weights: afterwards.
        gradients: that were released last.
    """

    physical: list[list[int]] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)
    weights: Tensor | None = None
    gradients: Tensor | None = None
    epsilon: float = 0.0
    releases: int = 0
    applied: int = 0


@dataclass(frozen=True)
class Numbered:
    """Examples that know their places."""

    count: int
    shift: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = (place + self.shift) % self.count
        return subjects.examples(self.count)[number] | {"place": place}


def course(
    private: PrivateTraining,
    model: nn.Module,
    *,
    physical: int = 2,
    shift: int = 0,
    stop: int | None = None,
    late: int = 0,
    before: Callable[[int], None] = lambda batch: None,
) -> Course:
    """Train to the end, or for `stop` releases.

    Args:
        late: how many more physical batches to begin before breaking off.
        before: is called in the function that computes losses, with the number of the batch.
    """
    done = Course()
    data = Numbered(private.plan.num_examples, shift)

    def collate(batch: list[dict[str, Any]]) -> Any:
        return subjects.collate(batch), [example["place"] for example in batch]

    def losses_of(batch: Any) -> Tensor:
        inputs, _ = batch
        before(len(done.physical))
        words = {name: value for name, value in inputs.items() if name != "labels"}
        return sequence_losses(model(**words).logits, inputs["labels"])

    step, open_part = private.stepper(losses_of), []
    for batch in private.loader(data, collate_fn=collate, physical_batch_size=physical):
        done.physical.append(batch[1])
        open_part += batch[1]
        if step(batch):
            done.parts.append(open_part)
            open_part = []
        if stop is not None and len(private.ledger) >= stop:
            late -= 1
            if late < 0:
                break
    done.weights = weights(model)
    if private.gradients:
        done.gradients = flat(private.gradients)
    done.epsilon, done.releases = private.epsilon(), len(private.ledger)
    return done


def together(
    rank: int,
    plan: PrivacyPlan,
    *,
    seed: int | None = 0,
    learning_rate: float = 0.5,
    ledger: Path | None = None,
    resume: bool = False,
    engine: str | None = None,
    **named: Any,
) -> Course:
    """Train the model of the subjects on all ranks."""
    model = subjects.model().train()
    if rank != 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)  # what rank 0 has takes its place
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    # Another one on each rank, of which that of rank 0 is used.
    rng = None if seed is None else np.random.default_rng(seed + rank)
    with privatize_distributed(
        model,
        optimizer,
        plan,
        ledger=ledger,
        resume=resume,
        engine=engine,
        sampling_rng=rng,
        timeout=TIMEOUT,
    ) as private:
        return course(private, model, **named)


def in_two_loops(rank: int, plan: PrivacyPlan) -> list[Course]:
    """The first is broken off after two releases, in the middle of the next logical batch."""
    model = subjects.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rng = np.random.default_rng(0)
    with privatize_distributed(
        model, optimizer, plan, sampling_rng=rng, timeout=TIMEOUT
    ) as private:
        return [course(private, model, stop=2, late=rank), course(private, model)]


def alone(plan: PrivacyPlan, *, seed: int = 0, engine: str | None = None, **named: Any) -> Course:
    """The same by one process."""
    model = subjects.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rng = np.random.default_rng(seed)
    with dpnlu.privatize(model, optimizer, plan, sampling_rng=rng, engine=engine) as private:
        return course(private, model, **named)


# ---- noise -----------------------------------------------------------------------------------


class Wide(nn.Module):
    """Large enough for its noise to be measured; cut into shares in the middle of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 3000), nn.Linear(3000, 5))

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values)


def noise(rank: int, plan: PrivacyPlan, *, own: bool = False, system: bool = False) -> Tensor:
    """The released sums of empty logical batches, (steps, entries)."""
    torch.manual_seed(0)  # on every rank the same, as people do
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    source: Any = torch.Generator().manual_seed(1) if own else "system" if system else None
    found = []
    with privatize_distributed(model, optimizer, plan, noise=source, timeout=TIMEOUT) as private:
        release = private.steps.release_empty
        for _ in range(plan.steps):
            with private.steps.mechanism.processes.reporting():
                release()
            found.append(flat(private.gradients))
    return torch.stack(found)


# ---- what is refused -------------------------------------------------------------------------


def with_losses(rank: int, plan: PrivacyPlan, *, kind: str) -> None:
    """Rank 1 does something that is refused, in its second batch."""
    model = subjects.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = []

    def losses_of(batch: dict[str, Tensor]) -> Tensor:
        words = {name: value for name, value in batch.items() if name != "labels"}
        losses = sequence_losses(model(**words).logits, batch["labels"])
        batches.append(len(losses))
        if rank == 0 or len(batches) < 2:
            return losses
        if kind == "mean":
            return losses.mean()
        raise ZeroDivisionError("what the user's own function raises")

    with privatize_distributed(model, optimizer, plan, timeout=TIMEOUT, verify=False) as private:
        step = private.stepper(losses_of)
        data = subjects.examples(plan.num_examples)
        for batch in private.loader(data, collate_fn=subjects.collate, physical_batch_size=2):
            step(batch)


def differently(rank: int, plan: PrivacyPlan, *, kind: str, folder: Path) -> Any:
    """Rank 1 does otherwise than rank 0."""
    is_other = rank == 1
    if kind == "plan":
        changed = PrivacyPlan.from_dict(plan.to_dict() | {"noise_multiplier": 0.5 + rank})
        return together(rank, changed)
    if kind == "learning rate":
        return together(rank, plan, learning_rate=0.5 + rank)
    if kind == "data":
        return together(rank, plan, shift=rank)
    if kind == "ledger":
        return together(rank, plan, ledger=folder / "there.jsonl")
    if kind == "break":
        return together(rank, plan, stop=1 if is_other else None)
    model: nn.Module = subjects.model().train()
    if kind == "parameters":
        model = subjects.model(hidden_size=8 * (1 + rank)).train()
    if kind == "batch normalisation":
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2) if is_other else nn.LayerNorm(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if kind == "momentum":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, float(rank))
    if kind == "wrapped":
        model = DistributedDataParallel(model)
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with privatize_distributed(model, optimizer, plan, timeout=TIMEOUT, verify=False) as private:
        if kind == "unsampled":
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return private.step(torch.zeros(2, requires_grad=True))

        def tamper(*_: Any) -> None:
            if kind == "weights" and is_other and len(private.ledger) == 2:
                with torch.no_grad():
                    next(iter(model.parameters())).add_(1e-3)

        optimizer.register_step_pre_hook(tamper)  # also where a rank's part of a batch is empty
        return course(private, model)


# ---- ranks that end --------------------------------------------------------------------------


def ending(rank: int, plan: PrivacyPlan, *, ledger: Path, who: int, where: str) -> Course:
    """Train until a rank ends without a word: in its losses, or around the record of a release."""
    model = subjects.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    applied = 0

    def count(*_: Any) -> None:
        nonlocal applied
        applied += 1

    def end() -> None:
        if where == "sleep":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL)

    def before(batch: int) -> None:
        if rank == who and len(private.ledger) == 2 and where in ("losses", "sleep"):
            end()

    optimizer.register_step_pre_hook(count)
    timeout = timedelta(seconds=5) if where == "sleep" else TIMEOUT
    private = privatize_distributed(
        model, optimizer, plan, ledger=ledger, timeout=timeout, verify=False
    )
    append = private.ledger.append

    def recorded(*arguments: Any) -> None:
        if where == "before the record" and len(private.ledger) == 2:
            end()
        append(*arguments)
        if where == "after the record" and len(private.ledger) == 3:
            end()

    if rank == who and "record" in where:
        private.ledger.append = recorded  # type: ignore[method-assign]
    done = Course()
    try:
        with private:
            done = course(private, model, before=before)
    except Exception as error:
        done.parts, done.releases = [[f"{type(error).__name__}: {error}"]], len(private.ledger)  # type: ignore[list-item]
    done.applied = applied
    return done


def ready(rank: int) -> None:
    """Say that the rank is there."""


def counting(rank: int, plan: PrivacyPlan, *, folder: Path) -> Course:
    """Train, and keep count of the updates that are begun, whatever becomes of the process."""
    model = subjects.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    count = (folder / f"applied-{rank}").open("wb", buffering=0)

    def add(*_: Any) -> None:
        count.write(b".")

    optimizer.register_step_pre_hook(add)
    with privatize_distributed(
        model, optimizer, plan, ledger=folder / "ledger.jsonl", timeout=TIMEOUT, verify=False
    ) as private:
        return course(private, model)


def counted(folder: Path, rank: int) -> int:
    """How many updates a rank has begun."""
    path = folder / f"applied-{rank}"
    return path.stat().st_size if path.exists() else 0


# ---- tensors ---------------------------------------------------------------------------------


def tensors_of(rank: int) -> list[Tensor]:
    """Tensors as models have them."""
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(3, 4, generator=generator).t(),
        torch.randn(5, generator=generator).bfloat16(),
        torch.tensor(float(rank), dtype=torch.float64),
        torch.tensor([rank == 0, True]),
        torch.empty(0),
        torch.arange(3) + rank,
    ]


def copied(rank: int) -> list[Tensor]:
    """What rank 0 has."""
    processes = SeveralProcesses(subjects.plan(), timeout=TIMEOUT, splits_noise=True)
    found = tensors_of(rank)
    processes.copy_first(found)
    processes.close()
    return found


def sums_of_ranks() -> list[list[Tensor]]:
    """Of two ranks: large and small ones, in turn, of two types."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2**20 + 3,), (5,), (0,), (3, 4), (), (2**19,), (2**19, 2), (2**19,)]
    return [
        [torch.randn(shape, generator=generator).to(kind) for shape in shapes for kind in KINDS]
        for _ in range(2)
    ]


def added(rank: int) -> list[Tensor]:
    """The sums of all ranks."""
    processes = SeveralProcesses(subjects.plan(), timeout=TIMEOUT, splits_noise=True)
    found = sums_of_ranks()[rank]
    processes.add_up(found)
    processes.close()
    return found


def releases(path: Path) -> int:
    """How many are in a ledger."""
    return len(Ledger.read(path))
