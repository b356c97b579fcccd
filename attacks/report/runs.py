"""What every view of a report asks of a run: its label, its strongest attack, its ceilings."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from attacks.ceilings import approximate_dp_ceiling_auc, approximate_dp_ceiling_tpr
from attacks.report import wording as write

Run: TypeAlias = Mapping[str, Any]

LONGEST_LABEL = 20

LONGEST_NAME = 40

# Directional marks that let later text appear before earlier text.
REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

# With spaces that no line ends at.
EPSILON_IS = "ε\u00a0=\u00a0"

# The false positive rate of the main table.
MAIN_FPR = 0.01


def clean(text: object) -> str:
    """One line of text without control characters, orders to write backwards, double spaces."""
    spaced = "".join(" " if c.isspace() else c for c in str(text))
    return " ".join("".join(c for c in spaced if _is_harmless(c)).split())


def _is_harmless(character: str) -> bool:
    """Whether a character shows itself and changes nothing around it."""
    controls = unicodedata.category(character) in {"Cc", "Cs"}
    return not controls and unicodedata.bidirectional(character) not in REORDERING


def shortened(text: object, length: int = LONGEST_LABEL) -> str:
    """The same in at most so many characters."""
    line = clean(text)
    return line if len(line) <= length else f"{line[: length - 1].rstrip()}…"


def is_private(run: Run) -> bool:
    """Whether the run claims any ε."""
    return run["epsilon"] is not None


def epsilon(run: Run) -> float:
    """The accounted ε, infinite without a guarantee."""
    return float(run["epsilon"]) if is_private(run) else math.inf


def column(records: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """One measurement of every record."""
    return [record[key] for record in records]


def labels(runs: Sequence[Run]) -> list[str]:
    """A short label for each run: its ε where that tells the runs apart, else its name."""
    short = [
        f"{EPSILON_IS}{write.budget(run['epsilon'])}" if is_private(run) else "no privacy"
        for run in runs
    ]
    named = [
        label if short.count(label) == 1 else shortened(run["name"])
        for label, run in zip(short, runs, strict=True)
    ]
    return [
        name if named.count(name) == 1 else f"{name} #{row}" for row, name in enumerate(named, 1)
    ]


def phrases(runs: Sequence[Run]) -> list[str]:
    """The same as an adverbial for sentences: at ε = 8, without privacy, in run NAME."""
    return [
        ("at " + label if is_private(run) else "without privacy")
        if label.startswith(EPSILON_IS) or label == "no privacy"
        else f"in run {shortened(run['name'], LONGEST_NAME)}"
        for label, run in zip(labels(runs), runs, strict=True)
    ]


def strongest_attack(run: Run) -> str | None:
    """Return the name of the membership attack with the largest AUC; None if there was none.

    Of attacks with the same AUC, the first by name. Choosing by the result makes its interval a
    little too optimistic for the attacker; reports say so.

    Args:
        run: one entry of `runs` in a report.
    """
    attacks = run.get("membership", {})
    return min(attacks, key=lambda name: (-attacks[name]["auc"], name), default=None)


def strongest(run: Run) -> Mapping[str, Any] | None:
    """The measurements of the strongest attack."""
    name = strongest_attack(run)
    return None if name is None else run["membership"][name]


def rate_at(attack: Mapping[str, Any], fpr: float) -> Mapping[str, Any] | None:
    """The TPR entry at that FPR, however the FPR is written."""
    rates = attack.get("tpr_at_fpr", {})
    return next((rate for key, rate in rates.items() if float(key) == fpr), None)


def planted(run: Run) -> list[Mapping[str, Any]]:
    """All canaries of a run: the list if there is one, else the one it reports."""
    return list(run.get("canaries", [run["canary"]] if "canary" in run else []))


def auc_ceiling(run: Run, attack: Mapping[str, Any]) -> float | None:
    """What (ε, δ) allows the AUC: as reported, else computed; None without a guarantee."""
    if "auc_ceiling" in attack or not is_private(run):
        return attack.get("auc_ceiling")
    return approximate_dp_ceiling_auc(run["epsilon"], run["delta"])


def tpr_ceiling(run: Run, rate: Mapping[str, Any], fpr: float) -> float | None:
    """What (ε, δ) allows the TPR: as reported, else computed; None without a guarantee."""
    if "ceiling" in rate or not is_private(run):
        return rate.get("ceiling")
    return approximate_dp_ceiling_tpr(run["epsilon"], run["delta"], fpr=fpr)


@dataclass(frozen=True)
class Excess:
    """A measurement whose whole interval lies above what the guarantee allows."""

    attack: str
    what: str
    low: float
    ceiling: float


def excesses(run: Run) -> Iterator[Excess]:
    """Every measurement of the run that refutes its guarantee."""
    for name, attack in run.get("membership", {}).items():
        ceiling = auc_ceiling(run, attack)
        if ceiling is not None and attack["auc_interval"][0] > ceiling:
            yield Excess(name, "AUC", attack["auc_interval"][0], ceiling)
        for fpr, rate in attack.get("tpr_at_fpr", {}).items():
            ceiling = tpr_ceiling(run, rate, float(fpr))
            if ceiling is not None and rate["interval"][0] > ceiling:
                what = f"TPR at {write.level(float(fpr))} FPR"
                yield Excess(name, what, rate["interval"][0], ceiling)


def audit_refutes(run: Run) -> bool:
    """Whether the audited lower bound exceeds the accounted ε."""
    return (
        is_private(run) and "audit" in run and run["audit"]["epsilon_lower_bound"] > run["epsilon"]
    )
