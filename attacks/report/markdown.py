"""A report as Markdown, for a repository or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attacks.report import notes
from attacks.report.changes import changes
from attacks.report.figures import OF_CHANGES, Drawing
from attacks.report.findings import findings
from attacks.report.runs import clean
from attacks.report.table import (
    Cell,
    Table,
    attack_table,
    canary_table,
    main_table,
    mechanism_table,
)


def to_markdown(report: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """Return the report as GitHub-flavoured Markdown that shows `figures/*.svg` beside it.

    Guarantee: text of the report is shown, never interpreted as markup.

    Args:
        report: as `attacks.report.contract.validate` accepts it.
        drawings: the figures, in reading order.
    """
    blocks = [
        *_head(report),
        *_results(report),
        *(block for d in drawings if d.name not in OF_CHANGES for block in _figure(d)),
        *_changes(report, [drawing for drawing in drawings if drawing.name in OF_CHANGES]),
        *_method(report),
    ]
    return "\n\n".join(blocks) + "\n"


def escaped(text: object) -> str:
    """Return one line that Markdown shows as it is.

    >>> print(escaped("a|b <i>*c*"))
    a\\|b \\<i\\>\\*c\\*
    """
    line = clean(text).replace("&", "&amp;")
    line = re.sub(r"([\\`*_<>|~$])", r"\\\1", line)
    # Brackets make a link only together with what follows; intervals stay readable.
    line = re.sub(r"\](?=[(\[:])", r"\\]", line)
    return re.sub(r"^(\d*)(?:(?<!\d)([#+=\-])|(?<=\d)([.)])(?=\s|$))", r"\1\\\2\3", line)


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    """Title, alarms, and what the report says."""
    said = findings(report)
    yield f"# {escaped(report.get('title', '')) or 'Leakage report'}"
    if "created" in report:
        yield escaped(report["created"])
    yield "## What this says"
    for alarm in said.alarms:
        yield f"> [!CAUTION]\n> **Alarm.** {escaped(alarm)}"
    parts = [("What privacy costs", said.cost), ("What leaks", said.leakage)]
    for name, text in [*parts, ("How far to trust it", said.trust)]:
        if text:
            yield f"**{name}.** {escaped(text)}"


def _results(report: Mapping[str, Any]) -> Iterator[str]:
    """The table with its warnings, and the two tables of details."""
    main = main_table(report)
    yield "## Results"
    yield _table(main, first="run", notes=True)
    yield escaped(notes.legend(report))
    if main.notes:
        yield "Warnings:"
        yield _numbered(main.notes)
    details = {
        "Every membership attack": attack_table(report),
        "Every canary": canary_table(report),
        "What each ε was computed from": mechanism_table(report),
    }
    for title, table in details.items():
        if table is not None:
            yield f"### {title}"
            yield _table(table, first="run")


def _figure(drawing: Drawing) -> Iterator[str]:
    """One figure and how to read it."""
    yield f"### {drawing.title}"
    yield f"![{drawing.title}](figures/{drawing.name}.svg)"
    yield drawing.caption


def _changes(report: Mapping[str, Any], drawings: Sequence[Drawing]) -> Iterator[str]:
    """The section about what privacy changed, where anything was compared."""
    found = changes(report)
    if found is None:
        return
    yield "## What did privacy change"
    for name, text in found.said:
        yield f"**{name}.** {escaped(text)}"
    for drawing in drawings:
        yield from _figure(drawing)
    for details in found.details:
        yield f"### {escaped(details.title)}"
        yield _table(details.table, first=details.first)
    yield escaped(found.reading)


def _method(report: Mapping[str, Any]) -> Iterator[str]:
    """How it was measured, the words, and the limits."""
    yield "## How this was measured"
    facts = notes.data_facts(report) + notes.setup_facts(report) + notes.machine_facts(report)
    if facts:
        yield _bullets([f"{escaped(name)}: {escaped(text)}" for name, text in facts])
    if "command" in report:
        yield _fenced(notes.command(report))
    yield "## What the words mean"
    yield _bullets([f"**{escaped(name)}**: {escaped(text)}" for name, text in notes.MEANINGS])
    yield "## What this does not say"
    yield _bullets([escaped(limit) for limit in notes.limits(report)])


def _table(table: Table, *, first: str, notes: bool = False) -> str:
    """A table with pipes; with the numbers of the notes in a last column if asked."""
    last = ["warnings"] if notes else []
    lines = [[first, *(escaped(column.title) for column in table.columns), *last]]
    lines.append(["---"] * len(lines[0]))
    for row in table.rows:
        numbers = [", ".join(map(str, row.notes)) or "none"] if notes else []
        lines.append([escaped(row.name), *(_cell(cell) for cell in row.cells), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    """The value, its interval, and the rest in parentheses; bold where it refutes the guarantee."""
    limits = [detail for detail in cell.details if detail.startswith("[")]
    others = [detail for detail in cell.details if not detail.startswith("[")]
    text = escaped(" ".join([cell.value, *limits]) + (f" ({', '.join(others)})" if others else ""))
    return f"**{text}** (alarm)" if cell.alarm else text


def _bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def _numbered(lines: Sequence[str]) -> str:
    """A numbered list."""
    return "\n".join(f"{number}. {escaped(line)}" for number, line in enumerate(lines, 1))


def _fenced(code: str) -> str:
    """Code in a fence that is longer than any within it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return f"{fence}\n{code}\n{fence}"
