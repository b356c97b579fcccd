"""The plan: what it says about itself is what the mechanism does."""

import json
import math
from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest

from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.events import SampledGaussian
from dpnlu.mechanism import schedules
from dpnlu.mechanism.choices import choices
from dpnlu.mechanism.plan import PrivacyPlan

CALIBRATION = {
    "target_epsilon": 4.0,
    "target_delta": 1e-5,
    "num_examples": 1000,
    "expected_batch_size": 50,
    "steps": 40,
    "max_grad_norm": 1.0,
}
MICROBATCH = {"clipping_unit": "microbatch", "microbatches": 3}
TRUNCATED = {"sampling": "truncated_poisson", "max_batch_size": 90}


@dataclass(frozen=True)
class Invalid:
    """A change of a valid plan, and what the refusal says."""

    change: dict = field(hash=False)
    says: str

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.change.items())


INVALID_PLANS = [
    Invalid({"noise_multiplier": -0.1}, "`noise_multiplier` to be finite and >= 0, got -0.1"),
    Invalid({"noise_multiplier": math.nan}, "`noise_multiplier`"),
    Invalid({"noise_multiplier": math.inf}, "`noise_multiplier`"),
    Invalid({"max_grad_norm": 0.0}, "`max_grad_norm` to be finite and > 0"),
    Invalid({"max_grad_norm": math.inf}, "`max_grad_norm`"),
    Invalid({"max_grad_norm": math.nan}, "`max_grad_norm`"),
    Invalid({"sample_rate": 0.0}, r"`sample_rate` in \(0, 1\], got 0.0"),
    Invalid({"sample_rate": 32}, "It is a probability: pass expected batch size / number"),
    Invalid({"sample_rate": math.nan}, "`sample_rate`"),
    Invalid({"steps": 0}, "`steps` to be an integer >= 1, got 0"),
    Invalid({"steps": 2.5}, "`steps`"),
    Invalid({"steps": True}, "`steps`"),
    Invalid({"steps": 10**9 + 1}, r"`steps` to be 1e\+09 at most"),
    Invalid({"num_examples": 0}, "`num_examples`"),
    Invalid({"num_examples": 10**13}, r"`num_examples` to be 1e\+12 at most"),
    Invalid(
        {"noise_schedule": "inverse:1e-9", "steps": 10**6}, "10000 epochs at most with a noise"
    ),
    Invalid({"target_delta": 0.0}, r"`target_delta` in \[1e-12, 1\)"),
    Invalid({"target_delta": 1e-13}, "`target_delta`"),
    Invalid({"target_delta": 1.0}, "`target_delta`"),
    Invalid({"target_delta": math.nan}, "`target_delta`"),
    Invalid({"clipping": "none"}, r"`clipping` to be one of flat, automatic.*, got 'none'"),
    Invalid({"clipping": "groups"}, "`clipping_groups` exactly together with clipping='groups'"),
    Invalid({"clipping_groups": (("a",),)}, "`clipping_groups` exactly together"),
    *(
        Invalid({"clipping": "groups", "clipping_groups": groups}, says)
        for groups, says in (
            ((("a", "b"), ("b",)), "every name once in `clipping_groups`, got b twice"),
            ((("a", "a"),), "got a twice"),
            (("a", "b"), "to be lists of names"),
            ((("a",), ()), "to be lists of names"),
            ((("a", ""),), "to be lists of names"),
            (((1,),), "to be lists of names"),
        )
    ),
    Invalid({"unit": "person"}, "`unit` to be one of example, user"),
    Invalid({"sampling": "shuffle"}, "`sampling` to be one of poisson, truncated_poisson"),
    Invalid({"clipping_unit": "layer"}, "`clipping_unit` to be one of example, microbatch"),
    Invalid({"clipping_unit": "microbatch"}, "`microbatches` exactly together with clipping_unit"),
    Invalid({"microbatches": 4}, "`microbatches` exactly together"),
    Invalid({**MICROBATCH, "microbatches": 0}, "`microbatches` to be an integer >= 1"),
    Invalid({"sampling": "truncated_poisson"}, "`max_batch_size` exactly together with sampling"),
    Invalid({"max_batch_size": 9}, "`max_batch_size` exactly together"),
    Invalid({**TRUNCATED, "max_batch_size": 0}, "`max_batch_size` to be an integer >= 1"),
    Invalid({**TRUNCATED, "target_delta": 1e-9, "steps": 20_000}, "at least 2e-09 for so many"),
    *(
        Invalid({"noise_schedule": spec}, "`noise_schedule` to be constant, exponential:F with F")
        for spec in (
            "linear",
            "constant:1",
            "exponential",
            "exponential:0",
            "exponential:1.1",
            "exponential:nan",
            "exponential:fast",
            "inverse:-1",
            "inverse:inf",
            "step:0.5",
            "step:0.5:0",
            "step:0.5:1.5",
            "step:2:1",
            "list",
            "list:",
            "list:1,-1",
            "list:1,nan",
            "list:1,inf",
        )
    ),
    *(
        Invalid({"noise_schedule": spec, "sample_rate": 0.25, "steps": 16}, f"{spec} reaches zero")
        for spec in ("list:1,0.5,0", "list:0,1", "exponential:1e-110", "step:1e-200:1")
    ),
]
INVALID_CALIBRATIONS = [
    Invalid({"target_epsilon": 0.0}, "`target_epsilon` > 0, got 0.0"),
    Invalid({"target_epsilon": math.nan}, "`target_epsilon` > 0"),
    Invalid({"expected_batch_size": 0}, "batch size between 1 and the number of examples, 1000"),
    Invalid({"expected_batch_size": 1001}, "batch size between 1 and the number of examples"),
    Invalid({"expected_batch_size": math.nan}, "batch size between"),
    Invalid({"num_examples": 0}, "`num_examples`"),
    Invalid({"epochs": 2}, "either `epochs` or `steps`"),
    Invalid({"steps": None}, "either `epochs` or `steps`"),
    Invalid({"steps": 0}, "`steps`"),
    Invalid({"steps": None, "epochs": 0}, "`epochs` > 0, got 0"),
    Invalid({"steps": None, "epochs": math.inf}, "`epochs` > 0"),
    Invalid({"steps": None, "epochs": 1e300}, r"1e\+09 steps at most, got 2e\+301"),
    Invalid({"num_examples": 10**400}, r"`num_examples` to be 1e\+12 at most"),
    Invalid({"target_delta": 0.0}, "`target_delta`"),
    Invalid({"clipping": "none"}, "`clipping`"),
]


