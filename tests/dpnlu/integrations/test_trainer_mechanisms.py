"""Clipping rules, noise schedules and Adam without the noise, as arguments of a private Trainer."""

import json
import math

import pytest
import torch
from scipy import stats

import dpnlu
from dpnlu.integrations.losses import sequence_losses
from dpnlu.mechanism.ledger import Ledger, LedgerError
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import plan, private, trainer, weights
from tests.dpnlu.integrations.test_trainer_resume import (
    LEDGER,
    SAVING,
    InterruptedError_,
    Interruption,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MECHANISMS = subjects.mechanisms()


def _losses_of(model):
    def losses_of(batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return sequence_losses(model(**inputs).logits, batch["labels"])

    return losses_of


def _plain(asked, make_optimizer):
    model = subjects.model()
    optimizer = make_optimizer(model.parameters())
    found = subjects.planned_for(asked)
    return subjects.plainly_trained(model, _losses_of(model), optimizer, found)


def _descent(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


@pytest.mark.parametrize(
    ("name", "epsilon"), [*((name, math.inf) for name in MECHANISMS), ("schedule", 4), ("both", 4)]
)
def test_every_rule_and_schedule_trains_as_in_the_plain_loop(tmp_path, name, epsilon):
    """… without noise, or with the same one; and the plan is the one of the target."""
    asked = subjects.budget(epsilon, **MECHANISMS[name])
    expected = _plain(asked, _descent)
    made = private(trainer(tmp_path), noise=subjects.seeded(), **asked)
    assert made.private.plan == subjects.planned_for(asked)
    made.train()
    assert made.private.plan.sensitivity == 0.5
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-6)


def test_the_rules_are_not_all_the_same():
    """Or the test before would see nothing."""
    names = ("flat", "automatic", "per layer", "groups", "adaptive")
    found = [_plain(subjects.budget(math.inf, **MECHANISMS[name]), _descent) for name in names]
    for place, one in enumerate(found):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in found[:place])


@pytest.mark.parametrize("name", ["automatic", "per layer", "groups", "adaptive"])
def test_an_example_moves_a_step_by_the_sensitivity_of_the_plan_at_most(tmp_path, name):
    """… with whole passes as batches, and the longest example there or not."""
    released = []
    for count in (12, 11):
        whole = {"per_device_train_batch_size": count, "gradient_accumulation_steps": 1}
        data = subjects.examples(12)[:count]
        asked = subjects.budget(math.inf, **MECHANISMS[name])
        made = private(trainer(tmp_path / str(count), data=data, max_steps=1, **whole), **asked)
        made.train()
        assert made.private.plan.sample_rate == 1.0
        released.append(subjects.flat(made.private.gradients))
    moved = float((released[0] - released[1]).norm())
    assert 0.05 < moved <= made.private.plan.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("clipping", ["flat", "quantile:0.5:2"])
def test_adam_with_the_noise_corrected_steps_as_in_the_plain_loop(tmp_path, clipping):
    """It is told how noisy every step is, though the trainer steps it."""

    def corrected(parameters):
        return dpnlu.AdamBC(parameters, lr=0.05)

    asked = subjects.budget(4.0, clipping=clipping, noise_schedule="list:1,0.25")
    expected = _plain(asked, corrected)
    ordinary = subjects.model()
    given = {"optimizers": (corrected(ordinary.parameters()), None)}
    made = private(
        trainer(tmp_path, subject=ordinary, named=given), noise=subjects.seeded(), **asked
    )
    made.train()
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-6)
    plainly = _plain(asked, lambda parameters: torch.optim.AdamW(parameters, 0.05, weight_decay=0))
    assert not torch.allclose(plainly, expected, atol=1e-3)


def test_the_system_s_noise_is_added_to_whole_sums(tmp_path):
    """With the standard deviation of the plan, neither 2/3 nor 3/2 of it."""
    made = private(
        trainer(tmp_path, max_steps=1), plan=plan(noise_multiplier=2.0, steps=1), noise="system"
    )
    made.train()
    quiet = private(trainer(tmp_path / "quiet", max_steps=1), plan=plan(steps=1))
    quiet.train()
    noise = subjects.flat(made.private.gradients) - subjects.flat(quiet.private.gradients)
    std, found = made.private.plan.noise_std_at(0), noise.double().numpy()
    assert stats.kstest(found, "norm", args=(0, std)).pvalue > 1e-6
    for wrong in (std * 2 / 3, std * 3 / 2):
        assert stats.kstest(found, "norm", args=(0, wrong)).pvalue < 1e-6


