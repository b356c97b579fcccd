"""Reports: what was measured, as JSON for machines, as Markdown, HTML and figures for people."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attacks.evaluation import evaluate
from attacks.report.contract import plain, validate
from attacks.report.figures import FIGURES, drawings
from attacks.report.markdown import to_markdown
from attacks.report.page import to_html
from attacks.report.runs import strongest_attack
from attacks.report.terminal import terminal_table

__all__ = ["evaluate", "strongest_attack", "terminal_table", "validate", "write_report"]


def write_report(report: Mapping[str, Any], directory: Path) -> Path:
    """Write report.json, report.md, report.html and figures/*.svg into a directory.

    Each file is replaced as a whole or not at all, report.json first: nothing measured is lost if a
    later one fails. The same report gives the same bytes. Figures of an earlier report that this
    one has no data for are removed; other files stay.

    Args:
        report: as `validate` accepts it.
        directory: created if it does not exist.

    Returns:
        The path of report.html, which needs no other file.

    Raises:
        ValueError: as `validate`; then nothing was written.
    """
    content = plain(report)
    figures = directory / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    _write(directory / "report.json", _to_json(content))
    drawn = drawings(content)
    for drawing in drawn:
        _write(figures / f"{drawing.name}.svg", drawing.svg)
    for name in FIGURES.keys() - {drawing.name for drawing in drawn}:
        (figures / f"{name}.svg").unlink(missing_ok=True)
    _write(directory / "report.md", to_markdown(content, drawn))
    page = directory / "report.html"
    _write(page, to_html(content, drawn))
    return page


def _to_json(content: Mapping[str, Any]) -> str:
    """Sorted keys, readable, with lists of numbers on one line; never NaN or infinity."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # A line break inside a string is written as \n, so a real one stands between list entries only.
    number = r"-?\d[\d.eE+-]*"
    return re.sub(rf"\[\n\s*{number}(?:,\n\s*{number})*\n\s*\]", _on_one_line, text) + "\n"


def _on_one_line(numbers: re.Match[str]) -> str:
    """The same list of numbers without line breaks."""
    return re.sub(r"\s+", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]")


def _write(path: Path, text: str) -> None:
    """Put the file in its place once it is complete on the disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
