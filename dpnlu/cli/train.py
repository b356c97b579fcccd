"""`dpnlu train`: train one model."""

from __future__ import annotations

import argparse
from typing import Any

from dpnlu.cli.options import add_options, add_output, settings_from
from dpnlu.runs.settings import TuningSettings


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("train", help="train one model")
    add_options(parser, TuningSettings)
    add_output(parser, holds="the model")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train the model, or resume its training, and print how well it does."""
    from dpnlu.runs.progress import bars
    from dpnlu.runs.trials import train_best

    settings = settings_from(TuningSettings, options)
    with bars(quiet=options.quiet) as on_progress:
        results = train_best(settings, options.out, resume=options.resume, on_progress=on_progress)
    for name, value in results.to_dict().items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {shown}")
    print(options.out)
