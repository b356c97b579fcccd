"""How the numbers of a report came about, what they mean, and what they do not say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attacks.report import wording as write
from attacks.report.runs import clean, is_private, planted

Facts = list[tuple[str, str]]

MEANINGS: Facts = [
    (
        "ε, δ",
        "The guarantee: how much one unit of training data can change, at most, what is learnt "
        "from the model. Smaller is stricter; ∞ is none. Computed by the accountant from the "
        "training plan, not measured; rounded up. Where a second, independent accountant is named, "
        "its ε is not above the stated one by more than the two are known to differ.",
    ),
    (
        "σ",
        "Noise multiplier: the noise's standard deviation over the sensitivity of the sum it is "
        "added to.",
    ),
    (
        "intent accuracy, slot F1, frame",
        "On held-out data: utterances with the right intent, the F1 of slots (span and label), and "
        "utterances right as a whole.",
    ),
    (
        "training time, attack time",
        "Wall-clock time of one training, with its peak memory, and of the attacks on its model; "
        "1.1× compares with the run without privacy. refs: the reference models the attacks used.",
    ),
    (
        "AUC",
        "The chance that the attack scores a member above a non-member: 0.5 is guessing, 1 is "
        "certainty. The table shows the attack with the largest AUC.",
    ),
    (
        "TPR at 1 % FPR",
        "The share of members an attack names while it wrongly names at most 1 % of the "
        "non-members.",
    ),
    (
        "ceiling of an attack",
        "The most any attack can reach against any training with this (ε, δ). A measured interval "
        "wholly above it means a bug, or members and non-members that differ in more than "
        "membership. The curve of the Gaussian mechanism is lower: a typical yardstick, no limit.",
    ),
    (
        "ε lower bound",
        "What an audit proves ε to be at least, with the stated confidence and under the stated "
        "assumption; rounded down. Its ceiling is the bound had every guess been right: a larger ε "
        "cannot be contradicted by this audit.",
    ),
    (
        "exposure",
        "How far up the model ranks a planted secret among all candidates: log2(candidates) − "
        "log2(rank). A secret never seen scores the chance level on average.",
    ),
    (
        "exact match, Hamming",
        "Share of planted secrets that an attacker with the model recovers completely, and the "
        "mean share of tokens recovered wrongly. Chance is what blind guessing gives; group ε, "
        "where given, is what the extraction proves about all copies of a canary together, and "
        "accounted what the accountant states for them: a budget is that of one copy.",
    ),
    (
        "intervals",
        "In brackets, at the confidence of the study: Clopper-Pearson for shares, the wider of "
        "DeLong and Newcombe for AUC. They cover the chance in the examples, not that in training.",
    ),
]


def legend(report: Mapping[str, Any]) -> str:
    """Return how to read the cells of the tables."""
    confidence = report.get("study", {}).get("confidence")
    intervals = "Intervals" if confidence is None else f"{write.level(confidence)} intervals"
    return (
        f"{intervals} in brackets; ceiling: the most that (ε, δ) allows, or that the audit could "
        "have proved; chance: what guessing gives; –: not measured."
    )


def data_facts(report: Mapping[str, Any]) -> Facts:
    """Return what is known about the data, as label and text."""
    return [fact for fact in _data_facts(report.get("data", {})) if fact[1]]


def setup_facts(report: Mapping[str, Any]) -> Facts:
    """Return what is known about the study and the canaries and audits of its runs."""
    canaries = _distinct(_canary_text(canary) for run in report["runs"] for canary in planted(run))
    audits = _distinct(_audit_text(run["audit"]) for run in report["runs"] if "audit" in run)
    facts = _free_facts(report.get("study", {}))
    facts += [("canary", text) for text in canaries if text]
    return facts + [("audit", text) for text in audits]


def machine_facts(report: Mapping[str, Any]) -> Facts:
    """Return what is known about the machine and the versions."""
    return _free_facts(report.get("machine", {}))


def command(report: Mapping[str, Any]) -> str:
    """Return the command that made the report, in printable lines; empty if it is not known."""
    return "\n".join(clean(line) for line in report.get("command", "").splitlines())


def limits(report: Mapping[str, Any]) -> list[str]:
    """Return what the numbers do not say, in sentences, the most important first."""
    return list(_limits(report))


def _distinct(texts: Iterator[str]) -> list[str]:
    """Each text once, in order."""
    return list(dict.fromkeys(texts))


def _free_facts(block: Mapping[str, Any]) -> Facts:
    """Keys and values of a block without fixed keys."""
    return [(_name(key), _value(value)) for key, value in block.items()]


def _name(key: str) -> str:
    """A key as words, its unit in parentheses."""
    words = clean(key).replace("_", " ")
    for unit in ("GiB", "MiB"):
        words = re.sub(rf" {unit}$", f" ({unit})", words, flags=re.IGNORECASE)
    return words


def _value(value: Any) -> str:
    """Any value as text."""
    match value:
        case None:
            return write.ABSENT
        case bool():
            return "yes" if value else "no"
        case int():
            return str(value)
        case float():
            return write.significant(value, 4)
        case list() | tuple():
            return ", ".join(_value(item) for item in value)
        case Mapping():
            nested = any(isinstance(item, Mapping) for item in value.values())
            parts = [f"{_name(key)}: {_value(item)}" for key, item in value.items()]
            return ("; " if nested else ", ").join(parts)
    return clean(value)


KNOWN = {
    "name", "spec", "train", "valid", "test", "intents", "slots", "repeated_rows_dropped",
    "audit_examples", "members", "labels_are_public", "vocabulary_is_public", "blind",
}  # fmt: skip


def _data_facts(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same, with empty texts where nothing is known."""
    name, spec = (clean(data.get(key, "")) for key in ("name", "spec"))
    yield "data", f"{name} ({spec})" if name and spec else name or spec
    sizes = [("train", "training"), ("valid", "validation"), ("test", "test")]
    yield "examples", _counts(data, sizes)
    yield "labels", _counts(data, [("intents", "intents"), ("slots", "slots")])
    if "repeated_rows_dropped" in data:
        yield "repeated rows dropped", write.count(data["repeated_rows_dropped"])
    yield "examples under attack", _audited(data)
    for key, what in (("labels_are_public", "label set"), ("vocabulary_is_public", "vocabulary")):
        if key in data:
            covered = "public" if data[key] else "taken from the training data: not covered by ε"
            yield what, covered
    yield "blind baseline", _blind(data)
    yield from _free_facts({key: value for key, value in data.items() if key not in KNOWN})


