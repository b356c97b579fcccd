"""A report as one HTML file that opens offline: no scripts, nothing fetched, figures inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from attacks.report import notes
from attacks.report.changes import changes
from attacks.report.figures import OF_CHANGES, Drawing
from attacks.report.figures.axes import COLOURS, inline_svg
from attacks.report.findings import findings
from attacks.report.runs import clean
from attacks.report.table import attack_table, canary_table, main_table, mechanism_table

TEMPLATE = "report.html.jinja"


def to_html(report: Mapping[str, Any], drawings: Sequence[Drawing]) -> str:
    """Return the page.

    Guarantee: text of the report is shown, never interpreted as markup, and the page loads nothing
    from anywhere (its content security policy forbids it).

    Args:
        report: as `attacks.report.contract.validate` accepts it.
        drawings: the figures, in reading order.
    """
    source = resources.files("attacks.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        title=clean(report.get("title", "")) or "Leakage report",
        created=clean(report.get("created", "")),
        command=notes.command(report),
        findings=findings(report),
        main=main_table(report),
        attacks=attack_table(report),
        canaries=canary_table(report),
        mechanisms=mechanism_table(report),
        figures=[(item, _inline(item)) for item in drawings if item.name not in OF_CHANGES],
        changes=changes(report),
        pictures=[(item, _inline(item)) for item in drawings if item.name in OF_CHANGES],
        facts_known=notes.data_facts(report) + notes.setup_facts(report),
        machine=notes.machine_facts(report),
        meanings=notes.MEANINGS,
        legend=notes.legend(report),
        limits=notes.limits(report),
        colours=COLOURS,
    )


def _inline(drawing: Drawing) -> Markup:
    """The picture as part of the page; matplotlib has escaped the text within."""
    return Markup(inline_svg(drawing.svg, prefix=drawing.name))
