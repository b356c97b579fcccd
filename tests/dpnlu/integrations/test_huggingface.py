"""The private Trainer: what it trains, what it shows, and what it leaves alone."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import EarlyStoppingCallback

import dpnlu
from dpnlu.integrations.huggingface import privatize_trainer
from dpnlu.integrations.losses import sequence_losses, token_losses
from dpnlu.mechanism.ledger import Ledger
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import collate, plan, private, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


class Doubled(Trainer):
    """A user's own loss, of each example."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = 2 * nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        return (losses, outputs) if return_outputs else losses


class WithNames(Doubled):
    """A user's own names, which ours must not hide, nor be hidden by."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._loss = None
        losses = self._losses(super().compute_loss(model, inputs))
        self._staging = self._lost = self._is_first = losses.detach().mean()
        self.log({"loss": float(losses.detach().mean())})
        return (losses, {}) if return_outputs else losses

    def _losses(self, losses):
        return losses

    def _is_saved(self):
        return "mine"

    @property
    def _ledger(self):
        return "mine"


class Meaning(Trainer):
    """A user's own loss, of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


def _plainly_trained(subject, task, losses, **chosen):
    """The same by the plain loop."""
    optimizer = torch.optim.SGD([p for p in subject.parameters() if p.requires_grad], lr=0.5)
    rng = np.random.default_rng(0)
    subject.train()
    with dpnlu.privatize(subject, optimizer, plan(), sampling_rng=rng, **chosen) as made:

        def losses_of(batch):
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            return losses(subject(**inputs).logits, batch["labels"])

        step = made.stepper(losses_of)
        data = subjects.examples(12, task)
        for batch in made.loader(data, collate_fn=collate, physical_batch_size=3):
            step(batch)
    return weights(subject)


def _of_doubled(logits, labels):
    return 2 * sequence_losses(logits, labels)


WRAPPED = {
    "texts": ("texts", {}, {}, sequence_losses),
    "tokens": ("tokens", {}, {}, token_losses),
    "smoothed tokens": (
        "tokens",
        {"label_smoothing_factor": 0.2},
        {},
        lambda logits, labels: token_losses(logits, labels, smoothing=0.2),
    ),
    "a subclass": ("texts", {"kind": Doubled}, {}, _of_doubled),
    "a function of outputs": (
        "texts",
        {"named": {"compute_loss_func": lambda out, labels, **_: _of_doubled(out.logits, labels)}},
        {},
        _of_doubled,
    ),
    "a function of inputs": (
        "texts",
        {},
        {
            "per_example_loss": lambda model, inputs: _of_doubled(
                model(inputs["input_ids"], inputs["attention_mask"]).logits, inputs["labels"]
            )
        },
        _of_doubled,
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_five_steps_are_those_of_the_plain_loop(tmp_path, name):
    """… with the noise off and the same samples; the physical batches of both hold three."""
    task, ordinary, chosen, losses = WRAPPED[name]
    expected = _plainly_trained(subjects.model(task), task, losses)
    made = private(trainer(tmp_path, task=task, **ordinary), verify=True, **chosen)
    made.train()
    assert made.private.steps_taken == made.state.global_step == 5
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(weights(subjects.model(task)), expected, rtol=1e-2)


def test_names_of_the_users_class_stay_the_users(tmp_path):
    """And what it logs within a step, of private data, stays out of the logs."""
    expected = _plainly_trained(subjects.model(), "texts", _of_doubled)
    made = private(trainer(tmp_path, kind=WithNames))
    made.train()
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)
    assert (made._is_saved(), made._ledger) == ("mine", "mine")
    assert not any("loss" in entry for entry in made.state.log_history)


def test_another_engine_takes_the_same_steps(tmp_path):
    expected = _plainly_trained(subjects.model(), "texts", sequence_losses)
    made = private(trainer(tmp_path), engine="per_example")
    made.train()
    assert torch.allclose(weights(made.model), expected, rtol=1e-4, atol=1e-6)


def test_adapters_are_trained_and_all_else_is_not(tmp_path):
    expected = _plainly_trained(subjects.lora(), "texts", sequence_losses)
    made = private(trainer(tmp_path, subject=subjects.lora()))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in made.model.named_parameters() if p.requires_grad}


