"""Which runs of a report are compared text by text, and what each view asks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attacks.report.runs import Run, epsilon, is_private, labels

# Of fewer things in the test a share says next to nothing: such a class is in report.json alone.
LEAST_IN_TEST = 10


@dataclass(frozen=True)
class Compared:
    """The run without privacy and the private runs that are compared with it.

    Attributes:
        ordinary: its label and the run.
        private: likewise, from the loosest to the strictest.
    """

    ordinary: tuple[str, Run]
    private: tuple[tuple[str, Run], ...]

    @property
    def everyone(self) -> tuple[tuple[str, Run], ...]:
        """All of them, the ordinary one first."""
        return (self.ordinary, *self.private)

    @property
    def strictest(self) -> tuple[str, Run]:
        """The private run of the smallest ε."""
        return self.private[-1]


def compared(report: Mapping[str, Any]) -> Compared | None:
    """The runs whose answers were compared; None where none were.

    Args:
        report: as `attacks.report.contract.validate` accepts it.
    """
    named = list(zip(labels(report["runs"]), report["runs"], strict=True))
    private = [pair for pair in named if is_private(pair[1]) and "flips" in pair[1]]
    private.sort(key=lambda pair: -epsilon(pair[1]))
    against = {run["flips"]["against"] for _, run in private}
    ordinary = next((pair for pair in named if against == {pair[1]["name"]}), None)
    return Compared(ordinary, tuple(private)) if ordinary is not None else None


def classes(run: Run, kind: str, *, least: int = LEAST_IN_TEST) -> dict[str, Mapping[str, Any]]:
    """The classes of a breakdown by name, in its order.

    Args:
        kind: intents, slots, groups or rarest_word.
        least: in the test, of each class.
    """
    rows: Sequence[Mapping[str, Any]] = run.get("breakdown", {}).get(kind, ())
    return {row["name"]: row for row in rows if row["test"] >= least}


def flips_of(found: Compared) -> list[tuple[str, Mapping[str, Any], bool]]:
    """What is counted of whom, and whether it is a control: a name, the flips.

    The name says from which model to which: no privacy → ε = 8, no privacy → again.
    """
    first = found.ordinary[0]
    counted = [(f"{first} → {name}", run["flips"], False) for name, run in found.private]
    for name, run in found.everyone:
        again = run.get("retrainings", ())
        counted += [
            (f"{name} → again{f' {number}' if len(again) > 1 else ''}", flips, True)
            for number, flips in enumerate(again, 1)
        ]
    return counted
