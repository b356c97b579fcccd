"""Private steps of two processes beside ordinary ones: what privacy costs where batches are shared.

    python benchmarks/processes.py --out benchmarks/results

Each process has one thread, on one machine, in a gloo group. Ordinary steps are those of
`DistributedDataParallel`, on batches of a fixed size, whose gradients are added up during the last
backward pass; private ones are those of `privatize_distributed`, on Poisson batches of the same
expected size. Both take turns, step by step, in the same processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from dpnlu.benchmark.cases import CASES, Case
from dpnlu.cli.benchmark import processor
from dpnlu.integrations.distributed import privatize_distributed
from dpnlu.mechanism.plan import PrivacyPlan

# The first batch of a kind is checked, and threads begin: left out.
WARM_UP = 2


def ordinary_steps(case: Case, model: nn.Module, rank: int, count: int) -> Iterator[None]:
    """Steps of a rank on its share of every batch."""
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)
    examples, share = case.examples(), case.logical // count
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order) - case.logical + 1, case.logical):
            ours = order[start : start + case.logical][rank::count]
            cuts = range(0, share, case.physical)
            for first in cuts:
                inputs = default_collate([examples[n] for n in ours[first:][: case.physical]])
                with nullcontext() if first == cuts[-1] else wrapped.no_sync():
                    (case.losses_of(wrapped, inputs).sum() / share).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            yield


def private_steps(case: Case, model: nn.Module, ledger: Path) -> Iterator[None]:
    """Steps of a rank on its part of every batch."""
    examples = case.examples()
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=case.logical / len(examples),
        steps=10**9,
        target_delta=1e-6,
        num_examples=len(examples),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    with privatize_distributed(model, optimizer, plan, ledger=ledger) as private:
        step = private.stepper(partial(case.losses_of, model))
        for inputs in private.loader(examples, physical_batch_size=case.physical):
            if step(inputs):
                yield


def measure(rank: int, case_name: str, count: int, steps: int, folder: str) -> None:
    """Take turns, and have rank 0 write down the seconds of both."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    (case,) = (case for case in CASES if case.name == case_name)
    seconds: dict[str, list[float]] = {"ordinary": [], "private": []}
    models = []
    for _ in seconds:
        torch.manual_seed(0)
        models.append(case.build().train())
    kinds = {
        "ordinary": ordinary_steps(case, models[0], rank, count),
        "private": private_steps(case, models[1], Path(folder) / "ledger.jsonl"),
    }
    for number in range(WARM_UP + steps):
        for name, taken in kinds.items():
            dist.all_reduce(torch.zeros(1))  # all begin at once
            started = time.perf_counter()
            next(taken)
            dist.all_reduce(torch.zeros(1))
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    kinds["private"].close()  # type: ignore[attr-defined]
    dist.destroy_process_group()


def table(case: Case, seconds: dict[str, list[float]]) -> str:
    """The result in Markdown, with quartiles."""
    ratios = [a / b for a, b in zip(seconds["ordinary"], seconds["private"], strict=True)]
    cells = [_quartiles(seconds[name]) for name in ("ordinary", "private")]
    return "\n".join(
        [
            "| work | ordinary, s | private, s | private / ordinary throughput |",
            "| --- | --- | --- | --- |",
            f"| {case.name} | {cells[0]} | {cells[1]} | {_quartiles(ratios)} |",
        ]
    )


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="MiniLM-L6, logical 256", help="name of a case")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    (case,) = (case for case in CASES if case.name == options.case)
    with tempfile.TemporaryDirectory(prefix="dpnlu-benchmark-") as folder:
        spawn(  # type: ignore[no-untyped-call]
            measure,
            args=(case.name, options.processes, options.steps, folder),
            nprocs=options.processes,
        )
        seconds = json.loads((Path(folder) / "seconds.json").read_text())
    text = table(case, seconds)
    print(text)
    if options.out is not None:
        day = datetime.date.today().isoformat()
        command = shlex.join(["python", "benchmarks/processes.py", *arguments])
        facts = (
            f"processor {processor()}, {options.processes} processes of one thread, python "
            f"{platform.python_version()}, torch {torch.__version__}"
        )
        path = options.out / f"{day}-processes"
        content = {"command": command, "date": day, "machine": facts, "seconds": seconds}
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(
            f"# Two processes, {day}\n\n`{command}`\n\n{facts}; medians and quartiles of steps "
            f"that took turns\n\n{text}\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