@pytest.mark.parametrize("case", INVALID_PLANS, ids=str)
def test_a_plan_that_is_no_mechanism_cannot_be_made(make_plan, case):
    with pytest.raises(ValueError, match=case.says):
        make_plan(**case.change)


@pytest.mark.parametrize("case", INVALID_CALIBRATIONS, ids=str)
def test_calibration_refuses_what_it_cannot_mean(case):
    with pytest.raises(ValueError, match=case.says):
        PrivacyPlan.calibrate(**CALIBRATION | case.change)


def test_a_plan_is_frozen_and_its_arguments_are_named(make_plan):
    with pytest.raises(FrozenInstanceError):
        make_plan().noise_multiplier = 0.0
    with pytest.raises(TypeError):
        PrivacyPlan(1.0, 1.0, 0.5, 10, 1e-5, 8)


@pytest.mark.parametrize("delta", [1 / 8, 0.2])
def test_a_delta_of_one_over_n_or_more_warns(make_plan, delta):
    with pytest.warns(UserWarning, match="not below 1 / 8 examples"):
        plan = make_plan(target_delta=delta)
    plan.with_noise(2.0)  # and does not repeat itself: warnings are errors here


# ---- ε ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, MICROBATCH, TRUNCATED, {"noise_schedule": "inverse:0.5"}])
def test_calibrated_epsilon_does_not_exceed_the_target(change):
    """`plan.epsilon() <= target_epsilon`, and within 1 % of it; all else is as was asked for."""
    plan = PrivacyPlan.calibrate(**CALIBRATION | change)
    assert 0.99 * 4.0 <= plan.epsilon() <= 4.0
    asked = {"target_delta": 1e-5, "num_examples": 1000, "sample_rate": 0.05, "steps": 40} | change
    assert {name: plan.to_dict()[name] for name in asked} == asked


def test_an_infinite_target_gives_a_plan_without_noise():
    plan = PrivacyPlan.calibrate(**CALIBRATION | {"target_epsilon": math.inf})
    assert plan.noise_multiplier == 0 and plan.epsilon() == math.inf


def test_epsilon_is_that_of_the_planned_events(make_plan):
    event = SampledGaussian(noise_multiplier=1.3, sample_rate=0.5, steps=7)
    plan = make_plan(noise_multiplier=1.3, steps=7)
    assert plan.epsilon() == epsilon([event], delta=1e-5)
    assert plan.epsilon(accountant="rdp") == epsilon([event], delta=1e-5, accountant="rdp")
    assert plan.epsilon(steps=0) == 0
    assert 0 < plan.epsilon(steps=3) < plan.epsilon()