def test_schedulers_and_callbacks_count_logical_steps(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **named):
            seen.append((state.global_step, state.epoch, named["lr_scheduler"].get_last_lr()[0]))

    made = private(
        trainer(tmp_path, lr_scheduler_type="linear", named={"callbacks": [Watch()]}),
    )
    made.train()
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5]
    assert [epoch for _, epoch, _ in seen] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert [rate for _, _, rate in seen] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_empty_batches_are_steps_like_others(tmp_path):
    """At this rate nearly all are empty; each is released as noise, and moves the weights."""
    moved = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **named):
            moved.append(weights(model))

    few = plan(sample_rate=1e-4, noise_multiplier=1.0, max_grad_norm=1e-3)
    made = private(trainer(tmp_path, named={"callbacks": [Watch()]}), plan=few)
    made.train()
    assert made.private.steps_taken == len(made.private.ledger) == len(moved) == 5
    for before, after in zip([weights(subjects.model()), *moved], moved, strict=False):
        assert not torch.equal(before, after)


def test_what_was_released_is_what_the_optimizer_finds(tmp_path):
    found = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **named):
            found.append({p: p.grad.clone() for p in model.parameters()})

    noisy = plan(noise_multiplier=2.0)
    made = private(trainer(tmp_path, named={"callbacks": [Watch()]}), plan=noisy)
    made.train()
    for parameter, total in made.private.gradients.items():
        assert torch.allclose(found[-1][parameter] * noisy.divisor, total)


def test_noise_is_drawn_once_a_step_and_fresh_each_time(tmp_path):
    """Two trainings of the same samples differ by √2 times the noise, in both directions."""
    noisy = plan(noise_multiplier=3.0, steps=1)
    sums = []
    for name in ("one", "other"):
        made = private(trainer(tmp_path / name, max_steps=1), plan=noisy)
        made.train()
        sums.append(subjects.flat(made.private.gradients))
    difference = (sums[0] - sums[1]) / (math.sqrt(2) * noisy.noise_std_at(0))
    mean_square = float(difference.square().mean())
    assert abs(mean_square - 1) < 6 * math.sqrt(2 / len(difference))


def test_a_model_that_is_frozen_in_parts_is_trained_in_the_others(tmp_path):
    subject = subjects.model()
    for parameter in subject.bert.parameters():
        parameter.requires_grad_(False)
    made = private(trainer(tmp_path, subject=subject))
    made.train()
    fresh = subjects.model()
    assert torch.equal(weights(made.model.bert), weights(fresh.bert))
    assert not torch.equal(made.model.classifier.weight, fresh.classifier.weight)


def test_a_model_that_is_made_at_the_start_is_trained(tmp_path):
    """`model_init`: the model that privatize_trainer saw is not the one that is trained."""
    ordinary = trainer(tmp_path)
    ordinary.model_init = lambda: subjects.model()
    made = private(ordinary)
    made.train()
    expected = _plainly_trained(subjects.model(), "texts", sequence_losses)
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_is_trained(tmp_path):
    made = private(trainer(tmp_path, bf16=True))
    made.train()
    expected = _plainly_trained(subjects.model(), "texts", sequence_losses)
    start = weights(subjects.model())
    error = (weights(made.model) - expected).norm() / (expected - start).norm()
    assert error < 0.1


# ---- plans -----------------------------------------------------------------------------------


