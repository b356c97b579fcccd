"""Trainers made private beside the same trainers without privacy: seconds of a logical step.

    python benchmarks/trainers.py --threads 2 --out benchmarks/results

The work is that of a case of `dpnlu benchmark overhead`. Each trainer trains in turn without and
with privacy, for a few steps a turn; the first steps of a turn are left out, as a private training
checks its first batches, and an ordinary one begins slowly too. Sampling, collating, noise and the
ledger are all in a step. Both sides keep the memory they freed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dpnlu.benchmark.cases import Case, named
from dpnlu.benchmark.process import KEEPS_MEMORY
from dpnlu.cli.benchmark import processor
from dpnlu.mechanism.plan import PrivacyPlan

WARM_UP = 4
EXAMPLES_PER_USER = 8


def transformers(
    case: Case, *, private: bool, steps: int, folder: str, per_user: int | None = None
) -> list[float]:
    """The Trainer of transformers, with gradient accumulation.

    Args:
        per_user: users are protected, who have so many examples each; None: examples are. Batches
            of few users are of very unlike sizes: their time is that of a logical batch's examples.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    from dpnlu.integrations.huggingface import privatize_trainer

    times, counts = [time.perf_counter()], [0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            counts.append(0)

    def collate(examples: list[Any]) -> dict[str, Any]:
        counts[-1] += len(examples)
        return default_data_collator(examples)

    trainer = Trainer(
        model=_model(case).encoder,
        data_collator=collate,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=case.physical,
            gradient_accumulation_steps=case.logical // case.physical,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": ids, "labels": label} for ids, label in case.examples()],
        callbacks=[Clock()],
    )
    if private:
        whose = None if per_user is None else [n // per_user for n in range(len(case.examples()))]
        trainer = privatize_trainer(trainer, plan=_plan(case, steps, per_user), users=whose)
    trainer.train()
    if per_user is None or not private:
        return times
    taken = [b - a for a, b in itertools.pairwise(times)]
    of_size = [one * case.logical / count for one, count in zip(taken, counts, strict=False)]
    return list(itertools.accumulate(of_size, initial=0.0))


def accelerate(case: Case, *, private: bool, steps: int, folder: str) -> list[float]:
    """A loop on top of accelerate, with its gradient accumulation."""
    from accelerate import Accelerator

    from dpnlu.integrations.accelerate import privatize_accelerated

    pieces = case.logical // case.physical
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if private else pieces)
    model = _model(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    examples, times = case.examples(), [time.perf_counter()]
    if private:
        model, optimizer = accelerator.prepare(model, optimizer)
        ledger = Path(folder).with_suffix(".jsonl")
        plan = _plan(case, steps)
        with privatize_accelerated(accelerator, model, optimizer, plan, ledger=ledger) as training:
            step = training.stepper(partial(case.losses_of, model))
            for batch in training.loader(examples, physical_batch_size=case.physical):
                if step(batch):
                    times.append(time.perf_counter())
        return times
    loader = DataLoader(examples, batch_size=case.physical, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in _endless(loader):
        with accelerator.accumulate(model):
            accelerator.backward(case.losses_of(model, batch).mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            times.append(time.perf_counter())
        if len(times) > steps:
            return times
    raise AssertionError("an endless loader ended")


def lightning(case: Case, *, private: bool, steps: int, folder: str) -> list[float]:
    """The Trainer of PyTorch Lightning, with its gradient accumulation."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from dpnlu.integrations.lightning import privatize_trainer

    times = [time.perf_counter()]

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = _model(case)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            losses = case.losses_of(self.model, (batch[0], batch[1]))
            return losses if private else losses.mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    class Clock(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == len(times):
                times.append(time.perf_counter())

    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=1 if private else case.logical // case.physical,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    size = case.logical if private else case.physical
    if private:
        trainer = privatize_trainer(
            trainer,
            plan=_plan(case, steps),
            physical_batch_size=case.physical,
        )
    trainer.fit(Module(), DataLoader(case.examples(), batch_size=size, shuffle=True))
    return times


TRAINERS: dict[str, Callable[..., list[float]]] = {
    "transformers": transformers,
    "transformers, users": partial(transformers, per_user=EXAMPLES_PER_USER),
    "accelerate": accelerate,
    "lightning": lightning,
}


def _model(case: Case) -> Any:
    torch.manual_seed(0)
    return case.build().train()


def _plan(case: Case, steps: int, per_user: int | None = None) -> PrivacyPlan:
    size = len(case.examples())
    return PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=case.logical / size,
        steps=steps,
        target_delta=1e-6,
        num_examples=size if per_user is None else math.ceil(size / per_user),
        unit="example" if per_user is None else "user",
        examples_per_user=per_user,
    )


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def seconds(trainer: str, case: Case, *, turns: int, steps: int) -> dict[str, list[float]]:
    """Of each logical step but the first ones of each turn."""
    found: dict[str, list[float]] = {"ordinary": [], "private": []}
    with tempfile.TemporaryDirectory(prefix="dpnlu-benchmark-") as folder:
        for turn in range(turns):
            for name in found:
                times = TRAINERS[trainer](
                    case,
                    private=name == "private",
                    steps=WARM_UP + steps,
                    folder=str(Path(folder) / f"{turn}-{name}"),
                )
                taken = [b - a for a, b in itertools.pairwise(times)]
                found[name] += taken[WARM_UP:]
    return found


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """In Markdown, with quartiles."""
    lines = [
        "| trainer | ordinary, s | private, s | private / ordinary |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        pairs = zip(found["ordinary"], found["private"], strict=True)
        cells = (found["ordinary"], found["private"], [b / a for a, b in pairs])
        package, _, users = name.partition(",")
        label = f"{package} {version(package)}" + (
            f", users with {EXAMPLES_PER_USER} examples" if users else ""
        )
        lines.append(f"| {label} | " + " | ".join(_quartiles(values) for values in cells) + " |")
    return "\n".join(lines)


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--case", default="MiniLM-L6, logical 256", help="name of an encoder's case"
    )
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed ones of a turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if not KEEPS_MEMORY.items() <= os.environ.items():  # which is read when a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEPS_MEMORY)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    case = named(options.case)
    results = {
        name: seconds(name, case, turns=options.turns, steps=options.steps)
        for name in options.trainers
    }
    text = table(results)
    print(text)
    if options.out is not None:
        day = datetime.date.today().isoformat()
        command = shlex.join(["python", "benchmarks/trainers.py", *arguments])
        facts = (
            f"processor {processor()}, threads {options.threads}, python "
            f"{platform.python_version()}, torch {torch.__version__}"
        )
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{day}-trainers"
        content = {"command": command, "date": day, "machine": facts, "seconds": results}
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(
            f"# Trainers made private, {day}\n\n`{command}`\n\n{facts}; {case.name}; medians and "
            f"quartiles of steps, taken in turns\n\n{text}\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
