"""`dpnlu predict`: what a trained model says of texts, line by line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_STANDARD_INPUT = "-"


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("predict", help="intents and slots of texts, by a trained model")
    parser.add_argument("model_directory", type=Path, help="made by dpnlu train")
    parser.add_argument(
        "file",
        nargs="?",
        default=_STANDARD_INPUT,
        help="texts, one a line, or JSON objects with text or tokens; default: standard input",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="texts computed at once (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda[:N]|mps",
        help="where the model is computed; auto: an accelerator, if there is one "
        "(default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print one JSON object for each line of the input.

    Raises:
        ValueError: there is no model, no such device, or a line cannot be answered; those before it
            have been.
    """
    from dpnlu.mechanism.ranges import check_count
    from dpnlu.runs.answering import answers
    from dpnlu.runs.loaded_model import load
    from dpnlu.runs.progress import bars

    check_count("batch_size", options.batch_size)
    out = sys.stdout  # progress puts something of its own in its place
    is_escaped = (out.encoding or "").replace("-", "").lower() != "utf8"
    with _opened(options.file) as (source, name, size):
        # Without a size there is no telling how much is left; two things on a terminal collide.
        with bars(quiet=options.quiet or size is None or out.isatty()) as told:
            model = load(options.model_directory, device=options.device)
            for predictions in answers(
                model,
                source,
                name=name,
                is_json=name.endswith(".jsonl"),
                batch_size=options.batch_size,
            ):
                for prediction in predictions:
                    line = json.dumps(
                        prediction.to_dict(), ensure_ascii=is_escaped, allow_nan=False
                    )
                    out.write(line + "\n")
                out.flush()
                if size is not None:
                    told("predicting", source.tell(), size)


@contextmanager
def _opened(file: str) -> Iterator[tuple[BinaryIO, str, int | None]]:
    """The input, what to call it, and how long it is; None: that is not known."""
    if file == _STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError("Expected texts on standard input, which is closed: name a file.")
        yield sys.stdin.buffer, "standard input", None
        return
    path = Path(file)
    with path.open("rb") as source:
        yield source, file, path.stat().st_size if path.is_file() else None
