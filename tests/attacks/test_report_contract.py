"""The contract of report.json: what is refused, and that the message names the place."""

import copy
import math
from types import MappingProxyType

import numpy as np
import pytest

from attacks.report import validate

RUN = {
    "name": "eps-2",
    "target_epsilon": 2.0,
    "epsilon": 1.99,
    "delta": 1e-5,
    "noise_multiplier": 1.1,
    "noise_schedule": "exponential:0.9",
    "constant_noise_multiplier": 0.9,
    "clipping": "per_layer",
    "max_grad_norm": 1.0,
    "sample_rate": 0.02,
    "steps": 500,
    "accountant": "pld",
    "second_accountant": "dp-accounting",
    "second_epsilon": 1.991,
    "adjacency": "add-remove-one",
    "unit": "example",
    "intent_accuracy": 0.9,
    "intent_accuracy_interval": [0.88, 0.92],
    "slot_f1": 0.8,
    "train_seconds": 10.0,
    "overhead": 1.1,
    "membership": {
        "lira": {
            "auc": 0.52,
            "auc_interval": [0.49, 0.55],
            "tpr_at_fpr": {"0.01": {"value": 0.02, "interval": [0.01, 0.04], "ceiling": 0.07}},
            "roc": {"fpr": [0, 1], "tpr": [0, 1], "low": [0, 0.9], "high": [0.1, 1]},
        }
    },
    "canary": {
        "exposure_bits": 2.0,
        "exposure_interval": [1.0, 3.0],
        "available_bits": 13.3,
        "exact_match": 0.0,
        "exact_match_interval": [0.0, 0.2],
        "chance_exact": 1e-4,
        "hamming": 0.9,
        "chance_hamming": 0.9,
    },
    "audit": {"epsilon_lower_bound": 0.4, "confidence": 0.95, "method": "one-run", "ceiling": 5.0},
    "breakdown": {
        "intents": [
            {"name": "play", "training": 20, "test": 9, "right": 0.5, "right_interval": [0.2, 0.8]}
            | {"change": -0.1, "change_interval": [-0.4, 0.1]}
        ],
        "rarest_word": [{"name": "none", "test": 9, "right": 0.5}],
        "groups": [
            {"name": "north", "test": 9, "right": 0.5},
            {"name": "south", "test": 9, "right": 0.75},
        ],
    },
    "group_gap": {
        "highest": "south",
        "lowest": "north",
        "gap": 0.25,
        "gap_by_chance": 0.2,
        "change": 0.1,
        "change_interval": [-0.1, 0.2],
    },
    "calibration": {
        "texts": 9,
        "accuracy": 0.5,
        "mean_confidence": 0.7,
        "overconfidence": 0.2,
        "overconfidence_interval": [-0.1, 0.3],
        "ece": 0.2,
        "ece_interval": [0.1, 0.3],
        "ece_by_chance": 0.1,
        "bins": [{"texts": 9, "confidence": 0.7, "accuracy": 0.5, "accuracy_interval": [0, 1]}],
    },
    "flips": {
        "against": "free",
        "texts": 9,
        "negative": 0.2,
        "negative_interval": [0.1, 0.3],
        "positive": 0.1,
        "disagreement": 0.4,
    },
    "retrainings": [
        {"against": "eps-2", "texts": 9, "negative": 0.0, "positive": 0.0, "disagreement": 0.0}
        | {"train_seconds": 3.0}
    ],
    "warnings": ["few canaries"],
}
FREE = {"name": "free", "target_epsilon": None, "epsilon": None}
REPORT = {
    "schema": 1,
    "title": "A study",
    "data": {
        "train": 100,
        "audit_examples": 50,
        "members": 24,
        "labels_are_public": True,
        "blind": {"auc": 0.5, "auc_interval": [0.4, 0.6], "suspicious": False},
    },
    "machine": {"cores": 2, "gpu": None},
    "study": {"confidence": 0.95, "anything": [1, {"nested": "text"}]},
    "runs": [FREE, RUN],
}


def changed(path, value=None, *, drop=False):
    """A deep copy of the report with one place changed or its key left out."""
    report = copy.deepcopy(REPORT)
    target = report
    for key in path[:-1]:
        target = target[key]
    if drop:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return report


def test_a_report_within_the_contract_passes_unchanged():
    before = copy.deepcopy(REPORT)
    validate(REPORT)
    assert before == REPORT


def test_only_runs_are_required_and_a_run_needs_only_its_name_and_epsilons():
    validate({"runs": [FREE]})


def test_unknown_keys_may_be_added_anywhere():
    validate(changed(["runs", 1, "membership", "lira", "note"], "seen"))
    validate(changed(["extra"], {"of": ["another", "tool", 1.5, True]}))


def test_mappings_and_tuples_are_as_good_as_dictionaries_and_lists():
    validate(MappingProxyType({"runs": (MappingProxyType(FREE),)}))


