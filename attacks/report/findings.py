"""What the numbers of a report say, in sentences that claim no more than the numbers do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attacks.report import wording as write
from attacks.report.runs import (
    Excess,
    Run,
    audit_refutes,
    epsilon,
    excesses,
    is_private,
    phrases,
    shortened,
    strongest,
    strongest_attack,
)

# Of more runs than this that have the same to say, the summary names the first and the last.
MOST_NAMED = 4


@dataclass(frozen=True)
class Findings:
    """The head of a report.

    Attributes:
        alarms: what makes the numbers or the guarantee unbelievable; read these first.
        cost: for the engineer: what privacy costs in accuracy and time.
        leakage: for the reviewer: what the attacks found.
        trust: for both: what speaks for believing it, and what was not measured.
    """

    alarms: tuple[str, ...]
    cost: str
    leakage: str
    trust: str


@dataclass(frozen=True)
class _Named:
    """A run and how a sentence speaks of it: at ε = 8, without privacy."""

    phrase: str
    run: Run


def findings(report: Mapping[str, Any]) -> Findings:
    """Return what the report says, as plain text without markup.

    Args:
        report: as `attacks.report.contract.validate` accepts it.
    """
    runs = report["runs"]
    named = [_Named(*pair) for pair in zip(phrases(runs), runs, strict=True)]
    named.sort(key=lambda item: -epsilon(item.run))
    return Findings(
        alarms=tuple(_alarms(report, named)),
        cost=_text(_cost(named)),
        leakage=_text(_leakage(named)),
        trust=_text(_trust(report, named)),
    )


def _text(sentences: Iterable[str]) -> str:
    """One paragraph."""
    return " ".join(sentences)


def _listed(items: Sequence[str]) -> str:
    """One, two and three."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _capital(text: str) -> str:
    """The same at the start of a sentence; a Greek letter or a name stays as it is."""
    return text[0].upper() + text[1:] if text[:1].isascii() else text


def _where(items: Sequence[_Named]) -> str:
    """At ε = 8 and ε = 2 and without privacy."""
    phrases = [item.phrase for item in items]
    return _listed(
        [
            phrase.removeprefix("at ") if index and phrases[index - 1].startswith("at ") else phrase
            for index, phrase in enumerate(phrases)
        ]
    )


def _few(items: Sequence[_Named]) -> Sequence[_Named]:
    """All of them if they are few, else the first and the last."""
    return items if len(items) <= MOST_NAMED else [items[0], items[-1]]


def _alarms(report: Mapping[str, Any], named: Sequence[_Named]) -> Iterator[str]:
    """All that contradicts a guarantee or spoils the attack results."""
    blind = report.get("data", {}).get("blind", {})
    if blind.get("suspicious"):
        yield (
            "Members and non-members can be told apart without any model "
            f"(AUC {_area(blind)}): the attack results measure the split as well as the model."
        )
    for item in named:
        yield from _alarms_of_run(item)


def _alarms_of_run(item: _Named) -> Iterator[str]:
    """All that contradicts the guarantee of one run."""
    run, where = item.run, _capital(item.phrase)
    if audit_refutes(run):
        audit = run["audit"]
        yield (
            f"{where} the audit refutes the guarantee: at {write.level(audit['confidence'])} "
            f"confidence ε is at least {write.bound(audit['epsilon_lower_bound'])}, above the "
            f"accounted {write.budget(run['epsilon'])}. Suspect a bug in training or accounting, "
            "or a broken assumption of the audit."
        )
    beyond = [_excess_text(excess) for excess in excesses(run)]
    if beyond:
        yield (
            f"{where} measurements lie above what (ε, δ) allows: {_listed(beyond)}. Suspect a bug "
            "in training or accounting, or members and non-members that differ by more than "
            "membership."
        )
    target = run["target_epsilon"]
    if target is not None and run["epsilon"] > target * (1 + 1e-9):
        yield (
            f"{where} the run spent more than its target: ε = {write.budget(run['epsilon'])} "
            f"instead of {write.significant(target)}."
        )


