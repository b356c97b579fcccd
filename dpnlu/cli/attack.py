"""`dpnlu attack`: attack a model that is already trained, report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dpnlu.cli.options import add_options, add_output, settings_from
from dpnlu.compare.settings import AttackSettings


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("attack", help="attack a trained model")
    parser.add_argument(
        "model_directory", type=Path, help="of the model, as `dpnlu train` leaves it"
    )
    add_options(parser, AttackSettings)
    add_output(parser, holds="the report; an attack that was interrupted is resumed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Attack the model and print a table and the path of the report."""
    from rich.console import Console

    from attacks.report import terminal_table
    from dpnlu.compare.running import attack_model
    from dpnlu.runs.progress import bars

    settings = settings_from(AttackSettings, options)
    with bars(quiet=options.quiet) as on_progress:
        report = attack_model(
            options.model_directory,
            options.out,
            settings,
            command=options.command_line,
            on_progress=on_progress,
        )
    Console().print(terminal_table(report))
    for run in report["runs"]:
        for found in run.get("recovered", []):
            print(f"{found['carrier']}: {' '.join(found['recovered'])} (loss {found['loss']:.3g})")
        if "untargeted" in run:
            print(_claims(run["untargeted"]))
    print(options.out / "report.html")


def _claims(found: dict[str, Any]) -> str:
    """The values of a slot that were claimed first, and how many of them were right."""
    precisions = ", ".join(
        f"{entry['precision']:.0%} of the first {entry['k']}" for entry in found["precision_at"]
    )
    chance = found["trained_on"] / found["values"]
    return (
        f"{found['slot']}: {' '.join(entry['value'] for entry in found['first'])} …; trained on: "
        f"{precisions} (of all values {chance:.0%})"
    )
