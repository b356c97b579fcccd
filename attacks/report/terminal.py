"""The main table of a report for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from attacks.report.contract import plain
from attacks.report.findings import findings
from attacks.report.runs import LONGEST_NAME, shortened
from attacks.report.table import Cell, main_table
from attacks.report.table import Table as Data

# What a terminal has room for, under shorter headings; the files have the rest.
HEADINGS = {
    "ε": "ε",
    "intent accuracy (%)": "intent %",
    "slot F1 (%)": "slot F1 %",
    "training time": "train",
    "AUC": "attack AUC",
    "TPR at 1\u00a0% FPR (%)": "TPR at 1 %",
    "ε lower bound": "ε at least",
    "exposure (bits)": "canary bits",
    "exact match (%)": "canary found %",
}

LONGEST_WHOLE = 8
"""Names of at most so many characters stay on one line; the table then fits 80 columns."""


def terminal_table(report: Mapping[str, Any]) -> Table:
    """Return the main table for a terminal: what was measured at all, and any alarm below it.

    Args:
        report: as `attacks.report.contract.validate` accepts it.

    Raises:
        ValueError: as `validate`.
    """
    content = plain(report)
    data = main_table(content)
    columns = [
        (HEADINGS[column.title], [_text(row.cells[index]) for row in data.rows])
        for index, column in enumerate(data.columns)
        if column.title in HEADINGS and not all(row.cells[index].absent for row in data.rows)
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = _caption(content, data), "left"
    names = [shortened(row.name, LONGEST_NAME) for row in data.rows]
    whole = max(map(len, names)) <= LONGEST_WHOLE
    table.add_column("run", overflow="fold", min_width=6, no_wrap=whole)
    for heading, texts in columns:
        table.add_column(heading, min_width=_longest_word([heading, *map(str, texts)]))
    for name, *texts in zip(names, *(texts for _, texts in columns), strict=True):
        table.add_row(Text(name, style="bold"), *texts)
    return table


def _text(cell: Cell) -> Text:
    """The value, and below it its interval, the overhead, or the ceiling of an audit."""
    value = cell.value.removeprefix("≥\u00a0")  # the heading says so
    text = Text(value, style="bold red" if cell.alarm else "")
    below = [detail for detail in cell.details if detail.startswith("[") or detail.endswith("×")]
    if below:
        text.append("\n" + below[0].replace("\u00a0", " "), style="not bold dim")
    return text


def _longest_word(texts: Sequence[str]) -> int:
    """Length of the longest part that must not be broken."""
    return max(len(word) for text in texts for word in text.replace("\n", " ").split(" "))


def _caption(content: Mapping[str, Any], data: Data) -> Text | None:
    """Alarms, and how many warnings the files have."""
    lines = [Text(f"Alarm: {alarm}", style="bold red") for alarm in findings(content).alarms]
    if data.notes:
        number = len(data.notes)
        lines.append(Text(f"{number} warning{'s' * (number > 1)}: see report.md or report.html."))
    return Text("\n").join(lines) if lines else None