R, M, C, A = ["runs", 1], ["runs", 1, "membership", "lira"], ["runs", 1, "canary"], "audit"
WRONG = [
    ([*R, "name"], "", "runs[1].name"),
    ([*R, "name"], "free", "runs[1].name"),
    ([*R, "target_epsilon"], -1.0, "runs[1].target_epsilon"),
    ([*R, "epsilon"], "2", "runs[1].epsilon"),
    ([*R, "epsilon"], None, "runs[1].target_epsilon"),
    ([*R, "epsilon"], math.inf, "runs[1].epsilon"),
    ([*R, "epsilon"], True, "runs[1].epsilon"),
    ([*R, "second_epsilon"], -0.1, "runs[1].second_epsilon"),
    ([*R, "second_accountant"], 1, "runs[1].second_accountant"),
    ([*R, "delta"], 1.0, "runs[1].delta"),
    ([*R, "noise_multiplier"], -0.1, "runs[1].noise_multiplier"),
    ([*R, "max_grad_norm"], 0, "runs[1].max_grad_norm"),
    ([*R, "sample_rate"], 1.5, "runs[1].sample_rate"),
    ([*R, "steps"], 1.5, "runs[1].steps"),
    ([*R, "adjacency"], 1, "runs[1].adjacency"),
    ([*R, "intent_accuracy"], 95.0, "runs[1].intent_accuracy"),
    ([*R, "intent_accuracy"], 0.5, "runs[1].intent_accuracy_interval"),
    ([*R, "slot_f1"], None, "runs[1].slot_f1"),
    ([*R, "overhead"], 0, "runs[1].overhead"),
    ([*R, "warnings"], "one", "runs[1].warnings"),
    ([*R, "warnings"], [1], "runs[1].warnings[0]"),
    ([*R, "membership"], [], "runs[1].membership"),
    ([*R, "unheard_of"], None, "runs[1].unheard_of"),
    ([*M, "auc"], math.nan, "runs[1].membership.lira.auc"),
    ([*M, "auc"], 1.1, "runs[1].membership.lira.auc"),
    ([*M, "auc_interval"], [0.6, 0.5], "runs[1].membership.lira.auc_interval"),
    ([*M, "auc_interval"], [0.53, 0.55], "runs[1].membership.lira.auc_interval"),
    ([*M, "auc_interval"], [0.5], "runs[1].membership.lira.auc_interval"),
    ([*M, "auc_interval"], [0.5, 2], "runs[1].membership.lira.auc_interval[1]"),
    ([*M, "tpr_at_fpr"], {"1%": {}}, "runs[1].membership.lira.tpr_at_fpr"),
    ([*M, "tpr_at_fpr"], {"1.0": {}}, "runs[1].membership.lira.tpr_at_fpr"),
    ([*M, "tpr_at_fpr"], {0.01: {}}, "runs[1].membership.lira.tpr_at_fpr"),
    ([*M, "tpr_at_fpr", "0.01", "ceiling"], -1, "tpr_at_fpr.0.01.ceiling"),
    ([*M, "roc", "tpr"], [0], "runs[1].membership.lira.roc.tpr"),
    ([*M, "roc", "tpr"], [0, 0.5, 1], "runs[1].membership.lira.roc"),
    ([*M, "roc", "fpr"], [1, 0], "runs[1].membership.lira.roc.fpr"),
    ([*M, "roc", "low"], [0.5, 0.9], "runs[1].membership.lira.roc.low[0]"),
    ([*C, "exposure_bits"], 14.0, "runs[1].canary.exposure_bits"),
    ([*C, "exposure_interval"], [3.0, 4.0], "runs[1].canary.exposure_interval"),
    ([*C, "hamming"], 1.5, "runs[1].canary.hamming"),
    ([*C, "ranks"], [1, 0.5], "runs[1].canary.ranks[1]"),
    ([*C, "ranks"], [], "runs[1].canary.ranks"),
    ([*C], {"trials": 3, "ranks": [1, 2]}, "runs[1].canary.ranks"),
    ([*R, A, "confidence"], 1, "runs[1].audit.confidence"),
    ([*R, "breakdown", "intents", 0, "test"], -1, "runs[1].breakdown.intents[0].test"),
    ([*R, "breakdown", "intents", 0, "right"], 0.9, "breakdown.intents[0].right_interval"),
    ([*R, "breakdown", "intents", 0, "change"], -2, "runs[1].breakdown.intents[0].change"),
    ([*R, "breakdown", "intents", 0, "change"], 0.5, "breakdown.intents[0].change_interval"),
    ([*R, "breakdown", "rarest_word", 0, "name"], "", "breakdown.rarest_word[0].name"),
    ([*R, "breakdown", "groups", 0, "right"], "most", "runs[1].breakdown.groups[0].right"),
    ([*R, "breakdown", "groups", 0, "right"], 0.4, "runs[1].group_gap.gap"),
    ([*R, "group_gap", "gap"], -0.25, "runs[1].group_gap.gap"),
    ([*R, "group_gap", "lowest"], "nowhere", "runs[1].group_gap.lowest"),
    ([*R, "group_gap", "highest"], ["south"], "runs[1].group_gap.highest"),
    ([*R, "group_gap", "change"], 0.3, "runs[1].group_gap.change_interval"),
    ([*R, "group_gap", "gap_by_chance"], 2, "runs[1].group_gap.gap_by_chance"),
    ([*R, "breakdown", "groups"], [], "runs[1].group_gap.highest"),
    ([*R, "calibration", "ece"], 0.5, "runs[1].calibration.ece_interval"),
    ([*R, "calibration", "overconfidence"], 1.5, "runs[1].calibration.overconfidence"),
    ([*R, "calibration", "bins", 0, "accuracy"], 2, "runs[1].calibration.bins[0].accuracy"),
    ([*R, "flips", "negative"], 0.35, "runs[1].flips.negative_interval"),
    ([*R, "flips", "positive"], 0.45, "runs[1].flips.positive"),
    ([*R, "flips", "against"], None, "runs[1].flips.against"),
    ([*R, "retrainings", 0, "train_seconds"], -1, "runs[1].retrainings[0].train_seconds"),
    ([*R, A, "epsilon_lower_bound"], 6.0, "runs[1].audit.epsilon_lower_bound"),
    (["runs"], [], "runs"),
    (["runs"], {}, "runs"),
    (["runs"], [None], "runs[0]"),
    (["schema"], 2, "schema"),
    (["title"], 5, "title"),
    (["data", "train"], -1, "data.train"),
    (["data", "members"], 51, "data.members"),
    (["data", "blind", "suspicious"], "no", "data.blind.suspicious"),
    (["study", "confidence"], 95, "study.confidence"),
    (["study", "x"], math.nan, "study.x"),
    (["study", "x"], np.int64(3), "study.x"),
    (["study", "x"], np.zeros(2), "study.x"),
    (["study", "x"], {1: 2}, "study.x"),
    (["title"], "broken \ud800", "title"),
]


