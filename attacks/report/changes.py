"""What privacy changed in the answers to the test texts: sentences and tables of one section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attacks.report import wording as write
from attacks.report.compared import LEAST_IN_TEST, Compared, classes, compared, flips_of
from attacks.report.runs import clean, phrases, shortened
from attacks.report.table import Cell, Column, Row, Table

# Of more classes the worst are shown.
MOST_CLASSES = 10
KINDS = {"intents": "intent", "slots": "slot"}


@dataclass(frozen=True)
class Details:
    """A table with its heading, and what its rows are."""

    title: str
    first: str
    table: Table


@dataclass(frozen=True)
class Changes:
    """The section: what it says, how to read it, and its tables."""

    said: tuple[tuple[str, str], ...]
    reading: str
    details: tuple[Details, ...]


def changes(report: Mapping[str, Any]) -> Changes | None:
    """What privacy changed, as plain text without markup; None where no answers were compared.

    Args:
        report: as `attacks.report.contract.validate` accepts it.
    """
    found = compared(report)
    if found is None:
        return None
    where = {
        run["name"]: phrase
        for run, phrase in zip(report["runs"], phrases(report["runs"]), strict=True)
    }
    paragraphs = (
        ("Which texts flip", " ".join(_flips_said(found, where))),
        ("What is lost", " ".join(_losses_said(found, where))),
        ("How sure it is", " ".join(_calibration_said(found, where))),
    )
    tables = (
        *(_classes(found, kind) for kind in KINDS),
        _groups(found),
        _rarest(found),
        _calibrations(found),
        _flips(found),
    )
    return Changes(
        said=tuple((title, text) for title, text in paragraphs if text),
        reading=_reading(found),
        details=tuple(details for details in tables if details is not None),
    )


# ---- sentences -------------------------------------------------------------------------------


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _flips_said(found: Compared, where: Mapping[str, str]) -> Iterator[str]:
    for _, run in found.private:
        flips = run["flips"]
        yield (
            f"Of the test texts {_share(flips, 'negative')} go from right to wrong "
            f"{where[run['name']]}, and {_share(flips, 'positive')} from wrong to right."
        )
    controls = found.ordinary[1].get("retrainings", ())
    for flips in controls[:1]:
        yield (
            "Ordinary training on the same examples from another seed alone makes "
            f"{_share(flips, 'negative')} wrong and {_share(flips, 'positive')} right."
        )
    if not controls:
        yield "No model was trained again to show what another seed alone changes."


def _share(flips: Mapping[str, Any], key: str) -> str:
    limits = flips.get(f"{key}_interval")
    doubt = f" {write.interval(limits, write.percent)}" if limits else ""
    return write.percentage(flips[key]) + doubt


def _losses_said(found: Compared, where: Mapping[str, str]) -> Iterator[str]:
    run = found.strictest[1]
    worst = []
    for kind, word in KINDS.items():
        rows = [row for row in classes(run, kind).values() if row.get("change", 0) < 0]
        if rows:
            row = min(rows, key=lambda row: row["change"])
            worst.append(f"the {word} {shortened(row['name'], 40)} ({_change(row)})")
    if worst:
        yield f"{_capital(where[run['name']])} most is lost on {' and '.join(worst)}."
    words = [row for row in classes(run, "rarest_word").values() if "change" in row]
    if len(words) > 1:
        rare, common = words[0], words[-1]
        yield (
            f"{_capital(where[run['name']])} accuracy changes by {_change(rare)} on texts whose "
            f"rarest word is in {rare['name']} of the training texts, and by {_change(common)} "
            f"where it is in {common['name']} of them."
        )
    if "change" in run.get("group_gap", {}):
        yield _gap_said(run["group_gap"], where[run["name"]])


def _gap_said(gap: Mapping[str, Any], where: str) -> str:
    """How far groups lie apart, and what privacy changed about it."""
    chance = gap.get("gap_by_chance")
    doubt = "" if chance is None else f" ({write.percent(chance)} by chance)"
    return (
        f"{_capital(where)} accuracy is highest in the group {shortened(gap['highest'], 40)} and "
        f"lowest in the group {shortened(gap['lowest'], 40)}, {write.percent(gap['gap'])} points "
        f"apart{doubt}; the gap between the best and the worst group changes by {_change(gap)}."
    )


def _change(row: Mapping[str, Any]) -> str:
    """−4.0 points [−9.1, 0.3]."""
    limits = row.get("change_interval")
    doubt = f" {write.interval(limits, _signed)}" if limits else ""
    return write.points(row["change"]) + doubt


def _signed(difference: float) -> str:
    """A difference of shares in points, with its sign and without the word."""
    return write.points(difference).removesuffix(" points")


def _calibration_said(found: Compared, where: Mapping[str, str]) -> Iterator[str]:
    for _, run in found.everyone:
        if "calibration" in run:
            known = run["calibration"]
            yield (
                f"{_capital(where[run['name']])} mean confidence is "
                f"{write.percentage(known['mean_confidence'])} at "
                f"{write.percentage(known['accuracy'])} accuracy, and the expected calibration "
                f"error {_error(known)}."
            )


def _error(known: Mapping[str, Any]) -> str:
    """A calibration error, and what chance shows of one."""
    chance = known.get("ece_by_chance")
    text = write.percentage(known["ece"])
    return text if chance is None else f"{text} ({write.percentage(chance)} by chance)"


def _reading(found: Compared) -> str:
    """How to read the tables, and what the comparison leaves open."""
    has_control = any(run.get("retrainings") for _, run in found.everyone)
    again = (
        " Again: trained again in the same way on the same examples, planted secrets included, "
        "from another seed (initial weights, order, dropout and, in private runs, sampling and "
        "noise). "
        "What flips between two ordinary trainings is not due to privacy; what flips between two "
        "private ones shows how far chance decides, that of the noise included."
        if has_control
        else ""
    )
    gaps = any("group_gap" in run for _, run in found.everyone)
    return (
        "All numbers are of the test texts, the same for every model. A text is right if its "
        "intent is, or without intents every slot; a slot is right if it was found with its span "
        "and its label (recall). Changes are in percentage points against the run without privacy, "
        "with intervals for paired shares (Newcombe, 1998). Intervals cover the chance in the "
        "texts, not that in training, and the worst of many classes look worse than they are, as "
        "they were chosen by their result. Runs may differ in their recipes as well as in privacy."
        + (_GAPS if gaps else "")
        + again
    )


_GAPS = (
    f" The gap of a run lies between its best and its worst group of at least {LEAST_IN_TEST} test "
    "texts; both are chosen anew for each run, by their result, so the more groups there are, the "
    "further the extremes lie apart by chance, which is said beside it. The interval of its change "
    "is of the bootstrap over texts within groups (Efron and Tibshirani, 1993; percentiles; with "
    "half a text added to each cell, as Agresti and Min, 2005), which draws the same texts for "
    "both runs and chooses the groups anew in every draw. Accuracy by group is about the test "
    "texts alone; it says nothing about how private a group is."
)


# ---- tables ----------------------------------------------------------------------------------


def _classes(found: Compared, kind: str) -> Details | None:
    """The classes that lost most at the strictest budget."""
    strict = classes(found.strictest[1], kind)
    if not strict:
        return None
    order = _worst_first(strict)
    few = len(found.strictest[1]["breakdown"][kind]) - len(order)
    hidden = f", of {len(order)}" if len(order) > MOST_CLASSES else ""
    rare = f"; {few} more occur fewer than {LEAST_IN_TEST} times in the test" if few else ""
    plural = f"{KINDS[kind].capitalize()}s"
    return Details(
        f"{plural} by what privacy lost, the worst first{hidden}{rare}",
        KINDS[kind],
        _by_class(found, kind, order[:MOST_CLASSES]),
    )


def _worst_first(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted(rows, key=lambda name: rows[name].get("change", rows[name]["right"]))


def _groups(found: Compared) -> Details | None:
    """Groups of people by what privacy lost, and how far the best and the worst lie apart."""
    run = found.strictest[1]
    order = _worst_first(classes(run, "groups"))
    if not order:
        return None
    every = classes(run, "groups", least=0).values()
    few, known = len(every) - len(order), sum(row["test"] for row in every)
    without = max(run["flips"]["texts"] - known, 0)
    title = (
        "Texts by group, the worst first"
        + (f", of {len(order)}" if len(order) > MOST_CLASSES else "")
        + (f"; {few} more have fewer than {LEAST_IN_TEST} test texts" if few else "")
        + (f"; {without} test texts have no group" if without else "")
    )
    table = _by_class(found, "groups", order[:MOST_CLASSES])
    return Details(title, "group", replace(table, rows=(*table.rows, *_gap_rows(found))))


def _gap_rows(found: Compared) -> Iterator[Row]:
    gaps = [run.get("group_gap", {}) for _, run in found.everyone]
    if any(gaps):
        yield Row("highest − lowest (points)", (Cell(), Cell(), *map(_gap, gaps)))
    if any("gap_by_chance" in gap for gap in gaps):
        yield Row("the same by chance (points)", (Cell(), Cell(), *map(_gap_by_chance, gaps)))


def _gap(gap: Mapping[str, Any]) -> Cell:
    return _right({**gap, "right": gap["gap"]}) if gap else Cell()


def _gap_by_chance(gap: Mapping[str, Any]) -> Cell:
    return Cell(write.percent(gap["gap_by_chance"])) if "gap_by_chance" in gap else Cell()


def _rarest(found: Compared) -> Details | None:
    """Test texts by how often training had their rarest word."""
    order = list(classes(found.strictest[1], "rarest_word"))
    if not order:
        return None
    table = _by_class(found, "rarest_word", order)
    return Details(
        "Texts by how many training texts have their rarest word", "training texts", table
    )


def _by_class(found: Compared, kind: str, order: Sequence[str]) -> Table:
    counts = () if kind == "rarest_word" else ("in training",)
    columns = [*counts, "in the test", found.ordinary[0] + " (%)"]
    columns += [f"{name} (%, change in points)" for name, _ in found.private]
    rows = []
    for name in order:
        own = [classes(run, kind).get(name) for _, run in found.everyone]
        known = classes(found.strictest[1], kind)[name]
        cells = [Cell(write.count(known["training"])) if "training" in known else Cell()]
        cells = (cells if counts else []) + [Cell(write.count(known["test"]))]
        rows.append(Row(clean(name), (*cells, *map(_right, own))))
    return Table(tuple(Column(title) for title in columns), tuple(rows))


def _right(row: Mapping[str, Any] | None) -> Cell:
    """The share that is right, and how far it is from that without privacy."""
    if row is None:
        return Cell()
    if "change" in row:
        limits = row.get("change_interval")
        doubt = f"\u00a0{write.interval(limits, _signed)}" if limits else ""
        return Cell(write.percent(row["right"]), (_signed(row["change"]) + doubt,))
    limits = row.get("right_interval")
    return Cell(
        write.percent(row["right"]), (write.interval(limits, write.percent),) if limits else ()
    )


def _calibrations(found: Compared) -> Details | None:
    rows = [
        Row(name, _calibration_cells(run["calibration"]))
        for name, run in found.everyone
        if "calibration" in run
    ]
    if not rows:
        return None
    titles = (
        "texts",
        "accuracy (%)",
        "mean confidence (%)",
        "confidence − accuracy (points)",
        "expected calibration error (%)",
        "error by chance (%)",
    )
    return Details("Calibration of intents", "run", Table(tuple(map(Column, titles)), tuple(rows)))


def _calibration_cells(known: Mapping[str, Any]) -> tuple[Cell, ...]:
    gap = known.get("overconfidence", known["mean_confidence"] - known["accuracy"])
    around_gap, around_ece = known.get("overconfidence_interval"), known.get("ece_interval")
    chance = known.get("ece_by_chance")
    return (
        Cell(write.count(known["texts"])),
        Cell(write.percent(known["accuracy"])),
        Cell(write.percent(known["mean_confidence"])),
        Cell(_signed(gap), (write.interval(around_gap, _signed),) if around_gap else ()),
        Cell(
            write.percent(known["ece"]),
            (write.interval(around_ece, write.percent),) if around_ece else (),
        ),
        Cell() if chance is None else Cell(write.percent(chance)),
    )


def _flips(found: Compared) -> Details:
    keys = {
        "negative": "right → wrong (%)",
        "positive": "wrong → right (%)",
        "disagreement": "another answer (%)",
    }
    rows = [
        Row(name, (Cell(write.count(flips["texts"])), *(_flip(flips, key) for key in keys)))
        for name, flips, _ in flips_of(found)
    ]
    columns = tuple(map(Column, ("texts", *keys.values())))
    return Details("Flips of test texts", "from → to", Table(columns, tuple(rows)))


def _flip(flips: Mapping[str, Any], key: str) -> Cell:
    limits = flips.get(f"{key}_interval")
    return Cell(
        write.percent(flips[key]), (write.interval(limits, write.percent),) if limits else ()
    )
