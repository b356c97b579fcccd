"""The tables of a report as data: every view (HTML, Markdown, terminal) shows the same cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attacks.report import wording as write
from attacks.report.runs import (
    MAIN_FPR,
    Run,
    auc_ceiling,
    audit_refutes,
    clean,
    is_private,
    planted,
    rate_at,
    shortened,
    strongest,
    strongest_attack,
    tpr_ceiling,
)


@dataclass(frozen=True)
class Cell:
    """One number, what belongs to it in smaller print, and whether it refutes the guarantee."""

    value: str = write.ABSENT
    details: tuple[str, ...] = ()
    alarm: bool = False

    @property
    def absent(self) -> bool:
        """Whether nothing was measured."""
        return self.value == write.ABSENT and not self.details


@dataclass(frozen=True)
class Column:
    """A heading, and the heading above it that it shares with its neighbours."""

    title: str
    group: str = ""


@dataclass(frozen=True)
class Row:
    """One line: its name, its cells, and the numbers of the notes that concern it."""

    name: str
    cells: tuple[Cell, ...]
    notes: tuple[int, ...] = ()

    def pairs(self, columns: Sequence[Column]) -> list[tuple[Column, Cell]]:
        """Each cell with its column."""
        return list(zip(columns, self.cells, strict=True))


@dataclass(frozen=True)
class Table:
    """Columns, rows of as many cells, and notes, which are numbered from 1."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The upper headings, each with the number of its columns."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans

    def starts_group(self, index: int) -> bool:
        """Whether the column at that place has another upper heading than the one before it."""
        return index > 0 and self.columns[index].group != self.columns[index - 1].group


def main_table(report: Mapping[str, Any]) -> Table:
    """Return the table: one row per run with ε, accuracy, time and leakage, and the warnings."""
    notes: dict[str, int] = {}
    rows = []
    for run in report["runs"]:
        warnings = [clean(warning) for warning in _shared(run)]
        for warning in warnings:
            notes.setdefault(warning, len(notes) + 1)
        numbers = tuple(dict.fromkeys(notes[warning] for warning in warnings))
        rows.append(Row(clean(run["name"]), tuple(read(run) for _, read in MAIN), numbers))
    return Table(tuple(column for column, _ in MAIN), tuple(rows), tuple(notes))


def _shared(run: Run) -> list[str]:
    """The warnings, each caution of several attacks as one: "loss, lira: …"."""
    cautions: dict[tuple[str, bool], list[str]] = {}
    for warning in run.get("warnings", []):
        name, colon, caution = warning.partition(": ")
        if colon and name in run.get("membership", {}):
            cautions.setdefault((caution, True), []).append(name)
        else:
            cautions.setdefault((warning, False), [])
    return [
        ": ".join(([", ".join(dict.fromkeys(names))] if names else []) + [caution])
        for (caution, _), names in cautions.items()
    ]


def attack_table(report: Mapping[str, Any]) -> Table | None:
    """Return every membership attack on every run with both ceilings; None without attacks."""
    pairs = [(run, name) for run in report["runs"] for name in run.get("membership", {})]
    if not pairs:
        return None
    attacks = [run["membership"][name] for run, name in pairs]
    written = {float(key) for attack in attacks for key in attack.get("tpr_at_fpr", {})}
    fprs = sorted(written, reverse=True)
    rates = [Column(f"TPR at {write.level(fpr)} FPR (%)") for fpr in fprs]
    columns = (Column("attack"), Column("AUC"), *rates, Column("references"))
    rows = [Row(clean(run["name"]), _attack_cells(run, name, fprs)) for run, name in pairs]
    return Table(columns, tuple(rows))


def canary_table(report: Mapping[str, Any]) -> Table | None:
    """Return every canary of every run; None unless some run has several, or several trials."""
    canaries = [planted(run) for run in report["runs"]]
    if not any(len(of_run) > 1 or _has_trials(of_run) for of_run in canaries):
        return None
    rows = [
        Row(clean(run["name"]), _canary_cells(canary))
        for run, of_run in zip(report["runs"], canaries, strict=True)
        for canary in of_run
    ]
    return Table(tuple(Column(title) for title in _CANARY_TITLES), tuple(rows))


def _has_trials(canaries: Sequence[Mapping[str, Any]]) -> bool:
    return any(len(canary.get("ranks", ())) > 1 for canary in canaries)


