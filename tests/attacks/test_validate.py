"""What is no measurement becomes no score, no bound and no NaN: a contract over the whole package.

Every public function is listed with a valid call; each of its arguments is then replaced by what
users hand over by mistake. Either one sentence says what was expected, or every number that comes
out is one.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from attacks import (
    auditing,
    blind,
    canaries,
    ceilings,
    evaluation,
    intervals,
    membership,
    metrics,
    patterns,
)
from attacks.inversion import embedding_difference, measures
from attacks.membership import ATTACKS, lira

N, M = 40, 6
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=N)
MEMBERS = np.arange(N) % 2 == 0
REFERENCES = RNG.normal(size=(M, N))
MEMBERSHIP = RNG.random((M, N)) < 0.5
SECRETS = np.array([[1, 2], [3, 4]])
TEXTS = [f"a b{number}" for number in range(N)]

JUDGED = {"scores": SCORES, "is_member": MEMBERS}
SURE = {"confidence": 0.95}
CLAIM = {"epsilon": 1.0, "delta": 1e-5}
PIN = patterns.PATTERNS["pin"]
MOVED = embedding_difference.movement(np.eye(9), np.ones((9, 9)))


@dataclass(frozen=True)
class Call:
    """A public function and arguments that it takes."""

    function: Callable[..., Any]
    arguments: dict[str, Any]


def _attack(name: str) -> Call:
    target, references = ("target_loss", "reference_losses")
    if ATTACKS[name].signal == "logit_margin":
        target, references = ("target", "references")
    arguments = {target: abs(SCORES)}
    if ATTACKS[name].needs_references:
        arguments |= {references: abs(REFERENCES), "membership": MEMBERSHIP}
    return Call(ATTACKS[name].score, arguments)


CALLS = {
    **{name: _attack(name) for name in ATTACKS},
    **{
        f"lira-{mode}-{variance}": Call(
            partial(lira, mode=mode, variance=variance), _attack("lira").arguments
        )
        for mode in ("online", "offline")
        for variance in ("pooled", "per_example")
    },
    "lira": Call(lira, _attack("lira").arguments | {"mode": "online", "variance": "shrunk"}),
    "rmia": Call(membership.rmia, _attack("rmia").arguments | {"mode": "online"}),
    "rmia-scale": Call(membership.rmia, _attack("rmia").arguments | {"offline_scale": 0.3}),
    "loss_threshold": Call(membership.loss_threshold, {"target_loss": SCORES}),
    "one_run": Call(auditing.one_run, JUDGED | SURE | {"delta": 1e-5}),
    "one_run_fdp": Call(auditing.one_run_fdp, JUDGED | SURE | {"delta": 1e-5}),
    "clopper_pearson": Call(
        auditing.clopper_pearson, JUDGED | SURE | {"threshold": 0.0, "delta": 1e-5}
    ),
    "blind_baseline": Call(
        partial(blind.blind_baseline, rng=np.random.default_rng(0)),
        {"texts": TEXTS, "labels": TEXTS, "is_member": MEMBERS, "folds": 2} | SURE,
    ),
    "parse_canary": Call(patterns.parse_canary, {"spec": "pin:4:R=1"}),
    "parse_canaries": Call(patterns.parse_canaries, {"spec": "pin:4:R=1,2"}),
    "draw_secret": Call(
        partial(canaries.draw_secret, np.random.default_rng(0)), {"length": 2, "candidates": 9}
    ),
    "all_secrets": Call(canaries.all_secrets, {"length": 2, "candidates": 9}),
    "secret_index": Call(canaries.secret_index, {"secret": SECRETS[0], "candidates": 9}),
    "canary_tokens": Call(partial(patterns.canary_tokens, PIN), {"secret": SECRETS[0]}),
    "canary_tags": Call(partial(patterns.canary_tags, PIN), {"length": 2}),
    "position_matches": Call(
        measures.position_matches,
        {"guesses": SECRETS, "secrets": SECRETS, "candidates": 9} | SURE,
    ),
    "estimated_exposure": Call(
        measures.estimated_exposure,
        {"loss": -3.0, "reference_losses": np.tile(SCORES, 3) + 0.1, "candidates": 10**4},
    ),
    "guessing_curve": Call(
        measures.guessing_curve, {"ranks": np.arange(1.0, 7.0), "candidates": 9} | SURE
    ),
    "movement": Call(
        embedding_difference.movement, {"trained": REFERENCES, "initial": REFERENCES + 1.0}
    ),
    "most_moved": Call(
        partial(embedding_difference.most_moved, MOVED), {"rows": SECRETS[0], "most": 2}
    ),
    "exposure": Call(canaries.exposure, {"losses": SCORES, "secret_index": 3}),
    "chance_exposure_bits": Call(canaries.chance_exposure_bits, {"candidates": 9}),
    "recovery": Call(
        canaries.recovery, {"guesses": SECRETS, "secrets": SECRETS, "candidates": 9} | SURE
    ),
    "group_epsilon_from_extraction": Call(
        canaries.group_epsilon_from_extraction,
        {"successes": 3, "trials": 5, "candidates": 1000, "delta": 0.0} | SURE,
    ),
    "approximate_dp_ceiling_auc": Call(ceilings.approximate_dp_ceiling_auc, CLAIM),
    "approximate_dp_ceiling_tpr": Call(ceilings.approximate_dp_ceiling_tpr, CLAIM | {"fpr": 0.1}),
    "gaussian_ceiling_auc": Call(ceilings.gaussian_ceiling_auc, CLAIM),
    "gaussian_ceiling_tpr": Call(ceilings.gaussian_ceiling_tpr, CLAIM | {"fpr": 0.1}),
    "gaussian_mu": Call(ceilings.gaussian_mu, CLAIM),
    "gaussian_epsilon": Call(ceilings.gaussian_epsilon, {"mu": 1.0, "delta": 1e-5}),
    "evaluate": Call(evaluation.evaluate, JUDGED | CLAIM | SURE | {"fprs": (0.1,)}),
    "lower_limit": Call(
        intervals.lower_limit, {"successes": [1, 2], "trials": [3, 3], "error": 0.1}
    ),
    "upper_limit": Call(
        intervals.upper_limit, {"successes": [1, 2], "trials": [3, 3], "error": 0.1}
    ),
    "binomial_interval": Call(intervals.binomial_interval, {"successes": 1, "trials": 3} | SURE),
    "paired_interval": Call(
        intervals.paired_interval, {"before": MEMBERS, "after": ~MEMBERS} | SURE
    ),
    "roc": Call(metrics.roc, JUDGED),
    "roc_band": Call(metrics.roc_band, JUDGED | SURE),
    "auc": Call(metrics.auc, JUDGED),
    "auc_interval": Call(metrics.auc_interval, JUDGED | SURE),
    "operating_point": Call(metrics.operating_point, JUDGED | SURE | {"fpr": 0.1}),
    "tpr_at_fpr": Call(metrics.tpr_at_fpr, JUDGED | {"fpr": 0.5}),
    "advantage": Call(metrics.advantage, JUDGED),
    "balanced_accuracy": Call(metrics.balanced_accuracy, JUDGED),
}

# NaN is what they are documented to return for an FPR too fine for the data.
MAY_BE_NAN = ("operating_point", "tpr_at_fpr")
AUDITS = ("one_run", "one_run_fdp", "clopper_pearson", "group_epsilon_from_extraction")

ARGUMENTS = [(name, argument) for name, call in CALLS.items() for argument in call.arguments]


class Unconvertible:
    """What a library may hand over as an array."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise RuntimeError("first\nsecond line")