def test_the_plan_is_that_of_the_arguments(tmp_path):
    ordinary = trainer(tmp_path, max_steps=-1, num_train_epochs=2.5)
    made = private(ordinary, target_epsilon=4.0, target_delta=1e-3, max_grad_norm=0.7)
    planned = made.private.plan
    assert (planned.sample_rate, planned.steps, planned.max_grad_norm) == (0.5, 5, 0.7)
    assert 3.9 < planned.epsilon() <= 4.0
    made.train()
    assert made.state.global_step == 5
    assert made.private.epsilon() == pytest.approx(planned.epsilon())


def test_delta_is_below_one_over_the_examples(tmp_path):
    assert private(trainer(tmp_path), target_epsilon=4.0).private.plan.target_delta == 1e-5


def test_training_stops_before_epsilon_would_pass_what_it_may_be(tmp_path):
    noisy = plan(noise_multiplier=2.0)
    most = noisy.epsilon(steps=3) * 1.0001
    made = private(trainer(tmp_path), plan=noisy, max_epsilon=most)
    made.train()
    assert made.state.global_step == len(made.private.ledger) == 3
    assert made.private.epsilon() <= most < noisy.epsilon(steps=4)


def test_a_budget_below_one_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave room for a step"):
        private(trainer(tmp_path), plan=plan(noise_multiplier=2.0), max_epsilon=1e-3)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"plan": None}, "neither"),
        ({"plan": plan(), "target_epsilon": 3.0}, "both"),
        ({"plan": plan(steps=6)}, "trainer's 5 steps"),
        ({"plan": plan(num_examples=13)}, "12 examples"),
        ({"noise": torch.default_generator}, "default one"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, chosen, message):
    with pytest.raises(ValueError, match=message):
        private(trainer(tmp_path), **chosen)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most the 12 training examples"):
        private(trainer(tmp_path, gradient_accumulation_steps=5), target_epsilon=3.0)


def test_an_epoch_more_than_planned_is_refused(tmp_path):
    made = private(trainer(tmp_path))
    made.args.max_steps = 6
    with pytest.raises(ValueError, match="5 steps of the plan, got 6"):
        made.train()


# ---- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ordinary",
    [
        {"kind": Meaning},
        {"named": {"compute_loss_func": lambda out, labels, **_: out.logits.mean()}},
    ],
)
def test_a_loss_of_the_batch_is_refused_with_the_remedy(tmp_path, ordinary):
    made = private(trainer(tmp_path, **ordinary))
    with pytest.raises(ValueError, match=r"shape \(B,\), got \(\).*per_example_loss"):
        made.train()
    assert len(made.private.ledger) == 0
    assert torch.equal(weights(made.model), weights(subjects.model()))


def test_a_model_of_an_unknown_task_needs_a_function(tmp_path):
    from transformers import BertForMaskedLM

    config = subjects.model().config
    with pytest.raises(ValueError, match="BertForMaskedLM: hand over `per_example_loss`"):
        private(trainer(tmp_path, subject=BertForMaskedLM(config)))


def test_a_model_with_a_loss_of_its_own_needs_a_function(tmp_path):
    """Else it would be trained on another loss than it was made for."""
    from transformers import BertForSequenceClassification

    class Weighted(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, labels=None):
            outputs = super().forward(input_ids, attention_mask)
            weight = torch.tensor([1.0, 5.0, 1.0])
            if labels is not None:
                outputs.loss = nn.functional.cross_entropy(outputs.logits, labels, weight)
            return outputs

    with pytest.raises(ValueError, match="Weighted to have the loss of its task, got another"):
        private(trainer(tmp_path, subject=Weighted(subjects.model().config)))


def test_a_model_that_mixes_examples_is_refused_when_it_is_handed_over(tmp_path):
    subject = subjects.model()
    subject.classifier = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
    with pytest.raises(dpnlu.UnsupportedLayerError, match=r"classifier\.1"):
        private(trainer(tmp_path, subject=subject))


