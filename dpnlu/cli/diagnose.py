"""`dpnlu diagnose`: where the accuracy of a private training is lost."""

from __future__ import annotations

import argparse
from typing import Any

from dpnlu.cli.options import add_options, settings_from
from dpnlu.runs.settings import DiagnosisSettings


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("diagnose", help="where a private training loses accuracy")
    add_options(parser, DiagnosisSettings)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train the ladder between ordinary and private training, and print where what is lost."""
    from dpnlu.runs.diagnosis import diagnose
    from dpnlu.runs.progress import bars

    settings = settings_from(DiagnosisSettings, options)
    with bars(quiet=options.quiet) as on_progress:
        found = diagnose(settings, on_progress=on_progress)
    print(found.table(), "", *found.sentences(), f"Measured on the {found.split} split.", sep="\n")
