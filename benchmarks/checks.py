"""What the checks of the default engine cost: a batch that is checked beside one that is not.

    python benchmarks/checks.py --threads 2 --out benchmarks/results

Every step is one physical batch. The first, the fourth and the sixteenth are checked; what the
checks add to a whole training follows from their costs and from how often they come: the first
batch, and once more for a model with parameters that start as zeros; powers of four; and one batch
in five hundred.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dpnlu.benchmark.cases import CASES, Case
from dpnlu.benchmark.steps import private
from dpnlu.cli.benchmark import processor

BATCHES = 20
CHECKED = (1, 4, 16)
RECHECKED = 500
LENGTHS = (1_000, 10_000)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of processor time of a batch, medians over trainings.

    Attributes:
        plain: of a batch that is not checked.
        first, later: of the first batch, and of one that is checked later.
        firsts: how many first batches there are.
        shares: what checks add to trainings of `LENGTHS` batches, relative to none.
    """

    case: str
    plain: float
    first: float
    later: float
    firsts: int

    @property
    def shares(self) -> list[float]:
        first, later = (cost / self.plain - 1 for cost in (self.first, self.later))
        return [
            (self.firsts * first + later * (math.floor(math.log(length, 4)) + length / RECHECKED))
            / length
            for length in LENGTHS
        ]


def measure(case: Case, *, trainings: int) -> Cost:
    """Time the first batches of a few trainings."""
    case = replace(case, logical=case.physical)
    times = [_times(case) for _ in range(trainings)]
    first, later, plain = [], [], []
    for number, seconds in ((n, s) for one in times for n, s in enumerate(one, start=1)):
        (first if number == 1 else later if number in CHECKED else plain).append(seconds)
    return Cost(
        case=case.name,
        plain=statistics.median(plain),
        first=statistics.median(first),
        later=statistics.median(later),
        firsts=1 + _has_zeros(case.build()),
    )


def _has_zeros(model: nn.Module) -> bool:
    return not all(p.any() for p in model.parameters() if p.requires_grad)


def _times(case: Case) -> list[float]:
    torch.manual_seed(0)
    model = case.build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(1e-3)
    with private(case, model) as step:
        found = []
        for _ in range(BATCHES):
            started = time.process_time()
            step()
            found.append(time.process_time() - started)
    return found


def table(costs: Sequence[Cost]) -> str:
    """The results in Markdown."""
    lines = [
        "| work | batch, ms | first batch | checked batch | added to 1000 batches | to 10 000 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cost in costs:
        first, later = (seconds / cost.plain for seconds in (cost.first, cost.later))
        shares = " | ".join(f"{share:.1%}" for share in cost.shares)
        lines.append(
            f"| {cost.case} | {1e3 * cost.plain:.0f} | {first:.1f} × | {later:.1f} × | {shares} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = [
        case
        for case in CASES
        if not case.sampled  # whose batches differ in size
        and (not options.cases or any(part in case.name for part in options.cases))
    ]
    costs = []
    for case in chosen:
        costs.append(measure(case, trainings=options.trainings))
        print(table(costs[-1:]).splitlines()[-1], file=sys.stderr)
    text = table(costs)
    print(text)
    if options.out is not None:
        day = datetime.date.today().isoformat()
        command = shlex.join(["python", "benchmarks/checks.py", *arguments])
        facts = (
            f"processor {processor()}, threads {options.threads}, python "
            f"{platform.python_version()}, torch {torch.__version__}"
        )
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{day}-checks"
        rows = [asdict(cost) | {"shares": cost.shares} for cost in costs]
        content = {"command": command, "date": day, "machine": facts, "rows": rows}
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(
            f"# Cost of the checks, {day}\n\n`{command}`\n\n{facts}\n\n{text}\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
