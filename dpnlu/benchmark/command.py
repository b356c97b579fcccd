"""`dpnlu benchmark`: the tables of the documentation, on your own machine."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("benchmark", help="what private training costs here")
    parser.add_argument("what", choices=["overhead", "memory"])
    parser.add_argument("--cases", nargs="+", default=[], help="only cases whose name has this")
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs of steps per case")
    parser.add_argument("--threads", type=int, help="of torch; None: as it is")
    parser.add_argument("--out", type=Path, help="folder for a dated Markdown and JSON file")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, and keep it if asked to.

    Raises:
        ValueError: no case has such a name, or an option is out of range.
    """
    import torch

    from dpnlu.benchmark import memory, overhead
    from dpnlu.benchmark.cases import CASES
    from dpnlu.progress import bars

    chosen = [
        case
        for case in CASES
        if not options.cases or any(part in case.name for part in options.cases)
    ]
    if not chosen:
        names = "; ".join(case.name for case in CASES)
        raise ValueError(f"Expected --cases among {names}; got {' '.join(options.cases)}.")
    if options.pairs < 3:
        raise ValueError(f"Expected --pairs >= 3, got {options.pairs}.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows: list[Any] = []
    with bars(quiet=options.quiet) as told:
        for done, case in enumerate(chosen, start=1):
            if options.what == "memory":
                rows.append(memory.measure(case))
            else:
                rows.append(overhead.measure(case, pairs=options.pairs))
            told(options.what, done, len(chosen))
    table = (memory if options.what == "memory" else overhead).table(rows)
    print(table)
    if options.out is not None:
        _keep(options, rows, table)


def _keep(options: argparse.Namespace, rows: Sequence[Any], table: str) -> None:
    import torch

    day = datetime.date.today().isoformat()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": processor(),
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
    path = options.out / f"{day}-{options.what}"
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = (
        f"# {options.what.capitalize()}, {day}\n\n`{options.command_line}`\n\n{facts}\n\n{table}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