def hostile(valid: Any) -> list[Any]:
    """What may come in place of a valid argument, right or wrong."""
    numbers = [math.nan, math.inf, -math.inf, 0, 1, -1, 2, 0.5, 2.5, 5e-324, 1e-300, 1e308]
    numbers += [1 - 2**-53, 2**-53, True, False, 10**400, -(10**5000), np.float16(0.5)]
    others = [None, "0.5", "x", b"x", 1 + 0j, np.datetime64(1, "s"), np.timedelta64(1), [], {}, {1}]
    others += [np.array([0.5, 0.5]), [[1, 2], [3]], Unconvertible(), "pin:" + "9" * 5000 + ":R=1"]
    if isinstance(valid, np.ndarray):
        others += _hostile_arrays(valid)
    return numbers + others


def _hostile_arrays(valid: np.ndarray) -> list[Any]:
    values = valid.astype(float)
    with np.errstate(over="ignore", under="ignore"):
        scaled = [values * scale for scale in (1e308, 1e154, 1e-154, 1e-308, 0, -1)]
    replaced = []
    for number in (math.nan, math.inf, -math.inf, 1e308, -1e154, 5e-324):
        replaced.append(values.copy())
        replaced[-1].flat[0] = number
    constant = [np.full_like(values, number) for number in (0, 1, -1e308, math.inf)]
    of_type = [values.astype(kind) for kind in (str, complex, object, bytes, "f2", "g", int)]
    of_type += [(1000 * values).astype(kind) for kind in ("M8[s]", "m8[s]")]
    coins = [values > 0, np.ones(values.shape, bool), np.zeros(values.shape, bool)]
    shapes = [values[:-1], values[:0], values[None], values[..., None], values[0], values.tolist()]
    masked = [np.ma.masked_array(values, mask) for mask in (values == values.flat[0], False)]
    tensors = [torch.tensor(values), torch.tensor(values, requires_grad=True)]
    tensors.append(torch.tensor(values).bfloat16())
    texts = [[None] * len(values), [""] * len(values), ["1.5"] * len(values)]
    return [*scaled, *replaced, *constant, *of_type, *coins, *shapes, *masked, *tensors, *texts]