def mechanism_table(report: Mapping[str, Any]) -> Table | None:
    """Return what each ε was computed from; None if no run claims any."""
    private = [run for run in report["runs"] if is_private(run)]
    if not private:
        return None
    rows = [
        Row(clean(run["name"]), tuple(_plain(run, key, text) for key, _, text in MECHANISM))
        for run in private
    ]
    return Table(tuple(Column(title) for _, title, _ in MECHANISM), tuple(rows))


def _plain(record: Mapping[str, Any], key: str, text: Callable[[Any], str]) -> Cell:
    """A number without doubt, or its absence."""
    value = record.get(key)
    return Cell() if value is None else Cell(text(value))


def _epsilon(run: Run) -> Cell:
    """The accounted ε over its δ and the noise; ∞ without a guarantee."""
    if not is_private(run):
        return Cell("∞")
    details = [f"δ\u00a0=\u00a0{write.small(run['delta'])}"]
    if "noise_multiplier" in run:
        details.append(f"σ\u00a0=\u00a0{write.significant(run['noise_multiplier'])}")
    return Cell(write.budget(run["epsilon"]), tuple(details))


def _intent(run: Run) -> Cell:
    """Intent accuracy with its interval."""
    cell = _plain(run, "intent_accuracy", write.percent)
    limits = run.get("intent_accuracy_interval")
    return Cell(cell.value, (write.interval(limits, write.percent),) if limits else ())


def _slots(run: Run) -> Cell:
    """Slot F1, and the share of utterances that are right as a whole."""
    frame = run.get("frame_accuracy")
    details = () if frame is None else (f"frame\u00a0{write.percent(frame)}",)
    return Cell(_plain(run, "slot_f1", write.percent).value, details)


def _training(run: Run) -> Cell:
    """Training time, its ratio to that without privacy, and memory."""
    details = []
    if "overhead" in run and is_private(run):
        details.append(f"{write.significant(run['overhead'])}×")
    if "peak_memory_mib" in run:
        details.append(f"{write.count(run['peak_memory_mib'])}\u00a0MiB")
    return Cell(_plain(run, "train_seconds", write.duration).value, tuple(details))


def _attacking(run: Run) -> Cell:
    """Time of the attacks, and the reference models they trained."""
    references = run.get("references")
    details = () if references is None else (f"{write.count(references)}\u00a0refs",)
    return Cell(_plain(run, "attack_seconds", write.duration).value, details)


def _area(run: Run) -> Cell:
    """The strongest attack's AUC with its interval and ceiling."""
    attack = strongest(run)
    return Cell() if attack is None else _area_of(run, attack, name=strongest_attack(run) or "")


def _area_of(run: Run, attack: Mapping[str, Any], *, name: str = "") -> Cell:
    """One attack's AUC with its interval and ceiling."""
    limits, ceiling = attack["auc_interval"], auc_ceiling(run, attack)
    details = [write.interval(limits, write.area)]
    details += [] if ceiling is None else [f"ceiling\u00a0{write.area(ceiling)}"]
    details += [shortened(name)] if name else []
    refuted = ceiling is not None and limits[0] > ceiling
    return Cell(write.area(attack["auc"]), tuple(details), alarm=refuted)


def _rate(run: Run) -> Cell:
    """The strongest attack's TPR at 1 % FPR."""
    attack = strongest(run)
    return Cell() if attack is None else _rate_of(run, attack, MAIN_FPR)


def _rate_of(run: Run, attack: Mapping[str, Any], fpr: float) -> Cell:
    """One attack's TPR with its interval and ceiling."""
    rate = rate_at(attack, fpr)
    if rate is None:
        return Cell()
    ceiling = tpr_ceiling(run, rate, fpr)
    details = [write.interval(rate["interval"], write.percent)]
    details += [] if ceiling is None else [f"ceiling\u00a0{write.percent(ceiling)}"]
    refuted = ceiling is not None and rate["interval"][0] > ceiling
    return Cell(write.percent(rate["value"]), tuple(details), alarm=refuted)


def _audit(run: Run) -> Cell:
    """The audited lower bound, and the largest one this audit could have given."""
    audit = run.get("audit")
    if audit is None:
        return Cell()
    details = [f"ceiling\u00a0{write.bound(audit['ceiling'])}"] if "ceiling" in audit else []
    value = f"≥\u00a0{write.bound(audit['epsilon_lower_bound'])}"
    return Cell(value, tuple(details), alarm=audit_refutes(run))


