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
from dpnlu.runs.progress import OnProgress

# Threads beyond these are refused by no system before it is out of memory.
_MOST_PAIRS, _MOST_THREADS = 1_000_000, 1024


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("benchmark", help="what private training costs here")
    parser.add_argument(
        "what",
        choices=sorted(_MEASUREMENTS),
        help="overhead: time of a private step over an ordinary one; compiled: the same for "
        "compiled steps; memory: their peaks; sweep: time by batch, length and width",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PART",
        help="only cases whose name contains one of these (default: all)",
    )
    parser.add_argument(
        "--pairs", type=int, default=9, help="timed pairs of steps per case (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, help="threads of torch (default: as many as torch takes)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda[:N]|mps",
        help="where steps are computed; auto: an accelerator, if there is one "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for a dated Markdown and JSON file (default: print only)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
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
    text = ""
    with bars(quiet=options.quiet) as on_progress:
        # Written after each row: measuring takes long, and may be interrupted.
        for rows, text in _MEASUREMENTS[options.what](chosen, options, on_progress):
            if options.out is not None:
                path = _keep(options, rows, text)
    print(text)
    if options.out is not None and options.what == "sweep":
        from dpnlu.benchmark.sweep import plot

        plot(rows, path.with_suffix(".svg"))


# What was measured so far, and the table of it.
_Tables = Iterator[tuple[list[Any], str]]


def _overhead(cases: Sequence[Any], options: Any, on_progress: OnProgress) -> _Tables:
    from dpnlu.benchmark import overhead

    rows = []
    for case in _counted(cases, on_progress):
        rows.append(overhead.measure(case, pairs=options.pairs, device=options.device))
        yield rows, overhead.table(rows)


def _compiled(cases: Sequence[Any], options: Any, on_progress: OnProgress) -> _Tables:
    from dpnlu.benchmark import compiled

    suited = [case for case in cases if compiled.can_compile(case)]
    if not suited:
        raise ValueError("Expected --cases without recurrent networks, which are not compiled.")
    rows = []
    for case in _counted(suited, on_progress):
        rows.append(compiled.measure(case, pairs=options.pairs, device=options.device))
        yield rows, compiled.table(rows)


def _memory(cases: Sequence[Any], options: Any, on_progress: OnProgress) -> _Tables:
    from dpnlu.benchmark import memory

    rows = []
    for case in _counted(cases, on_progress):
        rows.append(memory.measure(case, device=options.device))
        yield rows, memory.table(rows)


def _sweep(cases: Sequence[Any], options: Any, on_progress: OnProgress) -> _Tables:
    from dpnlu.benchmark import sweep

    if options.cases:
        raise ValueError("Expected no --cases for a sweep, which has a model of its own: drop it.")
    if options.device != "cpu":
        raise ValueError(f"Expected --device cpu for a sweep, got {options.device}.")
    points = sweep.measure(on_progress, pairs=options.pairs)
    yield points, sweep.table(points)


def _counted(cases: Sequence[Any], on_progress: OnProgress) -> Iterator[Any]:
    for done, case in enumerate(cases, start=1):
        yield case
        on_progress("benchmark", done, len(cases))


_MEASUREMENTS: dict[str, Callable[..., _Tables]] = {
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
