"""What each accountant answers, and how long it takes.

    python benchmarks/accountants.py --out benchmarks/results

Every accountant is asked every question in turn, `--rounds` times, in one process, so that imports
count nowhere; what was found before is forgotten. Then commands are timed, each call a process of
its own with its imports.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

from dpnlu.accounting import accountants as accounting
from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.events import SampledGaussian
from dpnlu.cli.benchmark import processor

# (noise multiplier, sample rate, steps), δ
QUESTIONS = [
    ((0.858, 0.0391, 511), 1e-5),
    ((1.83, 0.0391, 5111), 1e-5),
    ((0.669, 2.56e-4, 11_719), 1e-7),
    ((0.562, 2.56e-5, 39_062), 1e-8),
    ((1.0, 0.01, 10_000), 1e-10),
    ((0.8, 1e-4, 1_000_000), 1e-6),
    ((0.8, 1e-4, 1_000_000), 1e-8),
    ((0.8, 1e-4, 1_000_000), 1e-10),
]
ACCOUNTANTS = ("pld", "dp-accounting", "prv", "rdp")
_COMMON = "--num-examples 13084 --batch-size 512 --epochs 20 --epsilon 8"
COMMANDS = [
    _COMMON,
    _COMMON.replace("--epsilon 8", "--epsilon 2"),
    f"{_COMMON} --noise-schedule exponential:0.97",
    _COMMON.replace("--epochs 20", "--epochs 200") + " --noise-schedule exponential:0.99",
    f"{_COMMON} --microbatches 8",
    "--num-examples 1000000 --batch-size 256 --epochs 3 --epsilon 1 --delta 1e-7",
    "--num-examples 10000000 --batch-size 256 --epochs 1 --epsilon 1 --delta 1e-8",
    "--num-examples 100000000 --batch-size 256 --epochs 1 --epsilon 1 --delta 1e-9",
    "--num-examples 1000000 --batch-size 100 --epochs 100 --epsilon 8 --delta 1e-10",
    f"{_COMMON} --accountant dp-accounting",
    f"{_COMMON} --accountant rdp",
    f"{_COMMON} --accountant prv",
]


def answer(question: tuple[tuple[float, float, int], float], accountant: str) -> dict:
    """ε and seconds; or why there is none."""
    (sigma, rate, steps), delta = question
    event = SampledGaussian(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    for remembering in vars(accounting).values():
        if hasattr(remembering, "cache_clear"):
            remembering.cache_clear()
    start = time.perf_counter()
    try:
        found = epsilon([event], delta=delta, accountant=accountant)
    except (ValueError, RuntimeError) as error:
        return {"refused": str(error).splitlines()[0]}
    return {"epsilon": found, "seconds": time.perf_counter() - start}


def compared(rounds: int) -> list[dict]:
    """A row per question: of each accountant ε and the median of its seconds."""
    answer(QUESTIONS[0], "rdp")  # imports
    for accountant in ACCOUNTANTS:
        answer(QUESTIONS[0], accountant)
    rows = []
    for question in QUESTIONS:
        found: dict[str, list[dict]] = {name: [] for name in ACCOUNTANTS}
        for _ in range(rounds):
            for name in ACCOUNTANTS:
                found[name].append(answer(question, name))
        row = {"question": question}
        for name, answers in found.items():
            row[name] = answers[0]
            if "seconds" in answers[0]:
                row[name]["seconds"] = statistics.median(one["seconds"] for one in answers)
        rows.append(row)
        print(row, flush=True)
    return rows


def timed(command: str, rounds: int) -> dict:
    """Wall seconds of `dpnlu budget`."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        program = Path(sys.executable).with_name("dpnlu")
        done = subprocess.run(
            [program, "budget", *command.split()], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - start)
        assert b"epsilon: " in done.stdout
    row = {"command": f"dpnlu budget {command}", "seconds": seconds}
    print(row, flush=True)
    return row


def tables(rows: list[dict], commands: list[dict]) -> str:
    lines = [
        "| σ, q, steps; δ | " + " | ".join(ACCOUNTANTS) + " |",
        "| --- |" + " ---: |" * len(ACCOUNTANTS),
    ]
    for row in rows:
        (sigma, rate, steps), delta = row["question"]
        cells = [
            f"{row[name]['epsilon']:.5g} ({row[name]['seconds']:.2f} s)"
            if "epsilon" in row[name]
            else "refused"
            for name in ACCOUNTANTS
        ]
        asked = f"{sigma:g}, {rate:g}, {steps:,}; {delta:g}"
        lines.append(f"| {asked} | {' | '.join(cells)} |")
    lines += ["", "| command | seconds, median [least, most] |", "| --- | ---: |"]
    for row in commands:
        seconds = row["seconds"]
        lines.append(
            f"| `{row['command']}` | {statistics.median(seconds):.2f} "
            f"[{min(seconds):.2f}, {max(seconds):.2f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = compared(options.rounds)
    commands = [timed(command, options.rounds) for command in COMMANDS]
    machine = {
        "processor": processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scipy", "dp-accounting", "opacus")},
    }
    command, day = " ".join(["python", *sys.argv]), datetime.date.today().isoformat()
    content = {"command": command, "date": day, "machine": machine}
    content |= {"rows": rows, "commands": commands}
    path = options.out / f"{day}-accountants"
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [f"# ε by four accountants, {day}", f"`{command}`", facts, tables(rows, commands)]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