def _exposure(run: Run) -> Cell:
    """Exposure of the canary with its interval, what is available, and chance."""
    canary = run.get("canary", {})
    if "exposure_bits" not in canary:
        return Cell()
    limits, chance = canary.get("exposure_interval"), canary.get("chance_exposure_bits")
    details = [write.interval(limits, "{:.1f}".format)] if limits else []
    details.append(f"of\u00a0{canary['available_bits']:.1f}")
    details += [] if chance is None else [f"chance\u00a0{chance:.1f}"]
    return Cell(f"{canary['exposure_bits']:.1f}", tuple(details))


def _exact(run: Run) -> Cell:
    """Share of secrets extracted exactly, with its interval and chance."""
    canary = run.get("canary", {})
    if "exact_match" not in canary:
        return Cell()
    limits = write.interval(canary["exact_match_interval"], write.percent)
    details = [limits, f"chance\u00a0{write.percent(canary['chance_exact'])}"]
    if "group_epsilon" in canary:
        details.append(f"group ε\u00a0≥\u00a0{write.bound(canary['group_epsilon'])}")
    if "accounted_group_epsilon" in canary:
        details.append(f"accounted\u00a0{write.budget(canary['accounted_group_epsilon'])}")
    return Cell(write.percent(canary["exact_match"]), tuple(details))


def _hamming(run: Run) -> Cell:
    """Share of wrong tokens in the extracted secrets, and chance."""
    canary = run.get("canary", {})
    if "hamming" not in canary:
        return Cell()
    chance = f"chance\u00a0{write.percent(canary['chance_hamming'])}"
    return Cell(write.percent(canary["hamming"]), (chance,))


def _attack_cells(run: Run, name: str, fprs: Sequence[float]) -> tuple[Cell, ...]:
    """One line of the table of all attacks."""
    attack = run["membership"][name]
    accuracy = run.get("reference_accuracy")
    details = () if accuracy is None else (f"accuracy {write.percentage(accuracy)}",)
    return (
        Cell(clean(name), ("strongest",) if name == strongest_attack(run) else ()),
        _area_of(run, attack),
        *(_rate_of(run, attack, fpr) for fpr in fprs),
        Cell(_plain(run, "references", write.count).value, details),
    )


def _canary_cells(canary: Mapping[str, Any]) -> tuple[Cell, ...]:
    """One line of the table of all canaries."""
    run = {"canary": canary}
    return (
        _plain(canary, "pattern", clean),
        _plain(canary, "repetitions", write.count),
        _plain(canary, "trials", write.count),
        _exposure(run),
        _exact(run),
        _hamming(run),
        _ranks(canary),
    )


def _ranks(canary: Mapping[str, Any]) -> Cell:
    """The rank of each model's own secret among all candidates."""
    ranks = canary.get("ranks", ())
    return Cell(", ".join(f"{rank:.12g}" for rank in ranks)) if ranks else Cell()


_CANARY_TITLES = (
    "pattern",
    "copies",
    "trials",
    "exposure (bits)",
    "exact match (%)",
    "Hamming (%)",
    "ranks of the secrets",
)

MAIN: tuple[tuple[Column, Callable[[Run], Cell]], ...] = (
    (Column("ε", "guarantee"), _epsilon),
    (Column("intent accuracy (%)", "usefulness"), _intent),
    (Column("slot F1 (%)", "usefulness"), _slots),
    (Column("training time", "cost"), _training),
    (Column("attack time", "cost"), _attacking),
    (Column("AUC", "strongest attack"), _area),
    (Column("TPR at 1\u00a0% FPR (%)", "strongest attack"), _rate),
    (Column("ε lower bound", "audit"), _audit),
    (Column("exposure (bits)", "canary"), _exposure),
    (Column("exact match (%)", "canary"), _exact),
    (Column("Hamming (%)", "canary"), _hamming),
)

MECHANISM: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("target_epsilon", "target ε", write.significant),
    ("epsilon", "ε", write.budget),
    ("delta", "δ", write.small),
    ("noise_multiplier", "noise multiplier σ", write.significant),
    ("noise_schedule", "noise schedule", clean),
    ("constant_noise_multiplier", "constant noise of equal ε", write.significant),
    ("clipping", "clipping rule", clean),
    ("max_grad_norm", "clipping norm C", write.significant),
    ("sample_rate", "sample rate q", write.significant),
    ("steps", "steps T", write.count),
    ("accountant", "accountant", clean),
    ("second_epsilon", "ε by the second", write.budget),
    ("second_accountant", "second accountant", clean),
    ("adjacency", "adjacency", clean),
    ("unit", "unit", clean),
    ("examples_per_user", "examples per user, at most", write.count),
)
