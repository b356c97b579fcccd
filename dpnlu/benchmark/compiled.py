"""What torch's compiler makes of ordinary and of private steps: four kinds of step in turn.

Each case has a process of its own, and six more for the memory of compiled steps. Compiling takes
minutes and is not measured. Recurrent networks cannot be compiled; their cases are left out.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpnlu.benchmark import memory
from dpnlu.benchmark.cases import Case, named
from dpnlu.benchmark.overhead import seconds
from dpnlu.benchmark.process import result_of
from dpnlu.benchmark.steps import ordinary, private

_PROCESSES = 3


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Median times of a logical step, in milliseconds, medians over rounds of their ratios, and
    peaks of memory, medians over processes, in MiB, beyond what libraries and compiler take.

    Attributes:
        ratio: private / ordinary, neither compiled.
        compiled_ratio: private / ordinary, both compiled.
        compiled_ratios: the quartiles of the same.
    """

    case: str
    ordinary_ms: float
    private_ms: float
    ordinary_compiled_ms: float
    private_compiled_ms: float
    ratio: float
    compiled_ratio: float
    compiled_ratios: tuple[float, float]
    ordinary_compiled_mib: float
    private_compiled_mib: float


def measure(case: Case, *, pairs: int, device: str = "cpu") -> Compiled:
    """Time a case in a fresh process with as many threads as this one.

    Raises:
        RuntimeError: the process failed.
    """
    module = "dpnlu.benchmark.compiled"
    times = result_of(module, case.name, str(pairs), str(torch.get_num_threads()), device)
    return Compiled(
        case=case.name,
        **times | {"compiled_ratios": tuple(times["compiled_ratios"])},
        ordinary_compiled_mib=_peak(case, "ordinary", device),
        private_compiled_mib=_peak(case, "private", device),
    )


def _peak(case: Case, kind: str, device: str) -> float:
    """Of several processes: what compiling leaves behind differs between them."""
    return statistics.median(
        memory.peak(case, kind, compiles=True, device=device) for _ in range(_PROCESSES)
    )


def can_compile(case: Case) -> bool:
    """Whether the case's model has no recurrent layer."""
    return not any(isinstance(module, nn.RNNBase) for module in case.build().modules())


def _times(case: Case, *, rounds: int, device: str) -> dict[str, Any]:
    """The fields of `Compiled` that are times or ratios of times."""
    torch.manual_seed(0)
    models = [case.build().train()]
    models += [copy.deepcopy(models[0]) for _ in range(3)]
    with (
        ordinary(case, models[0], device=device) as plain,
        private(case, models[1], device=device) as noisy,
        ordinary(case, models[2], compiles=True, device=device) as plain_compiled,
        private(case, models[3], compiles=True, device=device) as noisy_compiled,
    ):
        steps = (plain, noisy, plain_compiled, noisy_compiled)
        for step in steps * 2:
            step()
        times = [[seconds(step) for step in steps] for _ in range(rounds)]
    medians = [1e3 * statistics.median(kind) for kind in zip(*times, strict=True)]
    ratios = [private / ordinary for _, _, ordinary, private in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ordinary_ms": medians[0],
        "private_ms": medians[1],
        "ordinary_compiled_ms": medians[2],
        "private_compiled_ms": medians[3],
        "ratio": statistics.median(private / ordinary for ordinary, private, _, _ in times),
        "compiled_ratio": statistics.median(ratios),
        "compiled_ratios": (quartiles[0], quartiles[2]),
    }


def table(rows: Sequence[Compiled]) -> str:
    """The results in Markdown."""
    lines = [
        "| work | ordinary ms | private ms | ratio | ordinary compiled ms | private compiled ms | "
        "ratio | quartiles | ordinary compiled MiB | private compiled MiB | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.case} | {row.ordinary_ms:.1f} | {row.private_ms:.1f} | {row.ratio:.3f} | "
        f"{row.ordinary_compiled_ms:.1f} | {row.private_compiled_ms:.1f} | "
        f"**{row.compiled_ratio:.3f}** | {row.compiled_ratios[0]:.3f} – "
        f"{row.compiled_ratios[1]:.3f} | {row.ordinary_compiled_mib:.0f} | "
        f"{row.private_compiled_mib:.0f} | "
        f"**{row.private_compiled_mib / row.ordinary_compiled_mib:.2f}** |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    name, pairs, threads, device = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(_times(named(name), rounds=int(pairs), device=device)))
