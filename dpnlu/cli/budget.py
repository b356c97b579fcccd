"""`dpnlu budget`: which ε a mechanism has, or which noise an ε needs. Loads no torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from dpnlu.accounting.accountants import ACCOUNTANTS
from dpnlu.accounting.tuning import calibrate_tuning, cheapest_tuning
from dpnlu.mechanism.choices import Choice, choices
from dpnlu.mechanism.plan import NOT_AS_PUBLISHED, PrivacyPlan


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
        "--trials",
        type=float,
        metavar="K",
        help="state ε for the best of K such trainings on average, for each way to draw their "
        "number; with --epsilon: find the noise of each training for which the whole meets it "
        "(default: one training)",
    )
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
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="with --microbatches: print beside ε what the published analysis of eDP-SGD would "
        "claim, which is no guarantee",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="with --epsilon: compare batch sizes for as many examples in all: sample rate, steps, "
        "noise multiplier and signal-to-noise at this ε",
    )


def run(options: argparse.Namespace) -> None:
    """Print the plan that the options describe, and its ε.

    Raises:
        ValueError: an option is out of range, or would have no effect beside another.
    """
    _check_options(options)
    plan = plan_of(options)
    if options.plan:
        _print_choices(plan, options)
        return
    if options.trials is not None:
        _print_tuning(plan, options)
        return
    found: dict[str, Any] = {
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
    if options.as_published:
        claimed = plan.epsilon(accountant=options.accountant, as_published=True)
        found["epsilon_as_published"] = claimed
        found["epsilon_as_published_is"] = f"no guarantee: {NOT_AS_PUBLISHED}"
    _print_facts(found, options)


def _check_options(options: argparse.Namespace) -> None:
    """Raise ValueError where an option would be passed over."""
    asked = {
        "--plan": options.plan,
        "--trials": options.trials is not None,
        "--as-published": options.as_published,
    }
    given = [name for name, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ValueError(
            f"Expected one question at a time, got {' and '.join(given)}: ask one after the other."
        )
    if (options.plan or options.trials is not None) and options.accountant != "pld":
        raise ValueError(
            f"Expected --accountant pld with {given[0]}, which has its own way to ε, got "
            f"{options.accountant}: leave --accountant out."
        )


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


def _print_tuning(plan: PrivacyPlan, options: argparse.Namespace) -> None:
    """Print what the best of several trainings costs, by how their number is drawn, the cheapest
    first.

    Raises:
        ValueError: there are too few trials; see `dpnlu.accounting.tuning`.
    """
    known = {"trials": options.trials, "delta": plan.target_delta, "steps_of_a_trial": plan.steps}
    ways = cheapest_tuning(plan.events(), trials=options.trials, delta=plan.target_delta)
    if options.epsilon is None:
        known["noise_multiplier"] = plan.noise_multiplier
        _print_facts(known | {f"epsilon_{way.number}": way.epsilon for way in ways}, options)
        return
    noises = {
        f"noise_multiplier_{way.number}": calibrate_tuning(
            lambda sigma: plan.with_noise(sigma).events(),
            trials=options.trials,
            number=way.number,
            target_epsilon=options.epsilon,
            delta=plan.target_delta,
        )
        for way in ways
    }
    cheapest_first = dict(sorted(noises.items(), key=lambda way: way[1]))
    _print_facts(known | {"epsilon": options.epsilon} | cheapest_first, options)


def _print_facts(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print them as lines, or as JSON with null for infinity."""
    if options.json:
        known = {name: None if value == math.inf else value for name, value in found.items()}
        print(json.dumps(known, allow_nan=False))
        return
    for name, value in found.items():
        number = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' ')}: {number}")


def _print_choices(plan: PrivacyPlan, options: argparse.Namespace) -> None:
    """Print plans of the same ε that compute as many examples.

    Raises:
        ValueError: no ε is given.
    """
    if options.epsilon is None:
        raise ValueError(
            "Expected --epsilon with --plan, whose plans have the same ε, got a noise multiplier: "
            "give the ε instead."
        )
    found = choices(plan, target_epsilon=options.epsilon)
    if options.json:
        print(json.dumps([asdict(choice) for choice in found], allow_nan=False))
        return
    names = [field.name for field in fields(Choice)]
    rows = [[_short(getattr(choice, name)) for name in names] for choice in found]
    heads = [name.replace("_", " ") for name in names]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in [heads, *rows]:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    print("signal to noise: of all clipped gradients, were they alike, along their direction")


def _short(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