def _counts(data: Mapping[str, Any], names: list[tuple[str, str]]) -> str:
    """13,084 training, 700 test."""
    return ", ".join(f"{write.count(data[key])} {name}" for key, name in names if key in data)


def _audited(data: Mapping[str, Any]) -> str:
    """How many examples the attacks judge, and how many of them are members."""
    if "audit_examples" not in data:
        return ""
    members = f", {write.count(data['members'])} of them members" if "members" in data else ""
    return write.count(data["audit_examples"]) + members


def _blind(data: Mapping[str, Any]) -> str:
    """What can be guessed about membership without a model."""
    if "blind" not in data:
        return ""
    blind = data["blind"]
    verdict = (
        "suspicious: attack results measure the split as well"
        if blind["suspicious"]
        else "members and non-members look alike"
    )
    limits = write.interval(blind["auc_interval"], write.area)
    return f"AUC {write.area(blind['auc'])} {limits} without a model; {verdict}"


def _canary_text(canary: Mapping[str, Any]) -> str:
    """What the canaries of a run are."""
    parts = [f"pattern {clean(canary['pattern'])}"] if "pattern" in canary else []
    if "repetitions" in canary:
        parts.append(f"{write.count(canary['repetitions'])} copies in training")
    if "trials" in canary:
        parts.append(f"{write.count(canary['trials'])} trials")
    return ", ".join(parts)


def _audit_text(audit: Mapping[str, Any]) -> str:
    """Method, confidence and assumption of an audit."""
    text = f"{clean(audit['method'])}, confidence {write.level(audit['confidence'])}"
    if "scores" in audit:
        text += f", scores of {clean(audit['scores'])}"
    if "canaries" in audit:
        text += f", {write.count(audit['canaries'])} canaries"
    return f"{text}; assumes: {clean(audit['assumption'])}" if "assumption" in audit else text


def _limits(report: Mapping[str, Any]) -> Iterator[str]:
    """Limits that every report has, and those of this one."""
    runs, data = report["runs"], report.get("data", {})
    yield (
        "An attack that finds nothing proves nothing: a stronger one may exist. Only ε limits all "
        "attacks, and only if training does what the accountant assumes."
    )
    if any(is_private(run) for run in runs):
        yield _covered(report)
    if any(len(run.get("membership", {})) > 1 for run in runs):
        yield (
            "The strongest attack was chosen by its result on the same examples, and its interval "
            "is not corrected for the choice: one that barely excludes 0.5 is weak evidence."
        )
    audits = sum("audit" in run for run in runs)
    if audits > 1:
        yield (
            f"Each audited bound holds at its own confidence; that all {audits} hold together is "
            "less certain."
        )
    yield (
        "Accuracy, time and membership are those of one training per run: another seed would give "
        "other numbers, and intervals over examples do not show how far."
    )
    if data.get("blind", {}).get("suspicious"):
        yield "The blind baseline succeeds, so no attack result here can be put down to the model."
    if any("canary" in run for run in runs):
        yield (
            "Canaries are worst cases on purpose. "
            + (
                "All copies of one are those of one user, of whom ε speaks."
                if _units(runs) == ["user"]
                else "ε speaks of one copy; many copies together have the much weaker guarantee of "
                "a group, so their extraction need not contradict ε."
            )
        )


def _units(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What ε protects."""
    return _distinct(clean(run["unit"]) for run in runs if "unit" in run) or ["example"]


def _covered(report: Mapping[str, Any]) -> str:
    """What ε protects and what it leaves out."""
    runs, data = report["runs"], report.get("data", {})
    units = _units(runs)
    fewer = (
        "All examples of a user are protected together, as far as the data name their user rightly;"
        if units == ["user"]
        else "Somebody with several of them in the data is protected less,"
    )
    text = (
        f"ε protects one {' or '.join(units)}. {fewer} and choices made by looking at the data, "
        "such as hyper-parameters, are not counted"
    )
    private = [
        name
        for key, name in (
            ("labels_are_public", "label set"),
            ("vocabulary_is_public", "vocabulary"),
        )
        if data.get(key) is False
    ]
    left = f"; nor is the {' or the '.join(private)}, which was taken from them" if private else ""
    return f"{text}{left}."
