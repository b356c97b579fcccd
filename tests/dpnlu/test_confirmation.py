"""ε by two accountants: where they agree, and what happens where they do not."""

import math
from dataclasses import replace
from itertools import product

import pytest

from dpnlu.accounting import confirmation
from dpnlu.accounting.accountants import ACCOUNTANTS, epsilon
from dpnlu.accounting.confirmation import (
    SLACK,
    SecondOpinion,
    UnconfirmedError,
    confirm,
    second_opinion,
)
from dpnlu.accounting.events import SampledGaussian
from dpnlu.cli.main import main
from dpnlu.compare.reporting import _second_opinion
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs.model_card import _rounded_up, privacy_statement
from dpnlu.runs.model_directory import is_model

DELTA = 1e-5
COMMON = [SampledGaussian(noise_multiplier=0.858, sample_rate=0.0391, steps=511)]
# Too many steps for the digits of `dp-accounting` at a δ of 1e-9.
LONG = [SampledGaussian(noise_multiplier=1.0, sample_rate=1e-3, steps=100_000)]
GRID = list(
    product(
        (0.5, 0.7, 1.0, 2.0, 5.0, 10.0),
        (1e-4, 1e-3, 1e-2, 0.1, 1.0),
        (1, 100, 10_000, 100_000),
        (1e-9, 1e-6, 1e-3),
    )
)


def _agree(sigma: float, rate: float, steps: int, delta: float) -> str | None:
    """Whose second opinion was heard; it must not differ by more than the slack, above or below."""
    events = [SampledGaussian(noise_multiplier=sigma, sample_rate=rate, steps=steps)]
    ours, second = epsilon(events, delta=delta), second_opinion(events, delta=delta)
    if second is None:
        return None
    slack = SLACK[second.accountant].of(ours)
    assert abs(second.epsilon - ours) <= slack, (sigma, rate, steps, delta)
    return second.accountant


def test_the_second_accountant_agrees_where_models_are_trained():
    heard = [
        _agree(sigma, rate, steps, delta)
        for sigma, rate in ((0.6, 0.01), (1.0, 0.04), (2.0, 0.1), (5.0, 1e-3))
        for steps, delta in ((1, 1e-3), (500, 1e-5), (10_000, 1e-9))
    ]
    assert heard == ["dp-accounting"] * 12


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_the_second_accountant_agrees_on_the_whole_grid(part):
    """… and is heard all over it, but where ε is far beyond use."""
    for question in GRID[part::8]:
        if _agree(*question) is None:
            sigma, rate, steps, delta = question
            event = SampledGaussian(noise_multiplier=sigma, sample_rate=rate, steps=steps)
            assert epsilon([event], delta=delta) > (50 if steps / delta >= 1e14 else 500), question


def test_an_epsilon_beyond_use_is_not_asked_about():
    """At 725 dp-accounting divides by what is no longer a normal number."""
    loud = [SampledGaussian(noise_multiplier=0.5, sample_rate=0.1, steps=10_000)]
    assert epsilon(loud, delta=1e-3) > 500
    assert second_opinion(loud, delta=1e-3) is None


@pytest.mark.parametrize(
    ("events", "delta", "name"), [(COMMON, DELTA, "dp-accounting"), (LONG, 1e-9, "prv")]
)
def test_an_epsilon_too_small_by_more_than_the_slack_is_refused(events, delta, name):
    ours = epsilon(events, delta=delta)
    second = confirm(ours, events, delta=delta)
    assert second == SecondOpinion(
        accountant=name, epsilon=epsilon(events, delta=delta, accountant=name)
    )
    slack = SLACK[name].of(ours)
    assert confirm(second.epsilon - 0.9 * slack, events, delta=delta) == second
    with pytest.raises(UnconfirmedError, match=f"Expected {name} to confirm ε"):
        confirm(second.epsilon - 1.1 * slack, events, delta=delta)
    assert slack < 0.03 * ours, "the test would see an ε that is too small by a few per cent"


def test_an_epsilon_that_is_larger_is_confirmed():
    assert confirm(100.0, COMMON, delta=DELTA) is not None


@pytest.mark.parametrize("mistake", [0.95, 0.5, 0.0])
def test_an_accountant_of_ours_that_says_too_little_is_found_out(monkeypatch, make_plan, mistake):
    """Neither the model card nor the report states its ε."""
    plan, right = make_plan(), ACCOUNTANTS["pld"]
    ledger = Ledger(plan)
    for step in range(plan.steps):
        ledger.append(plan.event_at(step))
    stated = privacy_statement(plan, ledger)
    second = ledger.confirmed()
    assert f"dp-accounting says ε = {_rounded_up(second.epsilon)}" in stated
    expected = {"second_accountant": "dp-accounting", "second_epsilon": second.epsilon}
    told = {"steps": plan.steps, "delta": plan.target_delta}
    assert _second_opinion(plan, ledger.epsilon(), **told) == expected
    monkeypatch.setitem(ACCOUNTANTS, "pld", lambda events, delta: mistake * right(events, delta))
    with pytest.raises(UnconfirmedError):
        privacy_statement(plan, ledger)
    with pytest.raises(UnconfirmedError):
        _second_opinion(plan, ledger.epsilon(), **told)