# n = 13,084, B = 64, ten epochs of 204 steps, δ = 1e-5; (σ0, factor per epoch) -> ε, computed with
# the PLD accountant of dp-accounting for one block per epoch.
DECAY = [
    ((1.0, 1.00), 1.2),
    ((1.0, 0.95), 3.0),
    ((1.0, 0.90), 12.9),
    ((1.5, 0.90), 3.6),
    ((2.0, 0.90), 1.3),
    ((2.0, 0.80), 35.0),
]


@pytest.mark.parametrize(("schedule", "known"), DECAY, ids=str)
def test_a_decaying_schedule_costs_the_composition_of_its_epochs(make_plan, schedule, known):
    """… and never what a constant first σ would cost."""
    sigma, factor = schedule
    size = {"sample_rate": 64 / 13_084, "num_examples": 13_084, "steps": 2040}
    plan = make_plan(noise_multiplier=sigma, noise_schedule=f"exponential:{factor}", **size)
    blocks = [
        SampledGaussian(noise_multiplier=sigma * factor**e, sample_rate=64 / 13_084, steps=204)
        for e in range(10)
    ]
    assert plan.epsilon() == pytest.approx(epsilon(blocks, delta=1e-5), rel=1e-9)
    assert plan.epsilon() == pytest.approx(known, abs=0.051)
    if factor < 1:
        assert plan.epsilon() > 1.5 * make_plan(noise_multiplier=sigma, **size).epsilon()


@pytest.mark.parametrize(
    ("spec", "factors"),
    [
        ("constant", [1, 1, 1]),
        ("exponential:0.5", [1, 0.5, 0.25]),
        ("exponential:1", [1, 1, 1]),
        ("inverse:2", [1, 1 / 3, 1 / 5]),
        ("inverse:0", [1, 1, 1]),
        ("step:0.5:2", [1, 1, 0.5]),
        ("step:0.5:1", [1, 0.5, 0.25]),
        ("list:2,1.5,0.3,0", [2, 1.5, 0.3]),
        ("list:1,0.4", [1, 0.4, 0.4]),
    ],
)
def test_the_schedule_sets_the_noise_of_every_epoch(make_plan, spec, factors):
    plan = make_plan(
        noise_multiplier=3.0, max_grad_norm=0.7, sample_rate=0.25, steps=11, noise_schedule=spec
    )
    planned = [3.0 * factors[step // 4] for step in range(11)]
    assert [plan.noise_multiplier_at(step) for step in range(11)] == pytest.approx(planned)
    assert [plan.noise_std_at(step) for step in range(11)] == pytest.approx(
        [0.7 * sigma for sigma in planned]
    )
    singly = [event.noise_multiplier for event in plan.events() for _ in range(event.steps)]
    assert singly == pytest.approx(planned)
    assert [plan.event_at(step).noise_multiplier for step in range(11)] == pytest.approx(planned)


# The last column of the same table: σ0, factor -> constant σ of the same ε. The third belongs to an
# ε of 1.297; that of the schedule is 1.316, by dp-accounting, too.
CONTROLS = [((1.0, 0.95), 0.71), ((1.0, 0.9), 0.47), ((2.0, 0.9), 0.96), ((2.0, 0.8), 0.35)]


@pytest.mark.parametrize(("schedule", "known"), CONTROLS, ids=str)
def test_a_schedule_has_a_constant_noise_of_equal_epsilon(make_plan, schedule, known):
    sigma, factor = schedule
    size = {"sample_rate": 64 / 13_084, "num_examples": 13_084, "steps": 2040}
    plan = make_plan(noise_multiplier=sigma, noise_schedule=f"exponential:{factor}", **size)
    constant = plan.with_constant_noise()
    assert constant.noise_multiplier == pytest.approx(known, abs=0.0065)
    assert 0.99 * plan.epsilon() <= constant.epsilon() <= plan.epsilon()
    assert constant.noise_schedule == "constant" and constant.with_constant_noise() is constant


def test_without_noise_the_constant_noise_of_equal_epsilon_is_none(make_plan):
    plan = make_plan(noise_multiplier=0.0, noise_schedule="exponential:0.5")
    assert plan.with_constant_noise().noise_multiplier == 0


SCHEDULES = ["exponential:0.8", "step:0.5:2", "inverse:0.5", "list:1,2,0.5"]


@pytest.mark.parametrize("spec", SCHEDULES)
def test_calibration_scales_a_schedule_as_a_whole(spec):
    """The factors between epochs stay, ε is that of all blocks by another accountant."""
    plan = PrivacyPlan.calibrate(**CALIBRATION | {"noise_schedule": spec, "steps": 80})
    factors = [schedules.schedule(spec)(epoch) for epoch in range(4)]
    blocks = [
        SampledGaussian(noise_multiplier=plan.noise_multiplier * f, sample_rate=0.05, steps=20)
        for f in factors
    ]
    assert 0.99 * 4 <= plan.epsilon() <= 4
    second = epsilon(blocks, delta=1e-5, accountant="dp-accounting")
    assert plan.epsilon() == pytest.approx(second, rel=0.005)


@pytest.mark.parametrize("spec", ["constant", *SCHEDULES])
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 11])
def test_the_events_of_a_part_are_the_beginning_of_all(make_plan, spec, steps):
    plan = make_plan(sample_rate=0.25, steps=11, noise_schedule=spec)
    assert sum(event.steps for event in plan.events(steps=steps)) == steps
    singly = [plan.event_at(step) for step in range(steps)]
    assert plan.epsilon(steps=steps) == pytest.approx(epsilon(singly, delta=1e-5))