def _excess_text(excess: Excess) -> str:
    """A measurement that refutes the guarantee, next to its ceiling."""
    digits = write.area if excess.what == "AUC" else write.percentage
    return (
        f"{shortened(excess.attack)} has {excess.what} at least {digits(excess.low)} "
        f"(ceiling {digits(excess.ceiling)})"
    )


def _cost(named: Sequence[_Named]) -> Iterator[str]:
    """Accuracy with and without privacy, and the price in time."""
    yield from _accuracies(named, "intent_accuracy", "Intent accuracy")
    yield from _accuracies(named, "slot_f1", "Slot F1")
    ratios = sorted(
        item.run["overhead"] for item in named if is_private(item.run) and "overhead" in item.run
    )
    if ratios:
        ends = list(dict.fromkeys(write.significant(ratio) for ratio in (ratios[0], ratios[-1])))
        yield f"Private training takes {' to '.join(ends)} times as long as ordinary training."


def _accuracies(named: Sequence[_Named], key: str, name: str) -> Iterator[str]:
    """One measure without privacy and at each ε, with the differences."""
    having = [item for item in named if key in item.run]
    free = next((item for item in having if not is_private(item.run)), None)
    private = _few([item for item in having if is_private(item.run)])
    parts = [] if free is None else [f"{write.percentage(free.run[key])} {free.phrase}"]
    for item in private:
        change = "" if free is None else f" ({write.points(item.run[key] - free.run[key])})"
        parts.append(f"{write.percentage(item.run[key])} {item.phrase}{change}")
    if parts:
        yield f"{name} is {_listed(parts)}."
    alike = [item for item in private if free is not None and _overlap(item.run, free.run, key)]
    if alike:
        yield f"{_capital(_where(alike))} its interval overlaps the one without privacy."


def _overlap(one: Run, other: Run, key: str) -> bool:
    """Whether the intervals of a measure have a value in common; False where one has none."""
    if f"{key}_interval" not in one or f"{key}_interval" not in other:
        return False
    first, second = one[f"{key}_interval"], other[f"{key}_interval"]
    return bool(first[0] <= second[1] and second[0] <= first[1])


def _share(record: Mapping[str, Any], key: str) -> str:
    """A share in per cent with its interval, if it has one."""
    limits = record.get(f"{key}_interval")
    doubt = f" {write.interval(limits, write.percent)}" if limits else ""
    return write.percentage(record[key]) + doubt


def _area(record: Mapping[str, Any]) -> str:
    """An AUC with its interval."""
    return f"{write.area(record['auc'])} {write.interval(record['auc_interval'], write.area)}"


def _leakage(named: Sequence[_Named]) -> Iterator[str]:
    """What the strongest attack and the extraction of the canary found."""
    above: list[_Named] = []
    within: list[_Named] = []
    below: list[_Named] = []
    for item in named:
        attack = strongest(item.run)
        if attack is not None:
            low, high = attack["auc_interval"]
            (above if low > 0.5 else below if high < 0.5 else within).append(item)
    if above:
        yield (
            f"The strongest attack's AUC interval lies above 0.5 {_strengths(above)}: there it "
            "tells members from non-members better than chance."
        )
    if within:
        yield (
            f"The strongest attack's AUC interval contains 0.5 {_strengths(within)}: there these "
            "attacks found no leakage, which does not prove that there is none."
        )
    if below:
        yield (
            f"Even the strongest attack's AUC interval lies below 0.5 {_strengths(below)}: members "
            "look less like members than chance allows, so suspect the split or the direction of "
            "the scores."
        )
    yield from _extraction([item for item in named if "exact_match" in item.run.get("canary", {})])


def _strengths(items: Sequence[_Named]) -> str:
    """What the strongest attack reaches on each run."""
    parts = [f"{item.phrase} ({_strength(item.run)})" for item in _few(items)]
    others = len(items) - len(parts)
    return _listed([*parts, f"in {others} more runs"] if others else parts)


def _strength(run: Run) -> str:
    """The strongest attack of a run and its AUC."""
    return f"{shortened(strongest_attack(run))}: AUC {_area(strongest(run) or {})}"


