"""The table of what is supported: `python -m tests.zoo.support` writes docs/support.md."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers as hf

from tests.zoo import adapters, families
from tests.zoo.subjects import Subject, Texts
from tests.zoo.verdicts import VERDICTS, Outcome, dependence, examine

FILE = Path(__file__).parents[2] / "docs" / "support.md"

# Longer messages are cut.
_LONGEST = 200

# A larger change of an example's loss or gradient by its neighbours is no rounding.
_DEPENDENT = 1e-4

_INTRODUCTION = """\
# What is supported

Every text classifier of transformers and every method of peft, made small, trained by the default
engine and judged by the loop over examples (`engine="per_example"`): the clipped sums and the norms
of 39 batches, of 1 to 4 texts of 4, 5 and 7 tokens, with and without padding, in evaluation and in
training mode without dropout, as the model comes and with all parameters moved. Everything that the
method trains is trained; models are given token ids and, where texts are padded, a mask.

- **exact**: all batches agree with the loop, to 1e-9 in float64; to 1e-5 where a model computes
  partly in float32 by itself; to 1e-3 where it exists in float32 only.
- **refused**: at least one batch was refused with an error that names the module. Training would
  stop there, before anything of that batch is released. All others were exact, in float32 too,
  where errors are harder to tell from rounding.
- **fails**: another error. **wrong**: something else than the loop's result was released. Both are
  defects of this library.
- **–**: there is no such model, or none that can be built; then it is said at the end why.

Models with experts are listed for each way of computing these: "batched_mm" and "grouped_mm" are
values of `experts_implementation`, of which transformers takes the second by itself; the row
without one is "eager".
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a subject: its worst batch.

    Attributes:
        row, column: where it stands in the table.
        verdict: one of `VERDICTS`, or "not built".
        reason: of the first batch with that verdict.
        mixes: whether its examples depend on each other.
    """

    row: str
    column: str
    verdict: str
    reason: str = ""
    mixes: bool = False

    @property
    def name(self) -> str:
        return f"{self.row}, {self.column}" + (" †" if self.mixes else "")


def find(subject: Subject) -> Finding:
    """Examine a subject; what is not exact in float64, in float32 too, where a check that shall
    find errors must let rounding pass."""
    place = {"row": subject.row, "column": subject.column}
    try:
        outcomes = list(examine(subject).values())
        if any(outcome.verdict != "exact" for outcome in outcomes):
            outcomes += examine(replace(subject, **families.FLOAT32)).values()
    except Exception as error:  # no engine is to blame: the loop could not do it
        return Finding(**place, verdict="not built", reason=general(_named(error)))
    worst = min(outcomes, key=lambda outcome: VERDICTS.index(outcome.verdict))
    mixes = _is_dependent(subject)
    if mixes and worst.verdict == "exact":
        worst = Outcome("wrong", "examples depend on each other, where no gradient shows it")
    return Finding(**place, verdict=worst.verdict, reason=general(worst.reason), mixes=mixes)


def general(reason: str) -> str:
    """The beginning of a message, without what is special to one model: names, shapes, numbers."""
    reason = " ".join(reason.split())
    reason = re.sub(r"^Module \S+: ", "", reason)
    reason = re.sub(r"gradient of \S+", "gradient of …", reason)
    reason = re.sub(r"\(\d[\d, ]*\)(, \(\d[\d, ]*\))*", "(…)", reason)
    reason = re.sub(r"\[\d[\d, ]*\]", "[…]", reason)
    reason = re.sub(r"\b\d+\b", "…", reason)
    return reason if len(reason) <= _LONGEST else reason[:_LONGEST].rsplit(" ", 1)[0] + " …"


def column_names(row: str) -> list[str]:
    """Of the table that has this row."""
    is_family = any(row.split(", ")[0] in names for _, names in families.TASKS.values())
    return list(families.TASKS if is_family else adapters.BASES)


def document(findings: Iterable[Finding]) -> str:
    """The file, made of the findings on all subjects."""
    found = list(findings)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft", "torch")
    )
    parts = [
        f"{_INTRODUCTION}\nMade on {datetime.date.today()} with {versions} by "
        "`python -m tests.zoo.support`; a test holds it against the code.",
        "## Families of transformers",
        _table("family", found, list(families.TASKS)),
        "## Methods of peft",
        _table("method", found, list(adapters.BASES)),
        *_reasons(found),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: str, findings: Iterable[Finding], columns: list[str]) -> str:
    rows: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.column in columns:
            rows.setdefault(finding.row, []).append(finding)
    lines = [f"| {head} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join(lines + [table_row(those) for those in rows.values()])


def table_row(findings: list[Finding]) -> str:
    """The line of a table that holds these, of one row all."""
    row, cells = findings[0].row, {finding.column: finding.verdict for finding in findings}
    found = [cells.get(column, "–") for column in column_names(row)]
    return f"| {row} | {' | '.join(found).replace('not built', '–')} |"


def _reasons(findings: list[Finding]) -> list[str]:
    """Who is not exact, by verdict and reason."""
    parts = []
    for verdict, title in _TITLES.items():
        by_reason: dict[str, list[Finding]] = {}
        for finding in findings:
            if finding.verdict == verdict:
                by_reason.setdefault(finding.reason, []).append(finding)
        if by_reason:
            parts.append(title)
        for reason, those in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
            parts.append(section(reason, those))
    return parts


_TITLES = {
    "wrong": "## Wrong",
    "fails": "## Fails",
    "refused": (
        "## Refused\n\n"
        "By the message of the first refusal. † marks models whose examples really depend on each "
        "other: an example has another loss or gradient among other neighbours. "
        "All others are valid, and could be supported."
    ),
    "not built": "## Not built",
}


def section(reason: str, findings: Iterable[Finding]) -> str:
    """The lines that say who shares a reason."""
    return f"> {reason}\n\n" + "; ".join(finding.name for finding in findings) + "."


def _is_dependent(subject: Subject) -> bool:
    texts = Texts.random(4, 4, is_padded=True)
    changes = (dependence(subject, texts, training=training) for training in (False, True))
    return max(changes) > _DEPENDENT


def _named(error: Exception) -> str:
    if "Conv1D" in str(error):
        return "peft does not have the method for layers of type `Conv1D`."
    return f"{type(error).__name__}: {error}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=Path, help="JSON lines: findings there are not made again")
    parser.add_argument("--to", type=Path, default=FILE, help="default: docs/support.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    known = _read(options.kept) if options.kept else {}
    findings = []
    for subject in (*families.subjects(), *adapters.subjects()):
        finding = known.get((subject.row, subject.column)) or find(subject)
        print(f"{subject}: {finding.verdict}", file=sys.stderr)
        if options.kept and (subject.row, subject.column) not in known:
            with options.kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(finding)) + "\n")
        findings.append(finding)
    options.to.parent.mkdir(exist_ok=True)
    options.to.write_text(document(findings), encoding="utf-8")


def _read(path: Path) -> dict[tuple[str, str], Finding]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    findings = [Finding(**json.loads(line)) for line in lines]
    return {(finding.row, finding.column): finding for finding in findings}


if __name__ == "__main__":
    main(sys.argv[1:])
