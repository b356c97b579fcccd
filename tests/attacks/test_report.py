"""Reports as files: valid, complete, escaped, the same twice, and honest in their sentences."""

import copy
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from attacks import report as reports
from attacks.ceilings import approximate_dp_ceiling_auc
from attacks.report import strongest_attack, terminal_table, write_report
from attacks.report import wording as write
from attacks.report.changes import changes
from attacks.report.contract import plain
from attacks.report.figures import FIGURES
from attacks.report.findings import findings
from attacks.report.markdown import to_markdown
from attacks.report.page import to_html
from attacks.report.table import attack_table, canary_table, main_table
from tests.attacks.subjects import compared_with

EVIL = "<script>alert(1)</script>|**b**`c`$x$ [l](http://e.vil)\n# h \x1b[31m\x00\u202e{{ 7*7 }}"
OLD = sorted(
    (Path(__file__).parents[2] / "benchmarks" / "results").glob("2026-11-21-compare-*.json")
)
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}


def attack(auc, *, half=0.02, tpr=0.02):
    return {
        "auc": auc,
        "auc_interval": [auc - half, min(1.0, auc + half)],
        "tpr_at_fpr": {"0.01": {"value": tpr, "interval": [tpr / 2, min(1.0, 2 * tpr)]}},
        "roc": {
            "fpr": [0, 0.1, 1],
            "tpr": [0, 0.2, 1],
            "low": [0, 0.1, 0.9],
            "high": [0.1, 0.3, 1],
        },
    }


EXAMPLE = {
    "carrier": "my pin code is",
    "original": ["3", "<b>$x$"],
    "recovered": ["3", "7"],
    "positions": [
        {"candidates": ["3", "5"], "losses": [0.1, 2.0]},
        {"candidates": ["7", "1", "<b>$x$"], "losses": [0.2, 0.2, 0.2]},
    ],
}


def run(name, epsilon, *, auc=0.5, accuracy=0.9, bound=0.0, exact=0.0):
    entry = {
        "name": name,
        "target_epsilon": epsilon,
        "epsilon": epsilon,
        "intent_accuracy": accuracy,
        "intent_accuracy_interval": [accuracy - 0.02, accuracy + 0.02],
        "slot_f1": accuracy - 0.05,
        "train_seconds": 100.0,
        "attack_seconds": 30.0,
        "references": 16,
        "membership": {"loss": attack(0.5), "lira": attack(auc)},
        "canary": {
            "pattern": "pin",
            "exposure_bits": 2.0,
            "available_bits": 13.3,
            "chance_exposure_bits": 1.4,
            "exact_match": exact,
            "exact_match_interval": [max(0.0, exact - 0.1), exact + 0.1],
            "chance_exact": 1e-4,
            "hamming": 0.9,
            "chance_hamming": 0.9,
            "example": EXAMPLE,
        },
        "audit": {
            "epsilon_lower_bound": bound,
            "confidence": 0.95,
            "method": "one-run",
            "ceiling": 9.0,
        },
        "warnings": [],
    }
    if epsilon is not None:
        entry |= {"delta": 1e-5, "noise_multiplier": 1.25, "overhead": 1.1}
    return entry


def study():
    return {
        "schema": 1,
        "title": "A study",
        "command": "dpnlu compare --out there",
        "created": "2026-01-02",
        "data": {
            "name": "SNIPS",
            "train": 13084,
            "labels_are_public": True,
            "vocabulary_is_public": False,
            "blind": {"auc": 0.5, "auc_interval": [0.47, 0.53], "suspicious": False},
        },
        "machine": {"platform": "Linux", "memory_gib": 7.6},
        "study": {"confidence": 0.95, "batch_size": 256},
        "runs": [
            run("free", None, auc=0.7, accuracy=0.96, bound=3.0, exact=0.8) | compared_with(None),
            run("eps-8", 7.98, auc=0.55, accuracy=0.93, bound=1.0)
            | compared_with("free", lost=0.1),
            run("eps-2", 2.0, auc=0.51, accuracy=0.88) | compared_with("free", lost=0.2),
        ],
    }