def test_an_optimizer_of_other_weights_is_refused_when_it_is_handed_over(tmp_path):
    """The adapters that were not trained, after a day: the optimizer was made too early."""
    other = torch.optim.SGD(subjects.model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the model's own parameters"):
        private(trainer(tmp_path, named={"optimizers": (other, None)}))


# ---- what is seen ----------------------------------------------------------------------------


class Talkative(Doubled):
    """Logs what it computes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = super().compute_loss(model, inputs)
        self.log({"worst": float(losses.detach().max())})
        return losses


def _seen(made):
    """All that a training left: logs, and every number in its checkpoints' states."""
    states = Path(made.args.output_dir).glob("checkpoint-*/trainer_state.json")
    return made.state.log_history + [json.loads(path.read_text()) for path in states]


PRIVATE_NAMES = {"loss", "train_loss", "grad_norm", "worst", "train_tokens_per_second"}


def test_what_is_private_is_nowhere_to_be_seen(tmp_path):
    made = private(
        trainer(
            tmp_path,
            kind=Talkative,
            save_strategy="steps",
            save_steps=2,
            logging_strategy="steps",
            logging_steps=1,
            include_num_input_tokens_seen="all",
        ),
        plan=plan(noise_multiplier=1.0),
    )
    output = made.train()
    assert math.isnan(output.training_loss)
    assert not PRIVATE_NAMES & output.metrics.keys() and "total_flos" not in output.metrics
    for seen in _seen(made):
        for logged in [seen, *seen.get("log_history", [])]:
            assert not PRIVATE_NAMES & logged.keys()
            assert not logged.get("total_flos") and not logged.get("num_input_tokens_seen")
    assert [log["epsilon"] for log in made.state.log_history if "learning_rate" in log] == [
        pytest.approx(made.private.plan.epsilon(steps=steps)) for steps in range(1, 6)
    ]


def test_the_loss_is_logged_if_that_is_asked_for(tmp_path):
    """… each of the logical batch, whose members do not depend on the samples at rate 1."""
    ordinary = trainer(tmp_path, logging_strategy="steps", logging_steps=1)
    everything = plan(sample_rate=1.0)
    made = private(ordinary, plan=everything, log_private=True)
    made.train()
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    inputs = collate(subjects.examples(12))
    assert len(losses) == 5
    assert losses[0] == pytest.approx(float(subjects.model()(**inputs).loss.detach()), rel=1e-5)
    assert losses[-1] < losses[0]


def test_epsilon_is_beside_the_progress_bar(tmp_path, capsys):
    made = private(
        trainer(tmp_path, disable_tqdm=False, logging_strategy="steps", logging_steps=1),
        plan=plan(noise_multiplier=1.0),
    )
    made.train()
    assert f"ε = {made.private.epsilon():.3g}" in capsys.readouterr().err


def test_the_card_says_what_is_claimed_and_what_is_not(tmp_path):
    made = private(trainer(tmp_path), plan=plan(noise_multiplier=1.0), log_private=True)
    made.train()
    for _ in range(2):  # as every push does
        made.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.count("## Privacy") == 1
    assert f"(ε = {made.private.epsilon():.4g}"[:8] in card and "δ = 0.001" in card
    assert "The training loss was logged" in card


@pytest.mark.parametrize(
    ("ordinary", "said"),
    [
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_strategy": "steps",
                "save_steps": 1,
                "metric_for_best_model": "loss",
            },
            "chosen among checkpoints",
        ),
        ({"named": {"callbacks": [EarlyStoppingCallback()]}}, "stopped by scores"),
    ],
)
def test_choosing_by_scores_warns_and_is_in_the_card(tmp_path, ordinary, said):
    named = {"eval_dataset": subjects.examples(4)} | ordinary.pop("named", {})
    with pytest.warns(UserWarning, match=said):
        made = private(trainer(tmp_path, named=named, **ordinary), plan=plan(noise_multiplier=0.5))
    made.private.ledger = Ledger(made.private.plan)
    made.create_model_card()
    assert said in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_best_checkpoint_is_found_again(tmp_path):
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    chosen |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    ordinary = trainer(tmp_path, named={"eval_dataset": subjects.examples(4)}, **chosen)
    with pytest.warns(UserWarning, match="chosen among checkpoints"):
        made = private(ordinary)
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    scores = [log["eval_loss"] for log in made.state.log_history if "eval_loss" in log]
    assert best.name == f"checkpoint-{1 + int(np.argmin(scores))}"
    kept = type(made.model).from_pretrained(best)
    assert torch.equal(weights(kept), weights(made.model))


