"""Whether an engine, a ledger, processes and public examples fit the plan."""

from __future__ import annotations

import warnings

from dpnlu.engines import ENGINES
from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.public import PublicExamples


def check_processes(count: int, plan: PrivacyPlan) -> None:
    """Raise ValueError unless so many processes can share a logical batch; warn if some of them
    would have less to do than others."""
    if plan.unit == "user" and count > 1:
        raise ValueError(
            f"Expected one process for unit='user', got {count}: a draw is divided among "
            "processes by examples, not by users; start one."
        )
    if plan.microbatches is not None and plan.microbatches % count:
        warnings.warn(
            f"Expected as many micro-batches for each of {count} processes, got "
            f"{plan.microbatches} in all: some processes wait for others; plan a multiple.",
            stacklevel=3,
        )


def check_engine(name: str, plan: PrivacyPlan) -> None:
    """Raise ValueError unless there is such an engine, and it clips what the plan says."""
    if name not in ENGINES:
        raise ValueError(f"Expected `engine` to be one of {', '.join(ENGINES)}, got {name!r}.")
    if (name == "microbatch") != (plan.clipping_unit == "microbatch"):
        raise ValueError(
            f"Expected an engine for the plan's clipping unit, {plan.clipping_unit!r}, got "
            f"{name!r}: what is clipped is the plan's business. Micro-batches are planned by "
            "PrivacyPlan(clipping_unit='microbatch', microbatches=K)."
        )


def check_ledger(ledger: Ledger, plan: PrivacyPlan) -> None:
    """Raise ValueError unless the ledger is of this plan.

    The steps alone may differ, so that training can go on; the ledger tells what was spent.
    """
    begun, planned = ledger.plan.to_dict(), plan.to_dict()
    if other := [name for name in planned if name != "steps" and begun[name] != planned[name]]:
        raise ValueError(
            f"Expected a ledger of this plan, got one of a plan with other {', '.join(other)}: go "
            "on with the plan that it names, ledger.plan."
        )


def check_public(
    public: PublicExamples | None, plan: PrivacyPlan, *, engine: str, processes: int
) -> None:
    """Raise ValueError unless there are public examples where the plan needs them, and they can be
    learnt from beside the private ones."""
    tells_bound = clipping_rule(plan.clipping).public_quantile is not None
    if public is None:
        if tells_bound:
            raise ValueError(
                f"Expected public examples for clipping={plan.clipping!r}, got none: hand them to "
                "privatize(public=...), or to `dpnlu train` by --public SPEC --public-use beside."
            )
        return
    if processes > 1:
        raise ValueError(
            f"Expected one process with public examples beside the private, got {processes}: each "
            "would draw others; start one."
        )
    if engine == "opacus":
        raise ValueError(
            "Expected engine='book_keeping', 'per_example' or 'microbatch' with public examples "
            "beside the private, got 'opacus', which counts forward passes: choose another."
        )
    if tells_bound and plan.clipping_unit != "example":
        raise ValueError(
            f"Expected a plan that clips examples for clipping={plan.clipping!r}, got one that "
            f"clips a {plan.clipping_unit}: public norms are those of examples; choose another "
            "clipping rule."
        )
    if not (public.weight or tells_bound):
        raise ValueError(
            "Expected public examples with a weight > 0, or clipping='public:Q', got weight 0: "
            "nothing would be learnt from them; leave them out."
        )
