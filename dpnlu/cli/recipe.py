"""`dpnlu recipe`: what `dpnlu train` would do with a corpus."""

from __future__ import annotations

import argparse
from typing import Any

from dpnlu.cli.options import add_options, settings_from
from dpnlu.runs.settings import RecommendationSettings


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("recipe", help="what `dpnlu train` would do with a corpus")
    add_options(parser, RecommendationSettings)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the recipe, the mechanism that meets the budget, and what both came to elsewhere."""
    from dpnlu.runs.recommendation import recommend

    print(*recommend(settings_from(RecommendationSettings, options)).lines(), sep="\n")
