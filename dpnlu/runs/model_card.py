"""The model card: what a released model claims about privacy, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any

from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.selection import Selection
from dpnlu.nlu.classifier import Architecture

_NEIGHBOURS = {
    "add-remove-one": "data sets that differ by the presence of {one}",
    "zero-out-one": "data sets that differ by {one} being replaced by nothing, while their public "
    "size stays",
}
# How a unit is called in the text, and what it is.
_ONES = {"example": "one training example", "user": "one user with all of their examples"}
_UNITS = {
    "example": "that is one labelled text; a person with several texts is protected less",
    "user": "that is all texts that the data name them for, of which at most {most}, drawn anew, "
    "count in a step",
}


def privacy_statement(
    plan: PrivacyPlan | None, ledger: Ledger | None, selection: Selection | None = None
) -> str:
    """One paragraph: ε by two accountants, δ, adjacency, unit, sampler; or that there is no
    guarantee.

    Args:
        selection: of which trainings the model is the best; None: there was one.

    Raises:
        UnconfirmedError: the accountants contradict each other, so that no ε can be stated.
    """
    if plan is None or ledger is None:
        return (
            "**No privacy guarantee.** The model was trained without differential privacy; what "
            "it remembers of single training examples is not bounded."
        )
    spent, truncated = ledger.epsilon(), f", truncated at {plan.max_batch_size}"
    neighbours = _NEIGHBOURS[plan.adjacency].format(one=_ONES[plan.unit])
    unit = _UNITS[plan.unit].format(most=plan.examples_per_user)
    whole, chosen = spent, ""
    if selection is not None:
        whole = selection.epsilon(plan.events(), delta=plan.target_delta)
        chosen = f"{_choice(selection)} One training, with ε = {_rounded_up(spent)} by itself: "
    return (
        f"**(ε = {_rounded_up(whole)}, δ = {plan.target_delta:g})-differential privacy**, for "
        f"{neighbours} (unit: one {plan.unit}, {unit}). {chosen}"
        f"{len(ledger)} releases of clipped gradient "
        f"sums: norm at most {_bound(plan, ledger)} per {plan.clipping_unit} ({plan.clipping} "
        f"clipping), Gaussian noise of multiplier {plan.noise_multiplier:.4g} "
        f"({_schedule(plan)}), batches of {plan.unit}s sampled by Poisson with probability "
        f"{plan.sample_rate:.4g}"
        f"{truncated if plan.max_batch_size else ''}. Accountant: privacy loss distributions"
        f"{' (dp-accounting)' if plan.max_batch_size else ''}; {_second(ledger)}. The number of "
        f"training {plan.unit}s, {plan.num_examples}, is treated as public."
    )


def _choice(selection: Selection) -> str:
    """How the model was chosen."""
    if selection.number == "fixed":
        return (
            f"That is the ε of {selection.trials:g} trainings together, of which this model is the "
            "best."
        )
    return (
        "That is the ε of the choice of this model, the best of a number of trainings that was "
        f"drawn from a {selection.number} distribution of mean {selection.trials:g} and is told to "
        "nobody (Papernot and Steinke 2022; Rényi divergences)."
    )


def _bound(plan: PrivacyPlan, ledger: Ledger) -> str:
    """The clipping bound, and where it adapts what became of it."""
    if ledger.bound is None:
        return f"{plan.max_grad_norm:g}"
    if clipping_rule(plan.clipping).public_quantile is not None:
        return f"what public examples told before each step, at last {ledger.bound:.4g},"
    return f"{plan.max_grad_norm:g} at first and {ledger.bound:.4g} at last"


def _schedule(plan: PrivacyPlan) -> str:
    """The noise schedule, and the constant noise that it has to beat."""
    if plan.noise_schedule == "constant":
        return plan.noise_schedule
    constant = plan.with_constant_noise().noise_multiplier
    return f"{plan.noise_schedule}; constant noise of multiplier {constant:.4g} has the same ε"


def _second(ledger: Ledger) -> str:
    """What a second accountant says."""
    second = ledger.confirmed()
    if second is None:
        return "no second accountant can confirm this ε"
    said = f"{second.accountant} says ε = {_rounded_up(second.epsilon)}"
    return f"confirmed by a second, independent one: {said}"


def _rounded_up(epsilon: float) -> str:
    """Four digits: a statement must not claim less than was computed."""
    if not 0 < epsilon < math.inf:
        return f"{epsilon:g}"
    exact = Decimal(epsilon)
    step = Decimal((0, (1,), exact.adjusted() - 3))
    return f"{float(exact.quantize(step, ROUND_CEILING)):.4g}"


def model_card(
    *,
    architecture: Architecture,
    plan: PrivacyPlan | None,
    ledger: Ledger | None,
    not_covered: Sequence[str],
    metrics: Mapping[str, Any],
    selection: Selection | None = None,
) -> str:
    """The README.md of a model directory.

    Args:
        selection: of which trainings the model is the best; None: there was one.
        not_covered: what else was released or chosen by looking at the data, in sentences.
        metrics: shown as they are.
    """
    lines = [f"# Intent and slot classifier ({architecture.name})", "", "## Privacy", ""]
    lines += [privacy_statement(plan, ledger, selection), ""]
    if not_covered:
        lines += ["Not covered by this statement:", "", *(f"- {item}" for item in not_covered), ""]
    lines += ["## Results", "", "| measure | value |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {_number(value)} |" for name, value in metrics.items()]
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