def test_a_report_confirms_what_was_spent_and_not_what_was_planned(make_plan):
    """A model whose training ended early has a smaller ε than its plan."""
    plan = make_plan()
    half = plan.steps // 2
    spent, delta = plan.epsilon(steps=half), plan.target_delta
    assert _second_opinion(plan, spent, steps=half, delta=delta)["second_epsilon"] <= 1.03 * spent
    with pytest.raises(UnconfirmedError):
        _second_opinion(plan, spent, steps=plan.steps, delta=delta)


def test_a_training_whose_epsilon_is_contradicted_releases_no_model(monkeypatch, tmp_path, capsys):
    right, out = ACCOUNTANTS["pld"], tmp_path / "model"
    monkeypatch.setitem(ACCOUNTANTS, "pld", lambda events, delta: 0.5 * right(events, delta))
    train = ["train", "--data", "synthetic:60", "--epsilon", "8", "--batch-size", "24"]
    assert main([*train, "--epochs", "1", "--out", str(out), "--quiet"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "Expected dp-accounting to confirm ε" in said
    assert (out / "ledger.jsonl").exists(), "what was spent is kept"
    assert not is_model(out) and not (out / "README.md").exists()


def test_where_nobody_can_tell_the_statement_says_so(make_plan):
    plan = make_plan(sampling="truncated_poisson", max_batch_size=6)
    ledger = Ledger(plan)
    ledger.append(plan.event_at(0))
    assert ledger.confirmed() is None
    assert "no second accountant can confirm this ε" in privacy_statement(plan, ledger)


def test_a_schedule_is_stated_beside_the_constant_noise_of_equal_epsilon(make_plan):
    plan = make_plan(noise_schedule="exponential:0.9")
    constant = f"{plan.with_constant_noise().noise_multiplier:.4g}"
    stated = privacy_statement(plan, Ledger(plan))
    assert f"(exponential:0.9; constant noise of multiplier {constant} has the same" in stated
    assert "(constant)" in privacy_statement(make_plan(), Ledger(make_plan()))


def test_an_adaptive_bound_is_stated_with_where_it_ended(make_plan):
    plan = make_plan(clipping="quantile:0.5")
    ledger = Ledger(plan)
    assert "norm at most 1 per example" in privacy_statement(plan, ledger)
    ledger.append(plan.event_at(0), bound=0.8123)
    assert "norm at most 1 at first and 0.8123 at last per" in privacy_statement(plan, ledger)


def test_nothing_released_and_no_noise():
    assert second_opinion([], delta=DELTA).epsilon == 0
    silent = SampledGaussian(noise_multiplier=0.0, sample_rate=0.5, steps=1)
    assert epsilon([silent], delta=DELTA) == math.inf
    assert confirm(math.inf, [silent], delta=DELTA) is None


def test_a_grid_that_would_not_fit_into_memory_is_not_asked_for(monkeypatch):
    """Without noise to speak of, for many steps, PRV would ask for a hundred gigabytes; and for so
    many mechanisms for as many grids."""

    def fail(*_):
        raise AssertionError("asked")

    monkeypatch.setitem(ACCOUNTANTS, "prv", fail)
    monkeypatch.setattr(confirmation, "check_digits", _no_digits)
    loud = [SampledGaussian(noise_multiplier=1.0, sample_rate=1.0, steps=100_000)]
    assert second_opinion(loud, delta=1e-9) is None
    many = [replace(LONG[0], noise_multiplier=1 + n / 1000, steps=500) for n in range(200)]
    assert second_opinion(many, delta=1e-9) is None
    with pytest.raises(AssertionError, match="asked"):
        second_opinion(many[:1], delta=1e-9)


def _no_digits(delta: float, steps: int) -> None:
    raise ValueError


@pytest.mark.parametrize(
    ("given", "written"),
    [(0.0, "0"), (math.inf, "inf"), (7.99611, "7.997"), (8.0, "8"), (0.123401, "0.1235"),
     (1234.1, "1235"), (123456.0, "1.235e+05"), (0.00012341, "0.0001235")],
)  # fmt: skip
def test_a_statement_rounds_up(given, written):
    assert _rounded_up(given) == written
    assert float(_rounded_up(given)) >= given