def _extraction(items: Sequence[_Named]) -> Iterator[str]:
    """How often the canary's secret was recovered, and whether chance explains it."""
    for beyond in (True, False):
        group = [
            item
            for item in items
            if (_canary(item)["exact_match_interval"][0] > _canary(item)["chance_exact"]) == beyond
        ]
        if not group:
            continue
        shares = [f"{_share(_canary(item), 'exact_match')} {item.phrase}" for item in _few(group)]
        chance = write.percentage(max(_canary(item)["chance_exact"] for item in group))
        verdict = "more than" if beyond else "no more than"
        yield (
            f"The share of canary secrets extracted exactly is {_listed(shares)}: {verdict} chance "
            f"({chance}) explains."
        )


def _canary(item: _Named) -> Mapping[str, Any]:
    """The canary block of a run that has one."""
    canary: Mapping[str, Any] = item.run["canary"]
    return canary


def _trust(report: Mapping[str, Any], named: Sequence[_Named]) -> Iterator[str]:
    """Audits, ceilings, the blind baseline, and what is missing."""
    private = [item for item in named if is_private(item.run)]
    audited = [item for item in private if "audit" in item.run]
    if audited and not any(audit_refutes(item.run) for item in audited):
        yield _bounds(audited)
    yield from _powerless(audited)
    yield from _sighted([i for i in named if not is_private(i.run) and "audit" in i.run])
    attacked = [item for item in private if item.run.get("membership")]
    if attacked and not any(list(excesses(item.run)) for item in attacked):
        yield "No attack result lies above what (ε, δ) allows."
    blind = report.get("data", {}).get("blind")
    if blind and not blind["suspicious"]:
        yield f"Without a model, members and non-members look alike (blind AUC {_area(blind)})."
    missing = list(_missing(report))
    if missing:
        yield f"Not measured: {_listed(missing)}."


def _bounds(audited: Sequence[_Named]) -> str:
    """Bounds that agree with what they audit."""
    bounds = [
        f"ε ≥ {write.bound(item.run['audit']['epsilon_lower_bound'])} {item.phrase}"
        for item in _few(audited)
    ]
    levels = {write.level(item.run["audit"]["confidence"]) for item in audited}
    vacuous = any(item.run["audit"]["epsilon_lower_bound"] == 0 for item in audited)
    return (
        f"The audited lower bound never exceeds the accounted ε: {_listed(bounds)} "
        f"(each at {_listed(sorted(levels))} confidence)."
        + (" A bound of 0 proves nothing either way." if vacuous else "")
    )


def _powerless(audited: Sequence[_Named]) -> Iterator[str]:
    """Audits too small to contradict what they audit, whatever they had seen."""
    blunt = [
        item
        for item in audited
        if item.run["audit"].get("ceiling", float("inf")) <= item.run["epsilon"]
    ]
    if blunt:
        ceilings = [write.bound(item.run["audit"]["ceiling"]) for item in blunt]
        yield (
            f"{_capital(_where(blunt))} the audit says little: so few canaries could not have "
            f"certified more than {_listed(list(dict.fromkeys(ceilings)))}."
        )


def _sighted(free: Sequence[_Named]) -> Iterator[str]:
    """Without privacy an audit should find something; that shows that it can."""
    for item in free[:1]:
        bound = item.run["audit"]["epsilon_lower_bound"]
        yield (
            f"{_capital(item.phrase)} the audit certifies ε ≥ {write.bound(bound)}, so it does see "
            "leakage where nothing prevents it."
            if bound > 0
            else f"{_capital(item.phrase)} the audit certifies nothing either, so its low bounds "
            "show that it is weak, not that training is private."
        )


def _missing(report: Mapping[str, Any]) -> Iterator[str]:
    """What a reviewer would ask for and no run has."""
    runs = report["runs"]
    if all(is_private(run) for run in runs):
        yield "a run without privacy to compare with"
    for key, name in (("membership", "membership attacks"), ("audit", "an audit of ε")):
        if not any(run.get(key) for run in runs):
            yield name
    if not any(run.get("canary") for run in runs):
        yield "canaries"
    if "blind" not in report.get("data", {}):
        yield "the blind baseline"
