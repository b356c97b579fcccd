"""Which attacks there are, and which of them a study has the references for. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

from attacks.membership import ATTACKS

CANARY_MEASUREMENTS = ("exposure", "extraction")
# Of `dpnlu attack` alone: without canaries.
UNTARGETED = "untargeted"
# What `--attacks` may name: membership attacks, canary measurements, the audit.
NAMES = (*ATTACKS, *CANARY_MEASUREMENTS, "audit", UNTARGETED)
DEFAULT = ("loss", "lira", "rmia", *CANARY_MEASUREMENTS, "audit")
# With fewer there is no spread, and for half of the examples no reference on one of the sides.
LEAST_REFERENCES = 2


def default_attacks(references: int) -> tuple[str, ...]:
    """What is run unless attacks are named: `DEFAULT`, as far as the references suffice."""
    return tuple(name for name in DEFAULT if not needs_more(name, references))


def needs_more(name: str, references: int) -> bool:
    """Whether an attack needs more reference models than that."""
    return needs_references([name]) and references < LEAST_REFERENCES


def needs_references(names: Sequence[str]) -> bool:
    """Whether any of the attacks compares the target with reference models."""
    return any(name in ATTACKS and ATTACKS[name].needs_references for name in names)


def check_attacks(names: Sequence[str], *, references: int) -> None:
    """Raise ValueError unless the attacks exist and can be run with so many references."""
    if unknown := sorted(set(names) - set(NAMES)):
        raise ValueError(f"Expected attacks among {', '.join(NAMES)}, got {unknown[0]!r}.")
    if unable := [name for name in names if needs_more(name, references)]:
        raise ValueError(
            f"Expected at least {LEAST_REFERENCES} references for the attack {unable[0]}, got "
            f"{references}: raise --references, or leave the attack out."
        )
    if "audit" in names and not set(names) & set(ATTACKS):
        raise ValueError(
            "Expected a membership attack whose scores the audit can use, got none: add loss "
            "or lira to the attacks."
        )