def test_the_state_of_torch_s_generator_tells_nothing_of_noise_and_samples(tmp_path):
    """Two trainings from the same state draw different noise, and leave the same state."""
    states, sums = [], []
    for name in ("one", "other"):
        made = private(
            trainer(tmp_path / name, max_steps=1), plan=plan(steps=1, noise_multiplier=1.0)
        )
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        made.train()
        states.append(torch.get_rng_state())
        sums.append(subjects.flat(made.private.gradients))
    assert torch.equal(*states)
    assert not torch.allclose(*sums)


# ---- what is left alone ----------------------------------------------------------------------


def test_the_trainer_itself_becomes_private(tmp_path):
    """Whoever keeps the old name, or drops the new one, trains privately all the same."""
    ordinary = trainer(tmp_path, kind=Doubled)
    arguments = ordinary.args
    made = private(ordinary)
    assert made is ordinary and isinstance(made, Doubled)
    assert arguments.max_grad_norm == 1.0 and arguments.gradient_accumulation_steps == 2
    with pytest.raises(ValueError, match="that is already"):
        privatize_trainer(made, target_epsilon=1.0)


def test_no_trace_is_left_on_the_model(tmp_path):
    made = private(trainer(tmp_path))
    made.train()
    for module in made.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in made.model.parameters())
    scores = made.evaluate(subjects.examples(4))
    assert math.isfinite(scores["eval_loss"])


def test_a_failure_leaves_neither_hooks_nor_a_locked_folder(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **named):
            raise KeyError("no")

    made = private(trainer(tmp_path, named={"callbacks": [Failing()]}))
    with pytest.raises(KeyError):
        made.train()
    assert not any(module._forward_hooks for module in made.model.modules())
    with Ledger.resume(tmp_path / "_private" / "ledger.jsonl") as ledger:
        assert len(ledger) == 1


def test_evaluation_during_training_changes_nothing(tmp_path):
    expected = _plainly_trained(subjects.model(), "texts", sequence_losses)
    ordinary = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        named={"eval_dataset": subjects.examples(7)},
    )
    made = private(ordinary)
    made.train()
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)


def test_what_is_replaced_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        private(trainer(tmp_path, dataloader_drop_last=True))
    assert "own max_grad_norm is off" in caplog.text
    assert "gradient_accumulation_steps counts into the logical batch" in caplog.text
    assert "dataloader_drop_last has no effect" in caplog.text


def test_data_that_grow_are_refused(tmp_path):
    data = subjects.examples(12)

    class Growing(TrainerCallback):
        def on_epoch_end(self, args, state, control, **named):
            data.append(data[0])

    made = private(trainer(tmp_path, data=data, named={"callbacks": [Growing()]}))
    with pytest.raises(ValueError, match="12 examples of the plan, got a data set of 13"):
        made.train()


def test_a_data_set_of_datasets_is_trained_without_its_other_columns(tmp_path):
    import datasets

    rows = [example | {"user": "somebody"} for example in subjects.examples(12)]
    made = private(trainer(tmp_path, data=datasets.Dataset.from_list(rows)))
    made.train()
    expected = _plainly_trained(subjects.model(), "texts", sequence_losses)
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)


def test_loading_in_processes_takes_the_same_steps(tmp_path):
    made = private(trainer(tmp_path, dataloader_num_workers=1))
    made.train()
    expected = _plainly_trained(subjects.model(), "texts", sequence_losses)
    assert torch.allclose(weights(made.model), expected, rtol=1e-5, atol=1e-7)