def _interrupted(folder, asked, step=3):
    named = {"callbacks": [Interruption(step)]}
    made = private(trainer(folder, named=named, **SAVING), **asked)
    with pytest.raises(InterruptedError_):
        made.train()
    return made


def test_a_rule_is_kept_and_no_other_is_resumed(tmp_path):
    """… and the bound goes on from where it was; checkpoint, ledger and card tell both."""
    asked = subjects.budget(4.0, clipping="quantile:0.3:2", noise_schedule="list:1,0.5")
    bound = _interrupted(tmp_path, asked).private.ledger.bound
    for other in ({"clipping": "flat"}, {"noise_schedule": "constant"}):
        with pytest.raises(LedgerError, match="plan of this training"):
            private(trainer(tmp_path, **SAVING), **asked | other).train(resume_from_checkpoint=True)
    made = private(trainer(tmp_path, **SAVING), **asked)
    made.train(resume_from_checkpoint=True)
    releases = Ledger.read(tmp_path / LEDGER)
    assert made.private.plan == releases.plan == subjects.planned_for(asked)
    assert bound != 0.5 and made.private.ledger.bound not in (0.5, bound)
    assert made.private.epsilon() <= 4.0
    record = json.loads((tmp_path / "checkpoint-4" / "privacy.json").read_text())
    assert record["plan"]["clipping"] == "quantile:0.3:2"
    assert record["plan"]["noise_schedule"] == "list:1,0.5"
    made.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "quantile:0.3:2 clipping" in card and "list:1,0.5" in card


def test_corrected_adam_goes_on_from_its_checkpoint(tmp_path):
    """With its moments, and the noise that it has an average of."""

    def made_with(folder, callbacks=()):
        ordinary = subjects.model()
        given = {
            "optimizers": (dpnlu.AdamBC(ordinary.parameters(), lr=0.05), None),
            "callbacks": list(callbacks),
        }
        asked = subjects.budget(4.0, noise_schedule="list:1,0.25")
        return private(trainer(folder, subject=ordinary, named=given, **SAVING), **asked)

    with pytest.raises(InterruptedError_):
        made_with(tmp_path, [Interruption(3)]).train()
    made = made_with(tmp_path)
    made.train(resume_from_checkpoint=True)
    states = list(made.optimizer.state_dict()["state"].values())
    assert made.private.steps_taken == 2 and len(made.private.ledger) == 5
    assert {float(state["step"]) for state in states} == {4.0}, "two of the checkpoint, two more"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"clipping": "best"}, "`clipping` to be one of"),
        ({"clipping": "groups"}, "`clipping_groups` exactly together with"),
        ({"clipping_groups": [["bert"]]}, "`clipping_groups` exactly together with"),
        ({"clipping": "groups", "clipping_groups": [["bert"]]}, "classifier.weight is in none"),
        ({"clipping": "groups:1", "clipping_groups": [["bert"], ["classifier"]]}, "got 1"),
        ({"noise_schedule": "falling"}, "Expected"),
        ({"noise_schedule": "list:1,0"}, "Expected"),
        ({"plan": plan(), "clipping": "automatic"}, "with this `clipping`, got one with another"),
        ({"plan": plan(), "noise_schedule": "step:0.5:1"}, "with this `noise_schedule`"),
        ({"plan": plan(), "max_grad_norm": 2.0}, "with this `max_grad_norm`"),
        ({"plan": plan(), "target_delta": 1e-4}, "with this `target_delta`"),
    ],
)
def test_a_mechanism_that_is_none_is_refused_at_once(tmp_path, chosen, message):
    target = {} if "plan" in chosen else {"target_epsilon": 3.0}
    with pytest.raises(ValueError, match=message) as raised:
        private(trainer(tmp_path), **target | chosen)
    assert "\n" not in str(raised.value)


def test_what_a_plan_says_may_be_said_once_more(tmp_path):
    said = MECHANISMS["groups"] | {"noise_schedule": "step:0.5:1"}
    made = private(trainer(tmp_path), plan=plan(**said), **said)
    assert made.private.plan == plan(**said)