def minimal():
    return {"runs": [{"name": "only", "target_epsilon": None, "epsilon": None}]}


class Page(HTMLParser):
    """Collects the tags and the visible text; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text.append(data)

    @property
    def seen(self):
        return " ".join("".join(self.text).split())


def page(report):
    """The page without figures, which take most of the time."""
    return Page(to_html(plain(report), []))


def page_with_figures(report, directory):
    return Page(write_report(report, directory).read_text(encoding="utf-8"))


def markdown(report):
    return to_markdown(plain(report), [])


# ---- files


def test_all_files_are_written_and_the_page_is_returned(tmp_path):
    path = write_report(study(), tmp_path / "new" / "place")
    assert path == tmp_path / "new" / "place" / "report.html"
    files = {str(file.relative_to(path.parent)) for file in path.parent.rglob("*.*")}
    assert files == {"report.json", "report.md", "report.html"} | {
        f"figures/{name}.svg" for name in FIGURES
    }


def test_the_json_is_the_report_and_nothing_else(tmp_path):
    report = study()
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == report
    assert '"fpr": [0, 0.1, 1]' in text
    assert list(json.loads(text)) == sorted(report)


@pytest.mark.parametrize("title", ["[\n 1,\n 2\n]", "[  1,  2 ]"])
def test_text_that_looks_like_numbers_survives_in_the_json(title, tmp_path):
    report = minimal() | {"title": title, "numbers": [1e-5, -2, 3.5e300], "none": []}
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_two_writes_give_the_same_bytes(tmp_path):
    def contents(directory):
        write_report(study(), directory)
        return {f.relative_to(directory): f.read_bytes() for f in directory.rglob("*.*")}

    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "a")


def test_an_invalid_report_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="epsilon"):
        write_report({"runs": [{"name": "x", "target_epsilon": 1}]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_file_and_no_fragment(tmp_path, monkeypatch):
    write_report(study(), tmp_path)
    before = (tmp_path / "report.json").read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(reports.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(minimal(), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not list(tmp_path.rglob("*unfinished*"))


def test_measurements_are_on_the_disk_before_anything_is_drawn(tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(reports, "drawings", fail)
    with pytest.raises(RuntimeError, match="drawing"):
        write_report(study(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == study()


def test_figures_of_an_earlier_report_are_removed_and_other_files_kept(tmp_path):
    write_report(study(), tmp_path)
    (tmp_path / "figures" / "mine.svg").write_text("mine")
    write_report(minimal(), tmp_path)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["mine.svg"]
    assert "figures/" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_reports_load_neither_models_nor_windows():
    heavy = ("torch", "sklearn", "dpnlu", "matplotlib.pyplot")
    code = f"import sys, attacks.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the page


def test_the_page_shows_every_run_and_every_figure(tmp_path):
    shown = page_with_figures(study(), tmp_path)
    for entry in study()["runs"]:
        assert shown.seen.count(entry["name"]) >= 2
    assert sum(tag == "svg" for tag, _ in shown.tags) == len(FIGURES)
    for text in ("13,084", "dpnlu compare --out there", "memory (GiB)", "A study", "2026-01-02"):
        assert text in shown.seen


def test_the_page_fetches_nothing(tmp_path):
    shown = page_with_figures(study(), tmp_path)
    for tag, attributes in shown.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policy = [a["content"] for t, a in shown.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path):
    report = study()
    report["runs"][1]["warnings"] = ["few non-members"]
    shown = page_with_figures(report, tmp_path)
    ids = [attributes["id"] for _, attributes in shown.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {one or other for one, other in targets} <= set(ids)


def test_colours_in_the_page_follow_its_dark_mode(tmp_path):
    text = write_report(study(), tmp_path).read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(pictures))
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = text.split("prefers-color-scheme: dark", 1)
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark


# ---- what users supply


def evil():
    report = study()
    report |= {"title": EVIL, "command": EVIL, "created": EVIL}
    for index, entry in enumerate(report["runs"]):
        entry["name"] = f"{EVIL}{index}"
        entry["warnings"] = [EVIL]
        entry["membership"] = {EVIL: entry["membership"]["lira"]}
        entry |= {"accountant": EVIL, "unit": EVIL}
        entry["audit"] |= {"method": EVIL, "assumption": EVIL}
        entry["canary"]["pattern"] = EVIL
    report["runs"][1]["epsilon"] = report["runs"][2]["epsilon"]  # labels fall back to names
    report["data"]["name"] = report["machine"][EVIL] = EVIL
    report["study"][EVIL] = {EVIL: [EVIL, None, True]}
    return report


def test_the_page_shows_markup_of_users_as_text(tmp_path):
    shown = page_with_figures(evil(), tmp_path)
    assert "script" not in {tag for tag, _ in shown.tags}
    assert "<script>alert(1)</script>|**b**`c`$x$ [l](http://e.vil) # h" in shown.seen
    assert "{{ 7*7 }}" in shown.seen
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not set(raw) & set("\x00\x1b\u202e")


def test_markdown_shows_markup_of_users_as_text():
    text = markdown(evil())
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    shown = Page(html)
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"script", "a", "em", "i"}
    assert "<script>alert(1)</script>|**b**`c`$x$ [l](http://e.vil) # h" in shown.seen
    rows = [row for row in text.splitlines() if row.startswith("| ")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[: 2 + 3]}
    assert len(widths) == 1


@pytest.mark.parametrize("start", ["# x", "+ x", "- x", "1. x", "2) x", "= x", "2026-01-02", "0.7"])
def test_markdown_text_starts_no_block(start):
    text = markdown(minimal() | {"created": start})
    shown = Page(MarkdownIt("commonmark").render(text))
    assert start in shown.seen
    assert sum(tag in {"h1", "ol"} for tag, _ in shown.tags) == 1


def test_a_command_with_fences_stays_in_its_fence():
    text = markdown(minimal() | {"command": "a ```` b\n# c"})
    shown = Page(MarkdownIt("commonmark").render(text))
    assert sum(tag == "code" for tag, _ in shown.tags) == 1
    assert "a ```` b # c" in shown.seen


# ---- absent measurements


def test_an_absent_measurement_is_a_dash():
    cells = main_table(minimal()).rows[0].cells
    assert cells[0].value == "∞"
    assert {cell.value for cell in cells[1:]} == {"–"}
    assert attack_table(minimal()) is None


@pytest.mark.parametrize(
    "key", ["membership", "canary", "audit", "slot_f1", "train_seconds", "overhead", "warnings"]
)
def test_a_report_without_one_block_is_written(key):
    report = study()
    for entry in report["runs"]:
        entry.pop(key, None)
    assert "eps-8" in page(report).seen


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_block_that_one_run_lacks_is_a_dash_there(dropped):
    report = study()
    for key in ("membership", "canary", "audit", "intent_accuracy", "intent_accuracy_interval"):
        del report["runs"][dropped][key]
    page(report)
    table = main_table(report)
    titles = [column.title for column in table.columns]
    for title in ("AUC", "ε lower bound", "exposure (bits)", "intent accuracy (%)"):
        absent = [row.cells[titles.index(title)].absent for row in table.rows]
        assert absent == [index == dropped for index in range(3)]


@pytest.mark.parametrize("kept", [[0], [1], [1, 2]])
def test_some_runs_only(kept):
    report = study()
    report["runs"] = [report["runs"][index] for index in kept]
    page(report)


# ---- the table


def cell(report, row, title):
    table = main_table(report)
    return table.rows[row].cells[[column.title for column in table.columns].index(title)]


def test_the_strongest_attack_has_the_largest_auc_and_ties_go_by_name():
    assert strongest_attack({"membership": {"b": attack(0.6), "a": attack(0.5)}}) == "b"
    assert strongest_attack({"membership": {"b": attack(0.6), "a": attack(0.6)}}) == "a"
    assert strongest_attack({"membership": {}}) is None
    assert strongest_attack({}) is None


def test_numbers_carry_intervals_and_ceilings():
    report = study()
    ceiling = approximate_dp_ceiling_auc(2.0, 1e-5)
    shown = cell(report, 2, "AUC")
    assert shown.value == "0.510"
    assert shown.details == ("[0.490,\u00a00.530]", f"ceiling\u00a0{ceiling:.3f}", "lira")
    assert cell(report, 0, "AUC").details == ("[0.680,\u00a00.720]", "lira")
    assert cell(report, 1, "ε").details == ("δ\u00a0=\u00a01e-5", "σ\u00a0=\u00a01.25")
    assert cell(report, 1, "exact match (%)").details[1] == "chance\u00a00.01"


def test_a_reported_ceiling_goes_before_a_computed_one():
    report = study()
    report["runs"][2]["membership"]["lira"] |= {"auc_ceiling": 0.6}
    assert "ceiling\u00a00.600" in cell(report, 2, "AUC").details
    assert not cell(report, 2, "AUC").alarm
    report["runs"][2]["membership"]["lira"] |= {"auc_ceiling": 0.4}
    assert cell(report, 2, "AUC").alarm


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-5, 3e-4, 65_000.0, 1e9])
@pytest.mark.parametrize("alone", [True, False])
def test_no_budget_is_too_small_or_too_large_to_be_reported(epsilon, alone, tmp_path):
    report = study()
    private = next(entry for entry in report["runs"] if entry["epsilon"] is not None)
    private |= {"epsilon": epsilon, "target_epsilon": epsilon}
    free = [entry for entry in report["runs"] if entry["epsilon"] is None]
    report["runs"] = [private] if alone else [*free, private]
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_equal_warnings_share_a_number():
    report = study()
    for entry, warnings in zip(report["runs"], (["a"], ["b", "a"], []), strict=True):
        entry["warnings"] = warnings
    table = main_table(report)
    assert table.notes == ("a", "b")
    assert [row.notes for row in table.rows] == [(1,), (2, 1), ()]


def test_a_caution_about_several_attacks_is_one_warning():
    """… and what is about no attack stays as it is, colon or not."""
    report = study()
    first, second, *_ = attacks = list(report["runs"][0]["membership"])
    assert len(attacks) > 1
    report["runs"][0]["warnings"] = [
        f"{first}: too few",
        "nobody: too few",
        f"{first}: far too few",
        f"{second}: too few",
        "too many",
    ]
    table = main_table(report)
    assert table.notes == (
        f"{first}, {second}: too few",
        "nobody: too few",
        f"{first}: far too few",
        "too many",
    )
    assert table.rows[0].notes == (1, 2, 3, 4)


def test_a_caution_that_is_about_an_attack_and_in_general_is_said_both_ways():
    report = study()
    first = next(iter(report["runs"][0]["membership"]))
    report["runs"][0]["warnings"] = ["too few", f"{first}: too few"]
    assert main_table(report).notes == ("too few", f"{first}: too few")


def test_every_attack_and_every_fpr_is_listed():
    report = study()
    report["runs"][0]["membership"]["loss"]["tpr_at_fpr"]["0.001"] = {
        "value": 0.1,
        "interval": [0.0, 0.2],
    }
    table = attack_table(report)
    assert [row.name for row in table.rows] == ["free", "free", "eps-8", "eps-8", "eps-2", "eps-2"]
    titles = [column.title.replace("\u00a0", " ") for column in table.columns]
    assert titles == ["attack", "AUC", "TPR at 1 % FPR (%)", "TPR at 0.1 % FPR (%)", "references"]
    assert [row.cells[3].absent for row in table.rows] == [False, True, True, True, True, True]


def test_several_canaries_are_all_listed():
    report = study()
    assert canary_table(report) is None
    first = report["runs"][1]["canary"]
    report["runs"][1]["canaries"] = [first, {"pattern": "call", "repetitions": 10}]
    table = canary_table(report)
    assert [row.name for row in table.rows] == ["free", "eps-8", "eps-8", "eps-2"]
    assert [row.cells[0].value for row in table.rows] == ["pin", "pin", "call", "pin"]
    assert table.rows[2].cells[3].absent
    assert "Every canary" in page(report).seen
    assert "pattern call, 10 copies" in page(report).seen
    assert "### Every canary" in markdown(report)


def test_the_ranks_of_all_trials_are_listed():
    report = study()
    canary = report["runs"][1]["canary"]
    canary["ranks"] = [7]
    assert canary_table(report) is None, "the exposure says it already"
    canary["ranks"] = [1, 2.5, 4321]
    assert [row.cells[-1].value for row in canary_table(report).rows][1] == "1, 2.5, 4321"
    assert "1, 2.5, 4321" in markdown(report)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (write.budget, 7.981, "7.99"),
        (write.budget, 2.0000000000001, "2"),
        (write.budget, 0.50001, "0.501"),
        (write.budget, 1234.5, "1240"),
        (write.budget, 0, "0"),
        (write.bound, 1.999, "1.99"),
        (write.bound, 0.0, "0"),
        (write.percent, 0.934, "93.4"),
        (write.percent, 1e-4, "0.01"),
        (write.percent, 0, "0.0"),
        (write.percent, 0.99999, ">99.9"),
        (write.area, 0.99999, ">0.999"),
        (write.area, 1.0, "1.000"),
        (write.small, 1e-5, "1e-5"),
        (write.small, 7.6e-5, "7.6e-5"),
        (write.small, 0, "0"),
        (write.points, -0.041, "−4.1 points"),
        (write.points, -0.0001, "0.0 points"),
        (write.duration, 71.24, "71.2\u00a0s"),
        (write.duration, 600, "10\u00a0min"),
        (write.duration, 9000, "2.5\u00a0h"),
    ],
)
def test_numbers_are_rounded_to_the_cautious_side(function, value, text):
    assert function(value) == text


# ---- what it says


def test_chance_and_leakage_are_told_apart():
    said = findings(study())
    assert "contains 0.5 at ε = 2" in said.leakage.replace("\u00a0", " ")
    assert "above 0.5 without privacy (lira: AUC 0.700" in said.leakage.replace("\u00a0", " ")
    assert "does not prove that there is none" in said.leakage
    assert "more than chance" in said.leakage
    assert "no more than chance" in said.leakage
    assert said.alarms == ()


def test_costs_are_differences_to_the_run_without_privacy():
    said = findings(study()).cost.replace("\u00a0", " ")
    assert "96.0 % without privacy, 93.0 % at ε = 7.98 (−3.0 points)" in said
    assert "At ε = 7.98 its interval overlaps the one without privacy." in said
    assert "1.1 times as long" in said
    report = study()
    del report["runs"][0]
    assert "points" not in findings(report).cost
    assert "a run without privacy to compare with" in findings(report).trust


def test_a_bound_above_epsilon_is_an_alarm_and_one_below_is_not():
    report = study()
    assert "never exceeds" in findings(report).trust
    assert "A bound of 0 proves nothing" in findings(report).trust
    report["runs"][2]["audit"]["epsilon_lower_bound"] = 2.0
    assert findings(report).alarms == ()
    report["runs"][2]["audit"]["epsilon_lower_bound"] = 2.01
    (alarm,) = findings(report).alarms
    assert "at least 2.01, above the accounted 2" in alarm
    assert "never exceeds" not in findings(report).trust
    shown = page(report)
    assert alarm.replace("\u00a0", " ") in shown.seen.replace("\u00a0", " ")
    assert any("alarm" in (a.get("class") or "") for t, a in shown.tags if t == "span")
    assert "[!CAUTION]" in markdown(report)


def test_a_measurement_above_its_ceiling_is_an_alarm():
    report = study()
    report["runs"][2]["membership"]["lira"] = attack(0.95, tpr=0.4)
    (alarm,) = findings(report).alarms
    assert "AUC at least 0.930 (ceiling 0.881)" in alarm.replace("\u00a0", " ")
    assert "TPR at 1 % FPR at least 20.0 % (ceiling 7.4 %)" in alarm.replace("\u00a0", " ")
    assert "No attack result lies above" not in findings(report).trust


def test_no_ceiling_can_be_exceeded_without_a_guarantee():
    report = study()
    report["runs"][0]["membership"]["lira"] = attack(0.99, half=0.001, tpr=0.9)
    assert findings(report).alarms == ()


def test_a_suspicious_split_and_an_overspent_budget_are_alarms():
    report = study()
    report["data"]["blind"] = {"auc": 0.6, "auc_interval": [0.55, 0.65], "suspicious": True}
    report["runs"][1]["target_epsilon"] = 7.0
    first, second = findings(report).alarms
    assert "without any model" in first
    assert "instead of 7" in second
    assert "look alike" not in findings(report).trust


def test_an_audit_too_small_to_contradict_is_said_to_be_so():
    report = study()
    report["runs"][1]["audit"]["ceiling"] = 5.0
    said = findings(report).trust.replace("\u00a0", " ")
    assert "At ε = 7.98 the audit says little" in said
    report["runs"][0]["audit"]["epsilon_lower_bound"] = 0
    assert "not that training is private" in findings(report).trust


def test_what_nobody_measured_is_listed():
    said = findings(minimal())
    assert said.cost == said.leakage == ""
    assert "membership attacks, an audit of ε, canaries and the blind baseline" in said.trust


def test_runs_of_the_same_epsilon_are_called_by_name():
    report = study()
    report["runs"].append(copy.deepcopy(report["runs"][1]) | {"name": "again"})
    said = findings(report).cost
    assert "in run eps-8" in said
    assert "in run again" in said


# ---- the terminal


def rendered(report, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(report))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_whole_numbers_at_any_width(width):
    report = study()
    report["runs"][0]["name"] = "eps-inf"
    text = rendered(report, width)
    assert "…" not in text
    for number in ("0.700", "7.98", "96.0", "[0.680,", "0.720]", "80.0"):
        assert number in text
    assert max(map(len, text.splitlines())) <= width
    assert all(run["name"] in text for run in report["runs"])


def test_the_terminal_leaves_out_what_nobody_measured_and_shows_alarms():
    assert "AUC" not in rendered(minimal(), 80)
    report = study()
    report["runs"][2]["audit"]["epsilon_lower_bound"] = 3.0
    report["runs"][2]["warnings"] = ["w"]
    text = rendered(report, 100)
    assert "Alarm: At ε" in text
    assert "1 warning: see" in text


def test_the_terminal_interprets_no_markup():
    report = minimal()
    report["runs"][0]["name"] = "[red]x[/red] \x1b[31m"
    text = rendered(report, 80)
    assert "[red]x" in text
    assert "\x1b" not in text


def test_terminal_table_refuses_what_validate_refuses():
    with pytest.raises(ValueError, match=r"runs\[0\].epsilon"):
        terminal_table({"runs": [{"name": "x", "target_epsilon": None, "epsilon": math.inf}]})


# ---- what privacy changed


def changed(report, title):
    """The table of that heading."""
    found = changes(plain(report))
    (table,) = [d.table for d in found.details if d.title.startswith(title)]
    return {row.name: row.cells for row in table.rows}, [c.title for c in table.columns]


def test_the_section_is_in_both_views_and_absent_where_nothing_was_compared():
    title = "What did privacy change"
    assert title in page(study()).seen and title in markdown(study())
    old = study()
    for entry in old["runs"]:
        entry.pop("flips", None)
    assert changes(plain(old)) is None
    assert title not in page(old).seen and title not in markdown(old)
    assert changes(plain(minimal())) is None


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_reports_of_earlier_versions_are_read_as_they_are(path):
    report = json.loads(path.read_text(encoding="utf-8"))
    assert "flips" not in report["runs"][-1]
    assert changes(plain(report)) is None
    assert "What did privacy change" not in page(report).seen + markdown(report)


def test_classes_are_listed_by_what_the_strictest_budget_lost():
    report = study()
    for row, change in zip(
        report["runs"][2]["breakdown"]["intents"], (-0.1, -0.3, -1), strict=True
    ):
        row |= {"change": change, "change_interval": [-1, 1]}
    rows, columns = changed(report, "Intents by what privacy lost")
    assert list(rows) == ["ask", "play"], "the third is asked three times only"
    assert columns[:3] == ["in training", "in the test", "no privacy (%)"]
    assert [cell.value for cell in rows["ask"]] == ["40", "60", "90.0", "90.0", "90.0"]
    assert rows["ask"][-1].details == ("−30.0\u00a0[−100.0,\u00a0+100.0]",)
    said = dict(changes(plain(report)).said)["What is lost"]
    assert "the intent ask (−30.0 points [−100.0,\u00a0+100.0])" in said


def test_of_many_classes_the_worst_are_shown_and_the_others_counted():
    report = study()
    for entry in report["runs"]:
        (first, *_) = entry["breakdown"]["intents"]
        entry["breakdown"]["intents"] = [first | {"name": f"intent {n}"} for n in range(150)]
    rows, _ = changed(report, "Intents by what privacy lost, the worst first, of 150")
    assert len(rows) == 10


def test_flips_stand_beside_their_controls():
    rows, _ = changed(study(), "Flips")
    e8, e2 = "ε\u00a0=\u00a07.98", "ε\u00a0=\u00a02"
    assert list(rows) == [
        *(f"no privacy → {e8}", f"no privacy → {e2}"),
        *("no privacy → again", f"{e8} → again", f"{e2} → again"),
    ]
    assert [cell.value for cell in rows[f"no privacy → {e2}"]] == ["200", "20.0", "1.0", "22.0"]
    said = dict(changes(plain(study())).said)["Which texts flip"]
    assert "another seed alone makes 5.0\u00a0% [3.0,\u00a08.0] wrong" in said
    alone = study()
    for entry in alone["runs"]:
        entry.pop("retrainings")
    said = changes(plain(alone))
    assert "No model was trained again" in dict(said.said)["Which texts flip"]
    assert "Again" not in said.reading


def test_several_retrainings_are_told_apart():
    report = study()
    report["runs"][0]["retrainings"] *= 2
    rows, _ = changed(report, "Flips")
    assert [name for name in rows if name.startswith("no privacy → again")] == [
        *("no privacy → again 1", "no privacy → again 2"),
    ]


def test_calibration_stands_beside_what_chance_shows():
    rows, _ = changed(study(), "Calibration")
    assert [cell.value for cell in rows["no privacy"]] == [
        *("202", "75.0", "81.0", "+6.0", "6.0", "4.0"),
    ]


@pytest.mark.parametrize("key", ["breakdown", "calibration", "retrainings"])
def test_a_section_without_one_measurement_is_written(key):
    report = study()
    for entry in report["runs"]:
        entry.pop(key)
    assert "What did privacy change" in page(report).seen and markdown(report)


def test_the_section_shows_markup_of_users_as_text():
    report = study()
    for entry in report["runs"]:
        for kind in ("intents", "slots"):
            entry["breakdown"][kind][0]["name"] = EVIL
    assert "script" not in [tag for tag, _ in page(report).tags]
    assert "<script>" not in markdown(report)


# ---- groups of people


def grouped(*names, size=50):
    """A study whose test texts belong to groups: three alike, of which each budget harms one."""
    report = study()
    for place, entry in enumerate(report["runs"]):
        rows = [
            {"name": name, "training": 100, "test": size, "right": 0.9, "right_interval": [0.8, 1]}
            for name in names or ("north", "south", "east")
        ]
        rows[0]["right"] = 0.9 - 0.05 * place
        gap = {"highest": rows[1]["name"], "lowest": rows[0]["name"], "gap": 0.05 * place}
        entry["group_gap"] = gap | {"gap_by_chance": 0.08}
        if place:
            for row in rows:
                change = row["right"] - 0.9
                row |= {"change": change, "change_interval": [change - 0.1, change + 0.1]}
            changed = {"change": 0.05 * place, "change_interval": [-0.02, 0.3]}
            entry["group_gap"] |= changed
        entry["breakdown"]["groups"] = rows[::-1]
    return report


def test_groups_are_listed_with_how_far_they_lie_apart():
    rows, columns = changed(grouped(), "Texts by group, the worst first; 50 test texts have no")
    assert list(rows) == [
        *("north", "east", "south", "highest − lowest (points)", "the same by chance (points)"),
    ]
    assert columns[:3] == ["in training", "in the test", "no privacy (%)"]
    assert [cell.value for cell in rows["north"]] == ["100", "50", "90.0", "85.0", "80.0"]
    gaps = rows["highest − lowest (points)"]
    assert [cell.value for cell in gaps] == ["–", "–", "0.0", "5.0", "10.0"]
    assert gaps[-1].details == ("+10.0\u00a0[−2.0,\u00a0+30.0]",)
    said = dict(changes(plain(grouped())).said)["What is lost"]
    assert (
        "At ε\u00a0=\u00a02 accuracy is highest in the group south and lowest in the group north, "
        "10.0 points apart (8.0 by chance); the gap between the best and the worst group changes "
        "by +10.0 points [−2.0,\u00a0+30.0]."
    ) in said
    assert "over texts within groups" in changes(plain(grouped())).reading


def test_small_groups_are_counted_and_of_many_the_worst_are_shown():
    report = grouped()
    for entry in report["runs"]:
        entry["breakdown"]["groups"].append({"name": "west", "test": 9, "right": 1})
    rows, _ = changed(
        report,
        "Texts by group, the worst first; 1 more have fewer than 10 test texts; 41 test texts have",
    )
    assert "west" not in rows
    rows, _ = changed(
        grouped(*map(str, range(12)), size=10), "Texts by group, the worst first, of 12; 80"
    )
    assert len(rows) == 10 + 2 and "0" in rows


def test_without_groups_nothing_is_said_of_them():
    found = changes(plain(study()))
    said = [*map(" ".join, found.said), found.reading, *(d.title for d in found.details)]
    assert "group" not in " ".join(said)
    report = grouped()
    for entry in report["runs"]:
        del entry["group_gap"]  # of groups of which all but one are small
    rows, _ = changed(report, "Texts by group")
    assert list(rows) == ["north", "east", "south"]
    assert "accuracy is highest" not in dict(changes(plain(report)).said)["What is lost"]


def test_a_report_with_groups_is_written_and_shows_their_names_as_text():
    names = (EVIL, "長" * 5_000, "\u200fשלום\u202e")
    report = grouped(*names)
    assert "script" not in [tag for tag, _ in page(report).tags]
    written = markdown(report)
    assert "<script>" not in written and "\u202e" not in written
    said = dict(changes(plain(report)).said)["What is lost"]
    assert "長" * 39 + "…" in said and "長" * 41 not in said
