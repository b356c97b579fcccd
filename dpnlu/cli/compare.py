"""`dpnlu compare`: train at several budgets, attack every model, report."""

from __future__ import annotations

import argparse
from typing import Any

from dpnlu.cli.options import add_options, add_output, settings_from
from dpnlu.compare.settings import StudySettings


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("compare", help="train at several budgets, attack, report")
    add_options(parser, StudySettings)
    add_output(parser, holds="the study and its report; a study that was interrupted is resumed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the study, or resume it, and print its table and the path of its report."""
    from rich.console import Console

    from attacks.report import terminal_table
    from dpnlu.compare.running import compare
    from dpnlu.runs.progress import bars

    settings = settings_from(StudySettings, options)
    with bars(quiet=options.quiet) as on_progress:
        report = compare(
            settings, options.out, command=options.command_line, on_progress=on_progress
        )
    Console().print(terminal_table(report))
    print(options.out / "report.html")
