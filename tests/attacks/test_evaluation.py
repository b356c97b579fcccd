import json

import numpy as np
import pytest

from attacks.evaluation import evaluate
from attacks.metrics import auc, auc_interval, operating_point


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    is_member = np.arange(3000) < 1000
    return rng.normal(size=3000) + is_member, is_member


def test_the_entry_has_the_shape_of_the_report(case):
    entry = evaluate(*case, epsilon=8, delta=1e-5).to_dict()
    assert entry == json.loads(json.dumps(entry))
    assert set(entry) == {"auc", "auc_interval", "tpr_at_fpr"}
    assert set(entry["tpr_at_fpr"]) == {"0.01", "0.001"}
    assert set(entry["tpr_at_fpr"]["0.01"]) == {"value", "interval", "ceiling"}


def test_the_numbers_are_those_of_the_metrics(case):
    result = evaluate(*case, fprs=(0.05,), confidence=0.9)
    point = operating_point(*case, fpr=0.05, confidence=0.9)
    assert result.auc == auc(*case)
    assert result.auc_interval == auc_interval(*case, confidence=0.9)
    assert result.tpr_at_fpr["0.05"].value == point.value
    assert result.tpr_at_fpr["0.05"].interval == point.interval
    assert (result.members, result.non_members) == (1000, 2000)


def test_without_a_guarantee_there_is_no_ceiling(case):
    result = evaluate(*case)
    assert result.auc_ceiling is None
    assert "ceiling" not in result.to_dict()["tpr_at_fpr"]["0.01"]


def test_an_unresolved_rate_is_absent_and_the_reason_given(case):
    scores, is_member = case
    result = evaluate(scores[:1500], is_member[:1500])
    assert set(result.to_dict()["tpr_at_fpr"]) == {"0.01"}
    assert any("FPR 0.001 is undefined" in warning for warning in result.warnings)


def test_a_measurement_above_the_ceiling_is_flagged(case):
    scores, is_member = case
    sound = evaluate(scores, is_member, fprs=(0.01,), epsilon=8, delta=1e-5)
    assert sound.warnings == ()
    broken = evaluate(scores, is_member, fprs=(0.01,), epsilon=0.1, delta=1e-5)
    assert [warning.split(" is")[0] for warning in broken.warnings] == ["AUC", "TPR at FPR 0.01"]


def test_a_ceiling_inside_the_interval_is_no_contradiction(case):
    """AUC is about 0.76 here, and (1.13, 0)-privacy allows 0.756."""
    result = evaluate(*case, fprs=(), epsilon=1.13, delta=0.0)
    assert result.auc_interval[0] < result.auc_ceiling < result.auc_interval[1]
    assert result.warnings == ()


def test_half_a_guarantee_is_refused(case):
    with pytest.raises(ValueError, match="together, got 8 and None"):
        evaluate(*case, epsilon=8)
