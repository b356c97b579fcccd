"""`dpnlu benchmark`: the tables of the documentation, on your own machine."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpnlu.mechanism.ranges import check_count
from dpnlu.runs.progress import Told

# Threads beyond these are refused by no system before it is out of memory.
_MOST_PAIRS, _MOST_THREADS = 1_000_000, 1024


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("benchmark", help="what private training costs here")
    parser.add_argument("what", choices=sorted(_MEASUREMENTS))
    parser.add_argument("--cases", nargs="+", default=[], help="only cases whose name has this")
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs of steps per case")
    parser.add_argument("--threads", type=int, help="of torch; None: as it is")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]|mps")
    parser.add_argument("--out", type=Path, help="folder for a dated Markdown and JSON file")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, and keep it if asked to.

    Raises:
        ValueError: no case has such a name, or an option is out of range.
    """
    if options.pairs < 3:
        raise ValueError(f"Expected --pairs >= 3, got {options.pairs}.")
    check_count("pairs", options.pairs, most=_MOST_PAIRS)
    if options.threads is not None:
        check_count("threads", options.threads, most=_MOST_THREADS)
    import torch

    from dpnlu.benchmark.cases import CASES
    from dpnlu.runs.progress import bars
    from dpnlu.runs.resources import resolved_device

    options.device = resolved_device(options.device)
    chosen = [
        case
        for case in CASES
        if not options.cases or any(part in case.name for part in options.cases)
    ]
    if not chosen:
        names = "; ".join(case.name for case in CASES)
        raise ValueError(f"Expected --cases among {names}; got {' '.join(options.cases)}.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)  # now, and not after all was measured
    with bars(quiet=options.quiet) as told:
        rows, text = _MEASUREMENTS[options.what](chosen, options, told)
    print(text)
    if options.out is not None:
        path = _keep(options, rows, text)
        if options.what == "sweep":
            from dpnlu.benchmark.sweep import plot

            plot(rows, path.with_suffix(".svg"))


def _overhead(cases: Sequence[Any], options: Any, told: Told) -> tuple[list[Any], str]:
    from dpnlu.benchmark import overhead

    rows = [
        overhead.measure(case, pairs=options.pairs, device=options.device)
        for case in _counted(cases, told)
    ]
    return rows, overhead.table(rows)


def _compiled(cases: Sequence[Any], options: Any, told: Told) -> tuple[list[Any], str]:
    from dpnlu.benchmark import compiled

    suited = [case for case in cases if compiled.can_compile(case)]
    if not suited:
        raise ValueError("Expected --cases without recurrent networks, which are not compiled.")
    rows = [
        compiled.measure(case, pairs=options.pairs, device=options.device)
        for case in _counted(suited, told)
    ]
    return rows, compiled.table(rows)


def _memory(cases: Sequence[Any], options: Any, told: Told) -> tuple[list[Any], str]:
    from dpnlu.benchmark import memory

    rows = [memory.measure(case, device=options.device) for case in _counted(cases, told)]
    return rows, memory.table(rows)


def _sweep(cases: Sequence[Any], options: Any, told: Told) -> tuple[list[Any], str]:
    from dpnlu.benchmark import sweep

    if options.cases:
        raise ValueError("Expected no --cases for a sweep, which has a model of its own: drop it.")
    if options.device != "cpu":
        raise ValueError(f"Expected --device cpu for a sweep, got {options.device}.")
    points = sweep.measure(told, pairs=options.pairs)
    return points, sweep.table(points)


def _counted(cases: Sequence[Any], told: Told) -> Iterator[Any]:
    for done, case in enumerate(cases, start=1):
        yield case
        told("benchmark", done, len(cases))


_MEASUREMENTS: dict[str, Callable[..., tuple[list[Any], str]]] = {
    "overhead": _overhead,
    "compiled": _compiled,
    "memory": _memory,
    "sweep": _sweep,
}


def _keep(options: argparse.Namespace, rows: Sequence[Any], table: str) -> Path:
    import torch

    day = datetime.date.today().isoformat()
    machine = {
        "processor": processor(),
        **device_facts(options.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    content = {
        "command": options.command_line,
        "date": day,
        "machine": machine,
        "rows": [asdict(row) for row in rows],
    }
    path: Path = options.out / f"{day}-{options.what}"
    written = json.dumps(content, indent=1, allow_nan=False)
    path.with_suffix(".json").write_text(written + "\n", encoding="utf-8")
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = (
        f"# {options.what.capitalize()}, {day}\n\n`{options.command_line}`\n\n{facts}\n\n{table}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path


def device_facts(device: str) -> dict[str, str]:
    """What an accelerator calls itself; nothing for the CPU."""
    if device == "cpu":
        return {}
    import torch

    return {"device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device}


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
