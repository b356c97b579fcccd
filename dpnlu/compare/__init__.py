"""The study: budgets x attacks -> report. The one place that joins training and attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attacks.report import write_report
from dpnlu.compare.reporting import build_report
from dpnlu.compare.running import Prepared as Prepared
from dpnlu.compare.running import Settings as Settings
from dpnlu.compare.running import prepare as prepare
from dpnlu.compare.running import train_all
from dpnlu.runs.progress import Told, silent


def compare(
    prepared: Prepared,
    directory: Path,
    *,
    command: str = "",
    told: Told = silent,
) -> dict[str, Any]:
    """Run a study, or go on with it, and write its report.

    Args:
        prepared: from `prepare`.
        directory: empty, or holding this study.
        command: what the report says it was made by.
        told: told of progress: what is being done, how much is done, how much there is.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: the directory holds something else.
    """
    finished = train_all(prepared, directory, told)
    report = build_report(prepared, finished, command=command)
    write_report(report, directory)
    return report
