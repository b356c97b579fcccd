"""The options of `dpnlu compare`, `train` and `attack`, which share most of them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

_DATA = (
    "the corpus: synthetic[:N], snips:DIR, hwu64:DIR, clinc150:FILE, FILE.jsonl[.gz], FILE.csv or "
    "hf:NAME[:CONFIG]"
)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add what a study alone is asked for."""
    parser.add_argument(
        "--epsilons",
        type=_epsilon,
        nargs="+",
        default=[math.inf, 8.0, 2.0],
        metavar="EPSILON",
        help="the privacy budgets; inf: ordinary training (default: inf 8 2)",
    )
    parser.add_argument(
        "--canaries",
        nargs="+",
        default=[],
        metavar="PATTERN:LENGTH:R=COPIES",
        help="secrets put into training on purpose, such as pin:4:R=100: 4 digits, 100 times; each "
        "of another pattern, pin or call (default: none)",
    )


def add_attack(parser: argparse.ArgumentParser) -> None:
    """Add the model, and the data it was trained on."""
    parser.add_argument("model_directory", type=Path, metavar="MODEL_DIR", help="the model")
    parser.add_argument("--data", required=True, metavar="SPEC", help=_DATA)


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add what the training of a model for release alone is asked for."""
    parser.add_argument(
        "--epsilon",
        type=_epsilon,
        required=True,
        help="the privacy budget; inf: ordinary training",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="of AdamW, at its highest (default: as recommended for the model)",
    )
    parser.add_argument(
        "--engine",
        help="how gradients are clipped: book_keeping, per_example or opacus; changes time, not "
        "the result (default: what suits the plan)",
    )
    parser.add_argument(
        "--vocabulary",
        default="hashed",
        help="of word models: hashed; fitted, from the training texts, which ε does not cover; or "
        "the path of a public word list (default: %(default)s)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help='JSON file {"intents": [...], "slots": [...]} that declares the label sets (default: '
        "as the corpus declares them, else read from the data, which ε does not cover)",
    )
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training")


def add_training(parser: argparse.ArgumentParser, *, run: Any) -> None:
    """Add what every training is asked for."""
    parser.add_argument("--data", required=True, metavar="SPEC", help=_DATA)
    parser.add_argument(
        "--model",
        default="lstm",
        metavar="lstm|encoder:NAME_OR_PATH",
        help="a bidirectional LSTM over words, or a pretrained encoder of the Hugging Face hub or "
        "in a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=1e-5,
        help="the δ at which ε is stated, below 1 / training examples (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=float,
        help="how often each example is visited on average (default: as recommended for the model)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="expected batch size of private training (default: as recommended for the model)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        help="share of units dropped in training, in [0, 1) (default: as recommended for the "
        "model, none in private training)",
    )
    parser.add_argument(
        "--max-grad-norm",
        type=float,
        default=1.0,
        help="bound C that an example's gradient is clipped to (default: %(default)s)",
    )
    add_common(parser, run=run)


def add_attacks(parser: argparse.ArgumentParser) -> None:
    """Add what every attack is asked for."""
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="ATTACK",
        help="what to measure: loss, lira[-offline], rmia[-offline], exposure, extraction, audit "
        "(default: all but those offline, as far as the references suffice)",
    )
    parser.add_argument(
        "--references",
        type=int,
        default=8,
        help="reference models per target, for lira and rmia, which need at least 2 (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--audit-examples",
        type=int,
        default=2000,
        help="examples whose membership the attacks guess, at least 20; all, if there are fewer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="of intervals and bounds, in (0, 1) (default: %(default)s)",
    )


def add_common(parser: argparse.ArgumentParser, *, run: Any) -> None:
    """Add what all work on data is asked for."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument(
        "--physical-batch-size",
        type=int,
        default=64,
        help="examples computed at once; changes memory and time, not the result (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of initial weights, dropout and all that a study draws; the noise and the batches of "
        "dpnlu train are always fresh (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected ε > 0 or inf, got {text}")
    return value