def _has_nan(result: Any) -> bool:
    if is_dataclass(result):
        return any(_has_nan(getattr(result, field.name)) for field in fields(result))
    if isinstance(result, dict | list | tuple):
        return any(map(_has_nan, result.values() if isinstance(result, dict) else result))
    return not isinstance(result, str) and result is not None and bool(np.isnan(result).any())


def _keeps_the_contract(name: str, arguments: dict[str, Any]) -> bool:
    """Check one call; whether it was answered rather than refused."""
    try:
        result = CALLS[name].function(**arguments)
    except ValueError as refusal:
        assert str(refusal).startswith("Expected "), refusal
        assert "\n" not in str(refusal) and len(str(refusal)) < 400, refusal
        return False
    assert name in MAY_BE_NAN or not _has_nan(result)
    if name in AUDITS:
        assert 0 <= result.epsilon_lower_bound <= result.ceiling < math.inf
    return True


def _public_functions(*modules: ModuleType) -> set[str]:
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_every_public_function_is_held_to_the_contract() -> None:
    modules = (
        *(auditing, blind, canaries, ceilings, evaluation, intervals, membership, metrics),
        *(patterns, measures, embedding_difference),
    )
    assert _public_functions(*modules) <= CALLS.keys()
    assert all(_keeps_the_contract(name, call.arguments) for name, call in CALLS.items())


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.filterwarnings("ignore:TPR at FPR")
def test_what_is_no_measurement_is_refused_in_one_sentence_or_answered_in_numbers(
    name: str, argument: str
) -> None:
    arguments = CALLS[name].arguments
    for value in hostile(arguments[argument]):
        _keeps_the_contract(name, arguments | {argument: value})


