"""The figures of a report. Each function returns None where the report has nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from attacks.report.figures import budgets, changes, runs, secrets
from attacks.report.figures.axes import to_svg


@dataclass(frozen=True)
class Drawing:
    """A finished figure: the file's name without .svg, its heading, how to read it, the picture."""

    name: str
    title: str
    caption: str
    svg: str


def drawings(report: Mapping[str, Any]) -> list[Drawing]:
    """Return the figures that this report has data for, in reading order.

    Args:
        report: as `attacks.report.contract.validate` accepts it.
    """
    found = []
    for name, (title, caption, draw) in FIGURES.items():
        figure = draw(report)
        if figure is not None:
            found.append(Drawing(name, title, caption, to_svg(figure, title=title)))
    return found


FIGURES: Mapping[str, tuple[str, str, Callable[[Mapping[str, Any]], Figure | None]]] = {
    "leakage": (
        "Leakage by budget",
        "Each dot is the strongest attack on one model, with its interval: at 0.5 it is no better "
        "than guessing, and in the grey it would refute the guarantee; the dashed line is the best "
        "attack on a Gaussian mechanism with the same (ε, δ), a yardstick and no limit.",
        budgets.leakage,
    ),
    "usefulness": (
        "Accuracy by budget",
        "What the model is worth at each budget, with its interval; the distance up to the dashed "
        "line of the same colour, where there is one, is what privacy costs.",
        budgets.usefulness,
    ),
    "roc": (
        "The strongest attack at small false positive rates",
        "The further a curve is above the dotted diagonal on the left, the more members the attack "
        "names with few false alarms; left of the vertical line there are too few non-members to "
        "tell, and bands cover the chance in the members, not that in the threshold.",
        runs.roc,
    ),
    "time": (
        "Training time",
        "Wall-clock time of training on this machine; in brackets, how many times that of ordinary "
        "training.",
        runs.time,
    ),
    "audit": (
        "Audited against accounted ε",
        "A triangle is the ε an audit proves, the bar above it the most this audit could have "
        "proved (square-root axes); "
        "a triangle in the grey would refute the accounted ε.",
        budgets.audit,
    ),
    "exposure": (
        "Exposure of the canary",
        "The further a dot is to the right of chance, the better the model knows the secret; at "
        "the end of the rail it ranks the secret first.",
        runs.exposure,
    ),
    "recovered": (
        "A secret read out of the model",
        "Each row is a position of the secret, its candidates from the likeliest on, darker where "
        "the loss is lower. Bold: recovered by inversion; framed: the token that was in training, "
        "where it is known.",
        secrets.recovered,
    ),
    "losses": (
        "What is lost, by how often training had it",
        "Each dot is an intent (round) or a slot (square), how far its share of right answers is "
        "from that without privacy; below, test texts by how many training texts have their rarest "
        "word, with intervals.",
        changes.losses,
    ),
    "reliability": (
        "Confidence and accuracy",
        "On the dotted diagonal a model is as often right as it is sure; below it the model is too "
        "sure. In the legend the expected calibration error.",
        changes.reliability,
    ),
    "flips": (
        "Flips",
        "Texts that one model gets right and the other wrong, in per cent of the test, with "
        "intervals. Faint: the control, the same training again from another seed.",
        changes.flips,
    ),
}
# They belong to the section about what privacy changed.
OF_CHANGES = ("losses", "reliability", "flips")