@pytest.mark.parametrize(("path", "value", "place"), WRONG)
def test_an_offence_is_refused_with_its_place(path, value, place):
    with pytest.raises(ValueError, match=r"^Expected `") as error:
        validate(changed(path, value))
    named = str(error.value).split("`")[1]
    assert named.endswith(place), str(error.value)
    assert ", got " in str(error.value) and str(error.value).endswith(".")


MISSING = [
    (["runs"], "runs"),
    (["runs", 0, "name"], "runs[0].name"),
    (["runs", 0, "epsilon"], "runs[0].epsilon"),
    (["runs", 0, "target_epsilon"], "runs[0].target_epsilon"),
    ([*R, "delta"], "runs[1].delta"),
    ([*R, "intent_accuracy"], "runs[1].intent_accuracy_interval"),
    ([*M, "auc"], "runs[1].membership.lira.auc"),
    ([*M, "auc_interval"], "runs[1].membership.lira.auc_interval"),
    ([*M, "tpr_at_fpr", "0.01", "interval"], "tpr_at_fpr.0.01.interval"),
    ([*M, "roc", "high"], "runs[1].membership.lira.roc.high"),
    ([*R, "breakdown"], "runs[1].group_gap.highest"),
    ([*R, "group_gap", "gap"], "runs[1].group_gap.gap"),
    ([*R, "group_gap", "change"], "runs[1].group_gap.change_interval"),
    ([*C, "available_bits"], "runs[1].canary.available_bits"),
    ([*C, "exact_match_interval"], "runs[1].canary.exact_match_interval"),
    ([*C, "chance_exact"], "runs[1].canary.chance_exact"),
    ([*C, "chance_hamming"], "runs[1].canary.chance_hamming"),
    ([*R, A, "method"], "runs[1].audit.method"),
    (["data", "blind", "suspicious"], "data.blind.suspicious"),
]


@pytest.mark.parametrize(("path", "place"), MISSING)
def test_a_missing_key_is_named(path, place):
    with pytest.raises(ValueError, match=r"^Expected `") as error:
        validate(changed(path, drop=True))
    assert str(error.value).split("`")[1].endswith(place), str(error.value)


OPTIONAL = [
    ["data"],
    ["machine"],
    *([*R, key] for key in ("membership", "canary", "audit", "warnings", "slot_f1", "overhead")),
    [*M, "tpr_at_fpr"],
    [*M, "roc"],
    [*M, "tpr_at_fpr", "0.01", "ceiling"],
    [*C, "exposure_interval"],
    [*R, "group_gap"],
    [*R, "group_gap", "gap_by_chance"],
    [*R, "group_gap", "change_interval"],
    [*R, A, "ceiling"],
]


@pytest.mark.parametrize("path", OPTIONAL)
def test_what_was_not_measured_may_be_absent(path):
    validate(changed(path, drop=True))


def test_something_that_is_no_report_is_refused():
    with pytest.raises(ValueError, match="`report`"):
        validate([RUN])