# ---- as published, and in comparison -----------------------------------------------------------

# n, B, σ, steps of ten epochs -> ε as published (sensitivity C) and ε, by Rényi orders.
PUBLISHED = [
    ((13_084, 64, 1.0, 2040), 1.4, 11.7),
    ((13_084, 64, 0.8, 2040), 2.6, 25.5),
    ((13_084, 64, 0.6, 2040), 6.3, 68),
    ((4_478, 32, 1.0, 1400), 1.75, 13.6),
]


@pytest.mark.parametrize(("size", "claimed", "true"), PUBLISHED, ids=str)
def test_micro_batches_cost_far_more_than_was_published(make_plan, size, claimed, true):
    """The same noise, σ times C, is half as much relative to 2C."""
    count, batch, sigma, steps = size
    plan = make_plan(
        noise_multiplier=sigma / 2,
        num_examples=count,
        sample_rate=batch / count,
        steps=steps,
        **MICROBATCH,
    )
    assert plan.noise_std_at(0) == pytest.approx(sigma * plan.max_grad_norm)
    assert plan.epsilon(accountant="rdp") == pytest.approx(true, rel=0.02)
    found = plan.epsilon(accountant="rdp", as_published=True)
    assert found == pytest.approx(claimed, rel=0.03)
    event = SampledGaussian(noise_multiplier=sigma, sample_rate=batch / count, steps=steps)
    assert found == epsilon([event], delta=1e-5, accountant="rdp")


@pytest.mark.parametrize("change", [{}, {"unit": "user", "examples_per_user": 2}])
def test_only_micro_batches_have_an_epsilon_as_published(make_plan, change):
    with pytest.raises(ValueError, match="leave `as_published` out"):
        make_plan(**change).epsilon(as_published=True)


@pytest.mark.parametrize("change", [{}, {"noise_schedule": "exponential:0.5"}, MICROBATCH])
def test_choices_of_the_batch_size_have_one_epsilon_and_one_cost(make_plan, change):
    plan = make_plan(num_examples=400, sample_rate=0.1, steps=40, **change)
    found = choices(plan, target_epsilon=3)
    assert [choice.batch_size for choice in found] == [5, 10, 20, 40, 80, 160, 320]
    for choice in found:
        assert choice.sample_rate == choice.batch_size / 400
        assert choice.steps * choice.batch_size == pytest.approx(1600, rel=0.05)
        same = replace(plan, sample_rate=choice.sample_rate, steps=choice.steps)
        same = same.with_noise(choice.noise_multiplier)
        assert 0.99 * 3 <= same.epsilon() <= 3
        stds = [same.noise_std_at(step) / plan.max_grad_norm for step in range(same.steps)]
        whole = same.divisor * same.steps / math.hypot(*stds)
        assert choice.signal_to_noise == pytest.approx(whole)
        root = math.sqrt(choice.steps)
        assert choice.step_signal_to_noise * root == pytest.approx(whole)
    assert [c.batch_size for c in choices(make_plan(), target_epsilon=3)] == [1, 2, 4, 8]


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_choices_need_a_finite_epsilon(make_plan, target):
    with pytest.raises(ValueError, match="finite ε > 0 to compare"):
        choices(make_plan(), target_epsilon=target)


# ---- the mechanism ---------------------------------------------------------------------------


