"""What the system's noise costs beside that of a generator: alone, and in a training.

    python benchmarks/noise.py --data snips:DIR --out benchmarks/results

Noise alone is drawn for a million entries; a training is one epoch of the private model that is
recommended, from the first step on, its checks included. Times are those of the processor, so that
other work on the machine does not count, and of all threads together.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dpnlu.cli.benchmark import processor
from dpnlu.mechanism.noise import entropy_generators, fill_gaussian
from dpnlu.runs.resumable import Work, prepared
from dpnlu.runs.settings import NOISES, TrainSettings
from dpnlu.runs.train import train

ENTRIES = 10**6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one source of noise costs, medians.

    Attributes:
        milliseconds: of a million entries.
        epoch: seconds of an epoch of training.
        steps: of that epoch.
        weights: that get noise in each of them.
    """

    noise: str
    milliseconds: float
    epoch: float
    steps: int
    weights: int


def measure(noise: str, *, data: str, model: str, repetitions: int) -> Cost:
    """Draw a million entries, and train for an epoch, a few times each."""
    entries = torch.empty(ENTRIES)
    generators = [] if noise == "system" else entropy_generators()
    alone = _times(
        lambda: fill_gaussian([entries], std=1.0, generators=generators), 3 * repetitions
    )
    settings = TrainSettings(data=data, model=model, epsilon=8.0, epochs=1.0, noise=noise)
    works = [prepared(settings) for _ in range(repetitions)]
    work = works[0]
    assert work.plan is not None
    weights = (p.numel() for p in work.classifier.model.parameters() if p.requires_grad)
    return Cost(
        noise=noise,
        milliseconds=1e3 * statistics.median(alone),
        epoch=statistics.median(_times(lambda: _epoch(works.pop()), repetitions)),
        steps=work.plan.steps,
        weights=sum(weights),
    )


def _epoch(work: Work) -> None:
    train(
        work.classifier,
        work.corpus.split("train"),
        recipe=work.experiment.recipe,
        compute=work.experiment.compute,
        plan=work.plan,
        seed=0,
        system_noise=work.settings.noise == "system",
    )


def _times(act: Callable[[], None], repetitions: int) -> list[float]:
    found = []
    for _ in range(repetitions):
        started = time.process_time()
        act()
        found.append(time.process_time() - started)
    return found


def table(costs: list[Cost]) -> str:
    """The results in Markdown."""
    lines = [
        "| noise | a million entries, ms | an epoch, s | steps | weights |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {cost.noise} | {cost.milliseconds:.1f} | {cost.epoch:.1f} | {cost.steps} | "
        f"{cost.weights} |"
        for cost in costs
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, metavar="SPEC")
    parser.add_argument("--model", default="lstm")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    named = {"data": options.data, "model": options.model, "repetitions": options.repetitions}
    costs = [measure(noise, **named) for noise in NOISES]
    text = table(costs)
    print(text)
    if options.out is not None:
        day = datetime.date.today().isoformat()
        kind = options.data.partition(":")[0]
        arguments = [kind + ":DIR" if one == options.data else one for one in arguments]
        command = shlex.join(["python", "benchmarks/noise.py", *arguments])
        facts = (
            f"processor {processor()}, threads {options.threads}, python "
            f"{platform.python_version()}, torch {torch.__version__}"
        )
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{day}-noise"
        rows = [asdict(cost) for cost in costs]
        content = {"command": command, "date": day, "machine": facts, "rows": rows}
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(
            f"# Cost of the noise, {day}\n\n`{command}`\n\n{facts}\n\n{text}\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
