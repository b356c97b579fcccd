"""The helper for users' tests passes what is private, and sees each way not to be."""

from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dpnlu
import dpnlu.training.logical_batch
from dpnlu.engines.outcome import ClipOutcome
from dpnlu.testing import assert_private_step
from tests.dpnlu.integrations import subjects

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

SIZE = 5


@pytest.fixture
def plan(make_plan):
    return make_plan(noise_multiplier=0.7, max_grad_norm=0.8)


class Words(nn.Module):
    """A classifier of bags of words."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)

    def forward(self, words):
        return self.head(self.dropout(self.embedding(words).tanh().mean(1)))


@pytest.fixture
def batch():
    return torch.randint(20, (SIZE, 4)), torch.randint(3, (SIZE,))


def _losses_of(model):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")


Pair = namedtuple("Pair", ["words", "labels"])
FORMS = {
    "tuple": lambda words, labels: (words, labels),
    "list": lambda words, labels: [words, labels],
    "named tuple": Pair,
    "dictionary": lambda words, labels: {0: words, 1: labels},
    "nested": lambda words, labels: (words, labels, {"name": "a batch", "scale": torch.ones(())}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_private_step_passes_whatever_holds_the_batch(plan, batch, form):
    model = Words()
    assert_private_step(model, _losses_of(model), FORMS[form](*batch), plan)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_changed_by_looking(plan, batch, dropout):
    model = Words(dropout)
    model.head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert_private_step(model, _losses_of(model), batch, plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.head.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("task", ["texts", "tokens"])
def test_an_encoder_passes(plan, task):
    from dpnlu.integrations.losses import sequence_losses, token_losses

    model = subjects.model(task)
    losses = sequence_losses if task == "texts" else token_losses

    def losses_of(batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return losses(model(**inputs).logits, batch["labels"])

    data = subjects.collate(subjects.examples(SIZE, task))
    assert_private_step(model, losses_of, data, plan)


def test_adapters_pass_though_one_factor_begins_as_zero(plan):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = get_peft_model(subjects.model(), config)

    def losses_of(batch):
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    assert_private_step(model, losses_of, subjects.collate(subjects.examples(SIZE)), plan)


def test_a_batch_of_one_passes(plan, batch):
    model = Words()
    words, labels = batch
    assert_private_step(model, _losses_of(model), (words[:1], labels[:1]), plan)


def test_a_batch_that_holds_no_tensors_is_selected_from_by_a_function(plan, batch):
    model = Words()
    pairs = list(zip(batch[0].tolist(), batch[1].tolist(), strict=True))

    def losses_of(pairs):
        words, labels = zip(*pairs, strict=True)
        return _losses_of(model)((torch.tensor(words), torch.tensor(labels)))

    def select(pairs, chosen):
        return [pairs[number] for number in chosen]

    assert_private_step(model, losses_of, pairs, plan, select=select, engine="per_example")
    with pytest.raises(dpnlu.UnsupportedLayerError, match="every use of a trainable parameter"):
        assert_private_step(model, losses_of, pairs, plan, select=select)


def test_micro_batches_are_refused(make_plan, batch):
    model = Words()
    plan = make_plan(clipping_unit="microbatch", microbatches=2)
    with pytest.raises(ValueError, match="clips a microbatch"):
        assert_private_step(model, _losses_of(model), batch, plan)


def test_bounds_that_public_examples_tell_are_refused(plan, batch):
    model, plan = Words(), replace(plan, clipping="public:0.5")
    with pytest.raises(ValueError, match=r"got clipping='public:0.5'.* replace it by 'flat'"):
        assert_private_step(model, _losses_of(model), batch, plan)


# ---- what is seen ----------------------------------------------------------------------------


def test_a_loss_that_depends_on_others_is_seen(plan, batch):
    """Nobody counts unless one is there; no gradient tells."""
    model, first = Words(), batch[0][0]

    def losses_of(batch):
        losses = _losses_of(model)(batch)
        return losses * (batch[0] == first).all(1).any()

    with pytest.raises(AssertionError, match=r"without example 0 it moves by"):
        assert_private_step(model, losses_of, batch, replace(plan, max_grad_norm=0.1))


def test_gradients_that_are_not_clipped_are_seen(plan, batch, monkeypatch):
    """An engine that adds up twice as much as it says."""
    model = Words()
    add = dpnlu.training.logical_batch.LogicalBatch.add

    def added_twice(self, outcome: ClipOutcome) -> None:
        add(self, outcome)
        add(self, outcome)

    monkeypatch.setattr(dpnlu.training.logical_batch.LogicalBatch, "add", added_twice)
    with pytest.raises(AssertionError, match=r"more than 0\.1, but without"):
        assert_private_step(model, _losses_of(model), batch, replace(plan, max_grad_norm=0.1))


@pytest.mark.parametrize("factor", [0.0, 2 / 3, 0.9, 1.1, 3 / 2])
def test_other_noise_than_planned_is_seen(plan, batch, monkeypatch, factor):
    model = Words()
    fill = dpnlu.training.logical_batch.fill_gaussian

    def scaled(tensors, *, std, generators):
        fill(tensors, std=std * factor, generators=generators)

    monkeypatch.setattr(dpnlu.training.logical_batch, "fill_gaussian", scaled)
    with pytest.raises(AssertionError, match=r"standard deviation 0\.56 in all parameters"):
        assert_private_step(model, _losses_of(model), batch, plan)


def test_a_parameter_without_noise_is_seen(plan, batch, monkeypatch):
    """… though the others have so much that all together are nearly right."""
    model = Words()
    fill = dpnlu.training.logical_batch.fill_gaussian

    def forgetful(tensors, *, std, generators):
        tensors = list(tensors)
        fill(tensors, std=std, generators=generators)
        tensors[-1].zero_()  # the bias, three numbers of 141

    monkeypatch.setattr(dpnlu.training.logical_batch, "fill_gaussian", forgetful)
    with pytest.raises(AssertionError, match=r"noise of standard deviation 0\.56 in head\.bias"):
        assert_private_step(model, _losses_of(model), batch, plan)


def test_a_parameter_that_no_gradient_reaches_is_seen(plan, batch):
    model = Words()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"none reaches spare\.weight \(2 in all\)"):
        assert_private_step(model, _losses_of(model), batch, plan)
    unused = {"spare.weight", "spare.bias"}
    assert_private_step(model, _losses_of(model), batch, plan, unused=unused)


def test_an_optimizer_of_frozen_copies_is_seen(plan, batch):
    """The adapters that were added after the optimizer was made."""
    model = Words()
    optimizer = torch.optim.Adam(model.parameters())
    model.head = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="the model's own parameters"):
        assert_private_step(model, _losses_of(model), batch, plan, optimizer=optimizer)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_weight_that_is_moved_by_something_else_is_seen(plan, batch, is_frozen):
    """A count of batches in a parameter, say."""
    model = Words()
    model.mean = nn.Parameter(torch.zeros(6), requires_grad=not is_frozen)

    def losses_of(batch):
        model.mean.data += 0.1
        losses = _losses_of(model)(batch)
        return losses if is_frozen else losses + 0.0 * model.mean.sum()

    with pytest.raises(AssertionError, match="mean to move by what was released alone"):
        assert_private_step(model, losses_of, batch, plan, unused={"mean"})