NO_NUMBERS = {
    "text": ["1.5"] * N,
    "bytes": [b"1.5"] * N,
    "complex numbers": SCORES + 1j,
    "dates": (1000 * SCORES).astype("M8[s]"),
    "durations": (1000 * SCORES).astype("m8[s]"),
    "objects": SCORES.astype(object),
    "nothing": [None] * N,
    "masked": np.ma.masked_array(SCORES, SCORES > 0),
    "NaN": np.where(SCORES > 0, np.nan, SCORES),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("name", [name for name in CALLS if "scores" in CALLS[name].arguments])
def test_only_real_numbers_are_scores(name: str, kind: str) -> None:
    with pytest.raises(ValueError, match="Expected `scores`"):
        CALLS[name].function(**CALLS[name].arguments | {"scores": NO_NUMBERS[kind]})


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_only_real_numbers_are_signals(name: str, kind: str) -> None:
    call = _attack(name)
    signal = next(iter(call.arguments))
    with pytest.raises(ValueError, match="Expected `target"):
        call.function(*(call.arguments | {signal: NO_NUMBERS[kind]}).values())


@pytest.mark.parametrize("threshold", [math.nan, "0", None, 1 + 0j, np.array([0.0, 1.0])])
def test_no_bound_comes_from_a_threshold_that_is_no_number(threshold: Any) -> None:
    """Nothing reaches NaN and nothing falls short of it: no miss and no alarm would be counted."""
    noise, members = RNG.normal(size=1000), np.arange(1000) % 2 == 0
    with pytest.raises(ValueError, match="Expected `threshold`"):
        auditing.clopper_pearson(noise, members, threshold=threshold, delta=1e-5)
    for infinite in (math.inf, -math.inf):
        found = auditing.clopper_pearson(noise, members, threshold=infinite, delta=1e-5)
        assert found.epsilon_lower_bound == 0


def test_no_bound_comes_from_a_number_of_candidates_that_counts_nothing() -> None:
    for candidates in (math.nan, math.inf, -10, 0, 2.5, "10"):
        with pytest.raises(ValueError, match="Expected `candidates`"):
            canaries.group_epsilon_from_extraction(5, 5, candidates=candidates, delta=0.0)
    huge = canaries.group_epsilon_from_extraction(5, 5, candidates=10**299, delta=0.0)
    assert huge.epsilon_lower_bound == pytest.approx(math.log(0.05 ** (1 / 5)) + 299 * math.log(10))


@pytest.mark.parametrize("power", [-1000, -500, 500, 1000])
@pytest.mark.parametrize("name", [name for name in CALLS if "lira" in name])
def test_lira_does_not_depend_on_the_unit_of_a_signal(name: str, power: int) -> None:
    call = CALLS[name]
    scale = 2.0**power
    expected = call.function(**call.arguments)
    signals = {key: call.arguments[key] * scale for key in ("target", "references")}
    np.testing.assert_allclose(
        call.function(**call.arguments | signals), expected, rtol=1e-6, atol=1e-6
    )


def test_a_target_out_of_all_proportion_is_refused() -> None:
    with pytest.raises(ValueError, match="times as large"):
        lira(SCORES * 1e120, REFERENCES, MEMBERSHIP)


def _wild(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers whose magnitudes have nothing to do with each other."""
    kinds = (
        lambda: rng.normal(size=shape) * 10.0 ** rng.uniform(-320, 308, size=shape),
        lambda: rng.choice([0.0, 1.0, -1.0, 1e308, -1e308, 5e-324], size=shape),
        lambda: rng.normal(size=shape) * 10.0 ** rng.uniform(-300, 300),
        lambda: 1e8 + rng.normal(size=shape) * 1e-6,
        lambda: rng.normal(size=shape),
    )
    return kinds[rng.integers(len(kinds))]()


@pytest.mark.parametrize("signals", [(), (2,)])
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("lira", "rmia"))])
def test_signals_of_wildly_different_magnitudes_keep_the_contract(
    name: str, signals: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        size, models = rng.choice([2, 5, 40]), rng.choice([2, 6, 20])
        arguments = dict(CALLS[name].arguments)
        target, references, membership = list(arguments)[:3]
        with np.errstate(under="ignore"):
            arguments[target] = _wild(rng, (size, *signals))
            arguments[references] = _wild(rng, (models, size, *signals))
        arguments[membership] = rng.random((models, size)) < rng.choice([0.1, 0.5, 0.9])
        _keeps_the_contract(name, arguments)


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64) | st.floats(-3, 3)


@pytest.mark.parametrize("name", [*ATTACKS, *AUDITS[:3], "auc_interval", "evaluate"])
@pytest.mark.filterwarnings("ignore:TPR at FPR")
@settings(max_examples=30)
@given(data=st.data())
def test_random_arrays_keep_the_contract(name: str, data: st.DataObject) -> None:
    _keeps_the_contract(name, _drawn(CALLS[name].arguments, data))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:TPR at FPR")
@settings(max_examples=1000)
@given(data=st.data())
def test_many_random_arrays_keep_the_contract(name: str, data: st.DataObject) -> None:
    _keeps_the_contract(name, _drawn(CALLS[name].arguments, data))


def _drawn(arguments: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """The same arguments with random numbers in each array, and at times in each number."""
    size = data.draw(st.integers(1, 12))
    drawn = {}
    for name, valid in arguments.items():
        if isinstance(valid, np.ndarray) and valid.dtype.kind in "bf":
            elements = FLOATS if valid.dtype.kind == "f" else st.booleans()
            shape = (*valid.shape[:-1], size)
            drawn[name] = data.draw(arrays.arrays(valid.dtype, shape, elements=elements))
        else:
            drawn[name] = data.draw(st.just(valid) | FLOATS) if isinstance(valid, float) else valid
    return drawn
