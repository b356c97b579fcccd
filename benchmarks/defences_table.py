"""The tables and the heat map of `benchmarks/defences.py`, from its rows."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from attacks.canaries import group_epsilon_from_extraction
from attacks.intervals import binomial_interval
from dpnlu.cli.benchmark import processor

Row = Mapping[str, Any]
# What the heat map shows, if it was run: the published attack, the best search, all secrets.
SHOWN = ("published", "refined", "coordinates", "enumeration")
NO_DELTA = 0.0


def document(rows: Sequence[Row], names: Sequence[str], *, command: str, data: str) -> str:
    """The page of a file of rows."""
    facts = (
        f"processor {processor()}, cores {os.cpu_count()}, threads {torch.get_num_threads()}, "
        f"python {platform.python_version()}, torch {torch.__version__}"
    )
    parts = [
        f"# Canary extraction, {data}, {datetime.date.today()}",
        f"`{command}`",
        facts,
        "Every model has a secret of its own; intervals are of 95 %, of Clopper and Pearson. "
        "*Enumeration* scores all secrets: where it finds one that a search misses, the search was "
        "broken and the secret not protected. Exposure is the mean over the models; ε of all "
        "copies together is at least what the extractions prove, at 95 %.",
        cells_table(rows, names),
        "## Attacks",
        "Secrets found exactly, their interval, the mean share of wrong tokens, and seconds.",
        attacks_table(rows, names),
    ]
    return "\n\n".join(parts) + "\n"


def cells_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line per cell: what exhaustive scoring says, and what the defence costs."""
    lines = [
        "| models | number | enumeration finds | ranks of the secrets | exposure, bits | of | "
        "group ε ≥ | accounted | intent accuracy | slot F1 | training, s |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        of_cell = [row for row in rows if row["cell"] == name]
        if of_cell:
            lines.append(f"| {name} | {len(of_cell)} | " + " | ".join(_cells(of_cell)) + " |")
    return "\n".join(lines)


def _cells(rows: Sequence[Row]) -> list[str]:
    best = "enumeration" if "enumeration" in rows[0]["attacks"] else "refined"
    hits = exact(rows, best)
    delta = rows[0].get("delta", NO_DELTA)
    proven = group_epsilon_from_extraction(
        hits, len(rows), candidates=rows[0]["combinations"], delta=delta
    ).epsilon_lower_bound
    ranks = sorted(row["rank"] for row in rows if "rank" in row)
    return [
        _share(hits, len(rows)) if best == "enumeration" else "–",
        ", ".join(f"{rank:g}" for rank in ranks) or "–",
        f"{_mean(rows, 'exposure'):.1f}",
        f"{math.log2(rows[0]['combinations']):.1f}",
        f"{proven:.1f}",
        f"{rows[0]['group_epsilon']:.3g}" if "group_epsilon" in rows[0] else "∞",
        f"{_mean(rows, 'intent_accuracy'):.3f}" if "intent_accuracy" in rows[0] else "–",
        f"{_mean(rows, 'slot_f1'):.3f}" if "slot_f1" in rows[0] else "–",
        f"{_mean(rows, 'train_seconds'):.0f}",
    ]


def attacks_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A line per cell, a column per attack."""
    attacks = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    lines = [
        "| models | " + " | ".join(attacks) + " |",
        "| --- |" + " --- |" * len(attacks),
    ]
    for name in names:
        of_cell = [row for row in rows if row["cell"] == name]
        if of_cell:
            found = [_found(of_cell, attack) for attack in attacks]
            lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _found(rows: Sequence[Row], attack: str) -> str:
    outcomes = [row["attacks"][attack] for row in rows if attack in row["attacks"]]
    if not outcomes:
        return "–"
    wrong, seconds = (
        statistics.mean(outcome[key] for outcome in outcomes) for key in ("wrong", "seconds")
    )
    return f"{_share(exact(rows, attack), len(outcomes))}; {wrong:.2f}; {seconds:.1f} s"


def exact(rows: Sequence[Row], attack: str) -> int:
    """How many secrets an attack found whole."""
    return sum(row["attacks"][attack]["wrong"] == 0 for row in rows if attack in row["attacks"])


def _share(hits: int, trials: int) -> str:
    low, high = binomial_interval(hits, trials, confidence=0.95)
    return f"{hits} of {trials} [{low:.2f}, {high:.2f}]"


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def heat_map(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Draw the share of secrets found, cell by attack, and exposure as a share of its bits."""
    names = [name for name in names if any(row["cell"] == name for row in rows)]
    if not names:
        return
    attacks = [a for a in SHOWN if any(a in row["attacks"] for row in rows)]
    titles = [*attacks, "exposure"]
    figure = Figure(figsize=(2.5 + 1.3 * len(titles), 1.2 + 0.36 * len(names)), layout="tight")
    axes = figure.subplots()
    shares = [_shares([row for row in rows if row["cell"] == name], attacks) for name in names]
    axes.imshow(
        [[float("nan") if share is None else share for share in line] for line in shares],
        cmap="Reds",
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            text = "–" if share is None else f"{share:.2f}"
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                color="white" if (share or 0) > 0.6 else "black",
            )
    axes.set_xticks(range(len(titles)), titles)
    axes.set_yticks(range(len(names)), names)
    axes.set_title("Secrets found, and exposure as a share of all bits")
    figure.savefig(path)


def _shares(rows: Sequence[Row], attacks: Sequence[str]) -> list[float | None]:
    found: list[float | None] = []
    for attack in attacks:
        trials = sum(attack in row["attacks"] for row in rows)
        found.append(exact(rows, attack) / trials if trials else None)
    return [*found, _mean(rows, "exposure") / math.log2(rows[0]["combinations"])]
