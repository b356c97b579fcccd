"""`dpnlu budget`: which ε a mechanism has, or which noise an ε needs. Loads no torch."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from dpnlu.accounting.accountants import ACCOUNTANTS
from dpnlu.mechanism.plan import PrivacyPlan


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("budget", help="ε of a mechanism, or the noise an ε needs")
    parser.add_argument(
        "--num-examples", type=int, required=True, help="training examples, which are public"
    )
    parser.add_argument(
        "--batch-size", type=int, required=True, help="expected size of a logical batch"
    )
    parser.add_argument(
        "--epochs",
        type=float,
        required=True,
        help="how often each example is visited on average",
    )
    parser.add_argument(
        "--delta",
        type=float,
        default=1e-5,
        help="the δ at which ε is stated, below 1 / examples (default: %(default)s)",
    )
    _add_noise(parser)
    parser.add_argument(
        "--accountant",
        choices=sorted(ACCOUNTANTS),
        default="pld",
        help="how ε is computed (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON, in which an infinite ε is null, instead of lines",
    )
    parser.set_defaults(run=run)


def _add_noise(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--epsilon", type=float, help="the budget: which noise does it need?")
    given.add_argument(
        "--noise-multiplier",
        type=float,
        help="the noise, as its standard deviation over the sensitivity: which ε does it have?",
    )
    parser.add_argument(
        "--noise-schedule",
        default="constant",
        help="how the noise changes with the epochs: constant; exponential:F or step:F:N, F times "
        "as much after every epoch or every N; inverse:F, 1 / (1 + F * epoch) of it; or "
        "list:A,B,... as much (default: %(default)s)",
    )
    parser.add_argument(
        "--microbatches",
        type=int,
        metavar="M",
        help="clip M micro-batches of a logical batch, each as a whole, which has twice the "
        "sensitivity (default: clip examples)",
    )


def run(options: argparse.Namespace) -> None:
    """Print the plan that the options describe, and its ε."""
    plan = plan_of(options)
    found = {
        "epsilon": plan.epsilon(accountant=options.accountant),
        "delta": plan.target_delta,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": plan.steps,
        "adjacency": plan.adjacency,
        "unit": plan.unit,
        "accountant": options.accountant,
    }
    if plan.noise_schedule != "constant":
        found["noise_schedule"] = plan.noise_schedule
        found["constant_noise_multiplier_of_equal_epsilon"] = (
            plan.with_constant_noise().noise_multiplier
        )
    if options.json:
        known = {name: None if value == math.inf else value for name, value in found.items()}
        print(json.dumps(known, allow_nan=False))
        return
    for name, value in found.items():
        number = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {number}")


def plan_of(options: argparse.Namespace) -> PrivacyPlan:
    """The plan for a target ε, or for a given noise multiplier.

    Raises:
        ValueError: an option is out of range.
    """
    target = options.epsilon if options.epsilon is not None else float("inf")
    plan = PrivacyPlan.calibrate(
        target_epsilon=target,
        target_delta=options.delta,
        num_examples=options.num_examples,
        expected_batch_size=options.batch_size,
        epochs=options.epochs,
        max_grad_norm=1.0,
        clipping_unit="example" if options.microbatches is None else "microbatch",
        microbatches=options.microbatches,
        noise_schedule=options.noise_schedule,
    )
    if options.noise_multiplier is None:
        return plan
    return plan.with_noise(options.noise_multiplier)