def test_the_sensitivity_of_example_clipping_is_the_bound(make_plan):
    plan = make_plan(max_grad_norm=0.3, noise_multiplier=2.0)
    assert plan.sensitivity == 0.3
    assert plan.noise_std_at(0) == pytest.approx(0.6)
    assert plan.divisor == plan.expected_batch_size == 4


def test_the_sensitivity_of_microbatch_clipping_is_twice_the_bound(make_plan):
    """One example can turn the mean of its group from any vector into any other: 2C."""
    plan = make_plan(max_grad_norm=0.3, noise_multiplier=2.0, **MICROBATCH)
    assert plan.sensitivity == 0.6
    assert plan.noise_std_at(0) == pytest.approx(1.2)
    assert plan.divisor == 3 and plan.expected_batch_size == 4


@pytest.mark.parametrize("change", [{}, MICROBATCH, TRUNCATED, {"noise_schedule": "inverse:1"}])
def test_a_release_without_sampling_is_a_plain_gaussian(make_plan, change):
    """Neither sampling nor truncation may lower its cost: nobody drew its examples."""
    event = make_plan(sample_rate=0.5, **change).event_at(5, sampled=False)
    sigma = 1 / 3 if "noise_schedule" in change else 1.0
    assert event == SampledGaussian(noise_multiplier=sigma, sample_rate=1.0, steps=1)


def test_events_carry_what_the_accountant_needs_of_truncation(make_plan):
    poisson = make_plan(num_examples=1000)
    assert (poisson.event_at(0).max_batch_size, poisson.event_at(0).num_examples) == (None, None)
    truncated = make_plan(num_examples=1000, **TRUNCATED)
    assert (truncated.event_at(0).max_batch_size, truncated.event_at(0).num_examples) == (90, 1000)
    assert poisson.adjacency == "add-remove-one" and truncated.adjacency == "zero-out-one"


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_steps_are_counted_in_integers(batch):
    """int(1 / rate) loses a step for 93, 99, 105, … batches per epoch."""
    for batches in range(1, 1000):
        size = {"num_examples": batch * batches, "expected_batch_size": batch}
        plan = PrivacyPlan.calibrate(
            target_epsilon=math.inf, target_delta=1e-9, max_grad_norm=1.0, epochs=1, **size
        )
        assert plan.steps == plan.steps_per_epoch == batches


def test_a_part_of_an_epoch_is_rounded_and_never_nothing():
    size = {"num_examples": 1000, "expected_batch_size": 50, "steps": None}
    steps = [
        PrivacyPlan.calibrate(
            **CALIBRATION | size | {"epochs": e, "target_epsilon": math.inf}
        ).steps
        for e in (0.001, 0.5, 0.99, 2.5)
    ]
    assert steps == [1, 10, 20, 50]


def test_epochs_are_the_expected_visits(make_plan):
    assert make_plan(sample_rate=0.25, steps=11).epochs == 2.75
    assert make_plan(sample_rate=1.0).steps_per_epoch == 1


# ---- as values -------------------------------------------------------------------------------


SCHEDULED = [{"noise_schedule": spec} for spec in SCHEDULES]


RULED = [
    {"clipping": "quantile:0.5:0.1"},
    {"clipping": "groups:1,2", "clipping_groups": [["a", "b.weight"], ["c"]]},
]


@pytest.mark.parametrize("change", [{}, MICROBATCH, TRUNCATED, *SCHEDULED, *RULED])
def test_a_plan_survives_json(make_plan, change):
    plan = make_plan(**change)
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_of_an_earlier_version_is_read(make_plan):
    """It had fewer fields."""
    first = """{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.5, "steps": 10,
        "target_delta": 1e-05, "num_examples": 8, "clipping": "flat", "clipping_unit": "example",
        "microbatches": null, "sampling": "poisson", "max_batch_size": null,
        "noise_schedule": "exponential:0.9"}"""
    plan = PrivacyPlan.from_dict(json.loads(first))
    assert plan == make_plan(noise_schedule="exponential:0.9")


def test_unknown_missing_and_wrong_fields_are_refused(make_plan):
    values = make_plan().to_dict()
    with pytest.raises(ValueError, match=r"got unknown \['secret'\]"):
        PrivacyPlan.from_dict(values | {"secret": 1})
    with pytest.raises(ValueError, match="complete privacy plan"):
        PrivacyPlan.from_dict({k: v for k, v in values.items() if k != "steps"})
    with pytest.raises(ValueError, match="`sample_rate`"):
        PrivacyPlan.from_dict(values | {"sample_rate": 2})
    with pytest.raises(ValueError):
        PrivacyPlan.from_dict(values | {"noise_multiplier": "1"})
