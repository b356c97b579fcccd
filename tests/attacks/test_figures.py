"""Figures: the data on the axes, not the pixels; and SVG that stands alone."""

import re
import warnings
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import colors

from attacks.ceilings import approximate_dp_ceiling_auc, gaussian_ceiling_auc
from attacks.report.figures import FIGURES, OF_CHANGES, drawings
from attacks.report.figures import axes as look
from attacks.report.figures import budgets as by_budget
from attacks.report.figures import changes as by_change
from attacks.report.figures import runs as by_run
from tests.attacks.subjects import compared_with

SVG = "{http://www.w3.org/2000/svg}"


def attack(auc, roc=None):
    entry = {"auc": auc, "auc_interval": [auc - 0.02, min(1.0, auc + 0.03)]}
    return entry if roc is None else entry | {"roc": roc}


def curve(points=101):
    fpr = np.linspace(0, 1, points)
    tpr = np.sqrt(fpr)
    low, high = np.maximum(tpr - 0.1, 0), np.minimum(tpr + 0.1, 1)
    return {
        key: values.tolist()
        for key, values in {"fpr": fpr, "tpr": tpr, "low": low, "high": high}.items()
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


def run(name, epsilon, auc, **others):
    entry = {"name": name, "target_epsilon": epsilon, "epsilon": epsilon}
    entry |= {} if epsilon is None else {"delta": 1e-5, "overhead": 1.25}
    entry |= {
        "intent_accuracy": 0.9,
        "intent_accuracy_interval": [0.87, 0.92],
        "slot_f1": 0.8,
        "train_seconds": 60.0,
        "membership": {"lira": attack(auc, curve()), "loss": attack(0.5)},
        "audit": {
            "epsilon_lower_bound": 0.5,
            "confidence": 0.95,
            "method": "one-run",
            "ceiling": 6.0,
        },
        "canary": {
            "exposure_bits": 3.0,
            "available_bits": 13.3,
            "chance_exposure_bits": 1.4,
            "exposure_interval": [2.0, 4.5],
            "example": EXAMPLE,
        },
    }
    return entry | others


def study():
    data = {"audit_examples": 3000, "members": 1000}
    runs = [
        run("free", None, 0.7, **compared_with(None)),
        run("a", 2.0, 0.51, **compared_with("free", lost=0.2)),
        run("b", 8, 0.55, **compared_with("free", lost=0.1)),
    ]
    return {"data": data, "runs": runs}


def without(*keys, report=None):
    report = report or study()
    for entry in report["runs"]:
        for key in keys:
            entry.pop(key, None)
    return report


def points(axes, marker):
    """The places of all markers of one shape, from left to right."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return sorted(tuple(map(float, xy)) for line in lines for xy in line.get_xydata())


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


# ---- data


def test_leakage_shows_each_auc_at_its_epsilon_and_infinity_on_the_right():
    (axes,) = by_budget.leakage(study()).axes
    *private, free = points(axes, "o")
    assert private == [(2.0, 0.51), (8.0, 0.55)]
    assert free[1] == 0.7
    assert 8 < free[0] < axes.get_xlim()[1]
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "∞"
    assert axes.get_xticks()[-1] == free[0]


def test_leakage_shows_the_whole_interval():
    (axes,) = by_budget.leakage(study()).axes
    bars = [segment for bar in axes.collections for segment in _segments(bar) if len(segment) == 2]
    ends = {(round(float(low), 3), round(float(high), 3)) for (_, low), (_, high) in bars}
    assert {(0.49, 0.54), (0.53, 0.58), (0.68, 0.73)} <= ends
    assert axes.get_ylim()[0] < 0.45


def _segments(collection):
    return getattr(collection, "get_segments", list)()


def test_leakage_shows_both_ceilings_of_the_largest_delta():
    report = study()
    report["runs"][1]["delta"] = 1e-3
    (axes,) = by_budget.leakage(report).axes
    for label, ceiling in (
        ("(ε, δ) ceiling", approximate_dp_ceiling_auc),
        ("Gaussian ceiling", gaussian_ceiling_auc),
    ):
        x, y = line(axes, label).get_data()
        assert x[0] == axes.get_xlim()[0]
        assert y == pytest.approx([ceiling(epsilon, 1e-3) for epsilon in x])


def test_no_gaussian_ceiling_for_pure_privacy():
    report = study()
    for entry in report["runs"][1:]:
        entry["delta"] = 0
    (axes,) = by_budget.leakage(report).axes
    assert "Gaussian ceiling" not in [line.get_label() for line in axes.lines]


def test_runs_of_the_same_epsilon_stand_side_by_side():
    report = study()
    report["runs"][1]["epsilon"] = 8
    (axes,) = by_budget.leakage(report).axes
    (one, _), (other, _), _ = points(axes, "o")
    assert one < 8 < other
    assert one * other == pytest.approx(64)


def test_usefulness_shows_per_cent_and_the_run_without_privacy_as_dashed_lines():
    (axes,) = by_budget.usefulness(study()).axes
    assert points(axes, "o") == [(2.0, 90.0), (8.0, 90.0)]
    assert points(axes, "s") == [(2.0, 80.0), (8.0, 80.0)]
    dashed = {float(line.get_ydata()[0]) for line in axes.lines if line.is_dashed()}
    assert dashed == {90.0, 80.0}
    assert {"slot F1", "intent\naccuracy", "without privacy"} <= _texts(axes)
    (axes,) = by_budget.usefulness(without("slot_f1")).axes
    assert "slot F1" not in _texts(axes)


def _texts(axes):
    return {text.get_text() for text in axes.texts}


def test_roc_shows_steps_the_diagonal_and_the_resolution_limit():
    (axes,) = by_run.roc(study()).axes
    shown = {line.get_label(): line for line in axes.lines}
    assert {"no privacy", "ε\u00a0=\u00a02", "ε\u00a0=\u00a08"} <= set(shown)
    x, y = shown["no privacy"].get_data()
    assert y == pytest.approx(np.sqrt(x))
    assert shown["no privacy"].get_drawstyle() == "steps-post"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    diagonal = shown["_guessing"]
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert any(line.get_xdata()[0] == pytest.approx(1 / 2000) for line in axes.lines)
    assert any("2,000" in text for text in _texts(axes))
    assert len(axes.collections) == 3


@pytest.mark.parametrize(
    ("data", "non_members", "limit"),
    [
        ({}, None, 1 / 100),
        ({}, 400, 1 / 400),
        ({"audit_examples": 50, "members": 10}, None, 1 / 40),
    ],
)
def test_the_resolution_limit_is_one_of_the_non_members(data, non_members, limit):
    report = study() | {"data": data}
    if non_members:
        report["runs"][0]["membership"]["lira"]["non_members"] = non_members
    (axes,) = by_run.roc(report).axes
    assert any(line.get_xdata()[0] == pytest.approx(limit) for line in axes.lines)


def test_a_long_roc_is_thinned_but_keeps_its_ends_and_shape():
    report = study()
    report["runs"] = report["runs"][:1]
    report["runs"][0]["membership"]["lira"]["roc"] = curve(20_001)
    (axes,) = by_run.roc(report).axes
    x, y = line(axes, "no privacy").get_data()
    assert len(x) <= by_run.ROC_POINTS
    assert (x[0], x[-1]) == (1 / 20_000, 1)
    assert y == pytest.approx(np.sqrt(x))


def test_a_roc_that_starts_high_and_rates_of_zero_are_drawn():
    report = study()
    report["runs"][0]["membership"]["lira"]["roc"] = {
        "fpr": [0, 0, 0, 1],
        "tpr": [0, 0.5, 0.9, 1],
        "low": [0, 0, 0, 0],
        "high": [1, 1, 1, 1],
    }
    (axes,) = by_run.roc(report).axes
    assert (np.array(line(axes, "no privacy").get_ydata()) > 0).all()


def test_curves_without_privacy_have_their_own_colour_and_all_differ():
    report = study()
    report["runs"] += [run(f"r{e}", e, 0.5) for e in (0.5, 1, 3, 4, 16)]
    (axes,) = by_run.roc(report).axes
    looks = [
        (line.get_color(), line.is_dashed()) for line in axes.lines if line.get_label()[0] != "_"
    ]
    assert len(set(looks)) == 8
    assert [colour for colour, _ in looks].count(look.UNLIMITED) == 1


def test_time_shows_seconds_and_the_overhead_of_private_runs():
    report = study()
    report["runs"][1]["train_seconds"] = 75.0
    (axes,) = by_run.time(report).axes
    assert [bar.get_width() for bar in axes.patches] == [60, 60, 75]
    names = [label.get_text().replace("\u00a0", " ") for label in axes.get_yticklabels()]
    assert names == ["no privacy", "ε = 8", "ε = 2"]
    assert {"60\u00a0s", "75\u00a0s  (1.25×)"} <= _texts(axes)


def test_audit_shows_bounds_ceilings_and_the_identity():
    report = study()
    report["runs"][1]["audit"] |= {"epsilon_lower_bound": 1.5, "ceiling": 1.75}
    (axes,) = by_budget.audit(report).axes
    assert points(axes, "^")[:2] == [(2.0, 1.5), (8.0, 0.5)]
    assert points(axes, "_")[:2] == [(2.0, 1.75), (8.0, 6.0)]
    assert points(axes, "^")[2][0] > 8
    x, y = line(axes, "bound = ε").get_data()
    assert list(x) == list(y)
    assert axes.get_ylim()[1] > 8


def test_exposure_shows_bits_between_nothing_and_all():
    (axes,) = by_run.exposure(study()).axes
    assert points(axes, "o") == [(3.0, 0), (3.0, 1), (3.0, 2)]
    assert {(1.4, row) for row in range(3)} <= set(points(axes, "|"))
    assert {(end, row) for end in (2.0, 4.5) for row in range(3)} <= set(points(axes, "|"))
    assert {"chance", "all bits"} <= _texts(axes)
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 13.3


# ---- what is not there


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        (("membership",), {"usefulness", "time", "audit", "exposure", "recovered"}),
        (("audit", "canary"), {"leakage", "usefulness", "roc", "time"}),
        (
            ("intent_accuracy", "slot_f1", "train_seconds"),
            {"leakage", "roc", "audit", "exposure", "recovered"},
        ),
    ],
)
def test_figures_without_data_are_left_out(keys, left):
    assert {drawing.name for drawing in drawings(without(*keys, "flips"))} == left


def test_a_single_run_has_no_figures_that_compare():
    report = study()
    report["runs"] = report["runs"][:1]
    assert {drawing.name for drawing in drawings(report)} == {"roc", "exposure", "recovered"}
    report["runs"] = study()["runs"][1:2]
    names = {drawing.name for drawing in drawings(report)}
    assert names == {"leakage", "roc", "audit", "exposure", "recovered"}


def test_optional_parts_may_be_missing():
    report = study()
    for entry in report["runs"]:
        del entry["audit"]["ceiling"], entry["intent_accuracy_interval"]
        del entry["canary"]["exposure_interval"], entry["canary"]["chance_exposure_bits"]
        entry.pop("overhead", None)
    assert {drawing.name for drawing in drawings(report)} == set(FIGURES)


def texts_of(drawing):
    root = ElementTree.fromstring(drawing.svg)
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def test_a_recovered_secret_is_drawn_with_all_its_candidates():
    report = study()
    report["runs"] = report["runs"][:1]
    (drawing,) = (one for one in drawings(report) if one.name == "recovered")
    shown = texts_of(drawing)
    assert [text for text in shown if text in ("3", "5", "7", "1", "<b>$x$")] == [
        "1",  # the number of the first position
        *("3", "5"),
        *("7", "1", "<b>$x$"),
    ]
    assert "no privacy, my pin code is: 3 <b>$x$ → 3 7" in shown


def test_a_secret_may_be_recovered_without_a_truth_to_compare_with():
    entry = {key: value for key, value in EXAMPLE.items() if key != "original"}
    report = {"runs": [{"name": "a", "target_epsilon": None, "epsilon": None}]}
    report["runs"][0]["recovered"] = [entry]
    (drawing,) = drawings(report)
    assert "no privacy, my pin code is: 3 7" in texts_of(drawing)
    report["runs"][0]["recovered"] = [entry] * 50
    (many,) = drawings(report)
    assert len(many.svg) < 20 * len(drawing.svg), "as many as can be seen"


@pytest.mark.parametrize("epsilons", [(0.0, 1.0), (0.001, 0.002), (1e4, 1e5), (1, 1)])
def test_any_budget_is_drawn(epsilons):
    report = study()
    for entry, epsilon in zip(report["runs"][1:], epsilons, strict=True):
        entry["epsilon"] = epsilon
    _check_svgs(drawings(report))


# ---- files


def _check_svgs(drawn):
    """Every coordinate is a number, and none is far outside."""
    for drawing in drawn:
        for element in ElementTree.fromstring(drawing.svg).iter():
            for name in ("d", "x", "y", "transform", "width", "height"):
                value = element.get(name, "")
                assert not re.search("nan|inf", value, flags=re.I), (drawing.name, value)
                numbers = re.findall(r"[-+]?[\d.]+(?:e[-+]?\d+)?", value)
                assert all(abs(float(number)) < 1e5 for number in numbers), (drawing.name, value)


def test_svgs_stand_alone_with_text_as_text():
    drawn = drawings(study())
    assert [drawing.name for drawing in drawn] == list(FIGURES)
    _check_svgs(drawn)
    for drawing in drawn:
        root = ElementTree.fromstring(drawing.svg)
        assert root.find(f"{SVG}title").text == drawing.title
        assert len(list(root.iter(f"{SVG}text"))) > 3
        assert "<!DOCTYPE" not in drawing.svg
        links = set(re.findall(r"https?://[^\"'<\s]+", drawing.svg))
        assert links == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
        assert drawing.caption.endswith(".")


def test_the_same_report_gives_the_same_bytes_whatever_the_settings():
    before = [drawing.svg for drawing in drawings(study())]
    changes = {"font.size": 30.0, "svg.hashsalt": "mine", "axes.grid": True, "text.usetex": True}
    with matplotlib.rc_context(changes):
        assert [drawing.svg for drawing in drawings(study())] == before
    assert matplotlib.rcParams["svg.fonttype"] == matplotlib.rcParamsDefault["svg.fonttype"]


def test_no_colour_is_outside_the_palette():
    palette = {light for light, _ in look.COLOURS.values()}
    for drawing in drawings(study()):
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing.svg)) <= palette


def test_letters_are_readable_at_600_pixels():
    scale = 600 / (look.WIDTH * 72)
    for drawing in drawings(study()):
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", drawing.svg)]
        assert min(sizes) * scale >= 12


def _luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_text_has_contrast_on_both_papers():
    """WCAG 2 asks for a ratio of 4.5."""
    for mode in (0, 1):
        paper = _luminance(colors.to_rgb(look.COLOURS["paper"][mode]))
        for name in ("ink", "muted"):
            text = _luminance(colors.to_rgb(look.COLOURS[name][mode]))
            bright, dark = max(text, paper), min(text, paper)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_names_are_text_and_no_formula():
    report = study()
    for entry in report["runs"][1:]:
        entry |= {"name": f"$x^{{2}}$ <b> 漢 \x1b\n{entry['name']}", "epsilon": 3.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = {drawing.name: drawing.svg for drawing in drawings(report)}
    texts = [text.text for text in ElementTree.fromstring(drawn["time"]).iter(f"{SVG}text")]
    assert "$x^{2}$ <b> 漢 a" in texts


def test_inlined_pictures_share_neither_ids_nor_colours():
    drawing = drawings(study())[0]
    inlined = look.inline_svg(drawing.svg, prefix="p")
    ElementTree.fromstring(inlined)
    assert not re.findall(r"#[0-9a-f]{6}\b", inlined)
    assert all(name.startswith("p-") for name in re.findall(r'\bid="([^"]+)"', inlined))
    assert all(name.startswith("p-") for name in re.findall(r'href="#([^"]+)"', inlined))
    assert "<style" not in inlined


def test_text_that_looks_like_a_colour_is_left_alone():
    report = study()
    for entry in report["runs"][1:]:
        entry |= {"name": f"{look.BLUE} 1.23456 {entry['name']}", "epsilon": 3.0}
    svg = {drawing.name: drawing.svg for drawing in drawings(report)}["time"]
    assert f">{look.BLUE} 1.23456 a<" in look.inline_svg(svg, prefix="p")


# ---- what privacy changed


def test_losses_show_every_class_that_the_test_asks_often_over_its_training_frequency():
    above, _ = by_change.losses(study()).axes
    rounds = points(above, "o")
    assert rounds == [(40, -20), (40, -10), (2000, -20), (2000, -10)], "three in the test: too few"
    assert points(above, "s") == [(0.5, -20), (0.5, -10), (700, -20), (700, -10)]
    assert {"play", "city", "song"} & _texts(above) and "rare" not in _texts(above)
    assert above.get_xscale() == "log"


def test_losses_by_rare_words_have_intervals_and_counts():
    _, below = by_change.losses(study()).axes
    assert [label.get_text() for label in below.get_xticklabels()] == [
        f"{name}\n50 texts" for name in ("none", "1 to 4", "over 99")
    ]
    ends = {
        (round(float(low)), round(float(high)))
        for bar in below.collections
        for (_, low), (_, high) in _segments(bar)
    }
    assert ends == {(-20, 1), (-40, 1)}


def test_reliability_shows_accuracy_over_confidence_but_for_bins_of_few_texts():
    (axes,) = by_change.reliability(study()).axes
    assert points(axes, "o") == [(50, 40)] * 3 + [(90, 85)] * 3
    diagonal = line(axes, "_perfect")
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [f"{name}: error 6.0\u00a0%" for name in ("no privacy", E8, E2)]


E8, E2 = "ε\u00a0=\u00a08", "ε\u00a0=\u00a02"


def test_flips_stand_left_and_right_of_nothing_with_their_controls_below():
    (axes,) = by_change.flips(study()).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        *(f"no privacy → {E8}", f"no privacy → {E2}"),
        *("no privacy → again", f"{E8} → again", f"{E2} → again"),
    ]
    bars = [(round(bar.get_y() + 0.25), bar.get_width()) for bar in axes.patches]
    assert bars[:4] == [(0, -10), (0, 1), (1, -20), (1, 1)]
    assert {"10.0\u00a0%", "20.0\u00a0%", "1.0\u00a0%"} <= _texts(axes)
    assert {bar.get_alpha() for bar in axes.patches[:4]} == {1}
    assert {bar.get_alpha() for bar in axes.patches[4:]} == {0.4}


@pytest.mark.parametrize("key", ["breakdown", "calibration", "retrainings", "flips"])
def test_a_change_that_was_not_measured_is_not_drawn(key):
    drawn = {drawing.name for drawing in drawings(without(key))} & set(OF_CHANGES)
    lost = {"breakdown": {"losses"}, "calibration": {"reliability"}, "flips": set(OF_CHANGES)}
    assert drawn == set(OF_CHANGES) - lost.get(key, set())
    if key == "retrainings":
        (axes,) = by_change.flips(without(key)).axes
        assert len(axes.get_yticklabels()) == 2


def test_changes_that_are_nothing_at_all_are_drawn():
    report = study()
    for entry in report["runs"]:
        for flips in (entry.get("flips", {}), *entry["retrainings"]):
            for key in ("negative", "positive", "disagreement"):
                flips.pop(f"{key}_interval", None)
                flips[key] = 0.0
        for rows in entry["breakdown"].values():
            for row in rows:
                row.pop("change_interval", None)
                row.update({"change": 0.0, "training": 0} if "change" in row else {"training": 0})
    assert len(drawings(report)) == len(FIGURES)
