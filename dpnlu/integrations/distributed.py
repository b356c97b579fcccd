"""Private training by several processes, each on its part of every batch, as torchrun starts them.

torch.distributed.init_process_group()
private = privatize_distributed(model, optimizer, plan, ledger=Path("ledger.jsonl"))
step = private.stepper(per_example_loss)
for batch in private.loader(dataset, collate_fn=collate, physical_batch_size=64):
    step(batch)                                  # on every rank alike; no DistributedDataParallel
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import PrivateTraining, privatize
from dpnlu.training.several_processes import ProcessesError as ProcessesError
from dpnlu.training.several_processes import SeveralProcesses, digest_of_tensors

TIMEOUT = timedelta(minutes=10)


def privatize_distributed(
    model: nn.Module,
    optimizer: Optimizer,
    plan: PrivacyPlan,
    *,
    ledger: Path | None = None,
    resume: bool = False,
    engine: str | None = None,
    noise: torch.Generator | Literal["system"] | None = None,
    sampling_rng: np.random.Generator | None = None,
    verify: bool = True,
    timeout: timedelta = TIMEOUT,
) -> PrivateTraining:
    """Make the training of `model` by all processes together follow `plan`; all have to call it.

    Every rank has a model, an optimizer and the whole data set. It begins with the weights and
    buffers of rank 0. The ranks draw the same logical batches, and the loader of each hands out its
    part of them, in physical batches; the handle is used as in a loop of one process.

    A rank does not see a logical batch of which its part is empty, though it joins it: train for as
    many steps as are planned, instead of breaking off a loop on one rank.

    Guarantee: that of `privatize`, with the ε of one process: a logical batch is one Poisson
    sample, of which no example is on two ranks; it gets the noise of the plan once, and rank 0 has
    recorded it before any rank applies it. A rank that fails or ends stops the training of all.
    What the ranks send each other, sums and samples, is private: so must be their network.

    Args:
        model: not wrapped, by `DistributedDataParallel` or others.
        plan: of the whole: its batches are those of all ranks together.
        ledger: where rank 0 records releases; None: in memory only.
        resume: go on with the ledger that is there. Load weights and optimizer state from a
            checkpoint before, on all ranks.
        noise: as in `privatize`; a generator of your own and "system" are used on rank 0 alone, in
            place of fresh entropy on every rank, each of which then draws the noise of its share of
            the parameters.
        sampling_rng: that of rank 0 is used on all ranks.
        timeout: how long ranks wait for each other before training ends. It covers a physical batch
            and the loading of its data, the first of which is slow.

    The other arguments are those of `privatize`, as are the errors.

    Raises:
        ProcessesError: another rank was refused, has ended, or has another plan, model or
            optimizer.
        ValueError: no process group; or see `privatize`.
        LedgerError: there is a ledger and it is not to be resumed, or the other way round.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "Expected a process group, got none: start the script by torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    splits_noise = not isinstance(noise, torch.Generator)
    processes = SeveralProcesses(plan, timeout=timeout, splits_noise=splits_noise)
    with ExitStack() as stack:
        stack.callback(processes.close)
        with processes.reporting():
            _check_device(model)
            privatize(model, optimizer, plan, engine=engine).close()  # what it would refuse later
            _check_same(processes, model, optimizer, plan, engine)
            with _ledger(processes, plan, ledger, resume=resume) as kept:
                processes.copy_first(_state(model))
                private = privatize(
                    model,
                    optimizer,
                    plan,
                    engine=engine,
                    ledger=kept,
                    noise=noise,
                    sampling_rng=sampling_rng,
                    verify=verify,
                    processes=processes,
                )
                stack.callback(private.close)
                processes.check_same({"beginning": ""}, remedy="begin on all ranks")
        stack.pop_all()
    return private


def _state(model: nn.Module) -> Iterable[Tensor]:
    """All that the model computes with."""
    return chain(model.parameters(), model.buffers())


def _check_device(model: nn.Module) -> None:
    """Refuse a model that the process group cannot reach."""
    if dist.get_backend() == "nccl" and any(not t.is_cuda for t in _state(model)):
        raise ValueError(
            "Expected a model on a CUDA device for the NCCL backend, got another: move it there, "
            'or call init_process_group("gloo").'
        )


def _check_same(
    processes: SeveralProcesses,
    model: nn.Module,
    optimizer: Optimizer,
    plan: PrivacyPlan,
    engine: str | None,
) -> None:
    """Refuse to begin unless all ranks would do the same with the same numbers."""
    tensors = [
        (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    ]
    groups = [
        {name: _plain(value) for name, value in group.items()} for group in optimizer.param_groups
    ]
    state = [
        value
        for values in optimizer.state_dict()["state"].values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    facts = {
        "plan": json.dumps(plan.to_dict()),
        "engine": str(engine),
        "model": repr(tensors),
        "optimizer": repr((type(optimizer).__name__, groups)),
        "state of the optimizer": str(digest_of_tensors(state)),
    }
    processes.check_same(facts, remedy="build it in the same way, or load the same checkpoint")


def _plain(value: Any) -> str:
    """An entry of a parameter group, whatever device its tensors are on."""
    if isinstance(value, list):
        return f"shapes {[tuple(parameter.shape) for parameter in value]}"
    return str(value.tolist() if isinstance(value, Tensor) else value)


@contextmanager
def _ledger(
    processes: SeveralProcesses, plan: PrivacyPlan, path: Path | None, *, resume: bool
) -> Iterator[Ledger]:
    """The ledger on rank 0, and copies of it, in memory, on the others. It stays open unless
    something fails in here; one that records nothing is then removed."""
    if processes.rank != 0:
        yield Ledger.copied(processes.from_first(b""))
        return
    kept = _opened(plan, path, resume=resume)
    try:
        processes.from_first(kept.content())
        yield kept
    except BaseException:
        kept.close()
        if path is not None and not resume:
            path.unlink(missing_ok=True)
        raise


def _opened(plan: PrivacyPlan, path: Path | None, *, resume: bool) -> Ledger:
    if not resume:
        return Ledger(plan, path=path, sampled_only=True)
    if path is None:
        raise ValueError("Expected the path of the ledger that is to be resumed, got none.")
    return Ledger.resume(path)
