"""Guarantee: one example moves what a whole step of a wrapped trainer releases by C at most."""

from typing import Any

import pytest
import torch
from transformers import Trainer

import dpnlu
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import plan, private, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

BOUND, COUNT = 0.5, 7


class Weighted(Trainer):
    """A user's own loss, of which long texts get more."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
        losses = losses * inputs["attention_mask"].sum(1)
        return (losses, outputs) if return_outputs else losses


def _mean_over_the_batch_s_tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The usual mistake, made to look like per-example losses: a long text changes all others."""
    labels = inputs["labels"]
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return losses.sum(1) / (labels != -100).sum() * len(labels)


TRAINERS: dict[str, dict[str, Any]] = {
    "texts": {"task": "texts"},
    "tokens": {"task": "tokens"},
    "smoothed texts": {"task": "texts", "label_smoothing_factor": 0.3},
    "smoothed tokens": {"task": "tokens", "label_smoothing_factor": 0.3},
    "adapters": {"task": "texts", "subject": subjects.lora},
    "adapters, tokens": {"task": "tokens", "subject": subjects.lora},
    "accumulation": {"task": "tokens", "per_device_train_batch_size": 1},
    "a subclass": {"task": "texts", "kind": Weighted},
}


def _released(folder: Any, kept: list[int], bound: float, **ordinary: Any) -> torch.Tensor:
    """The sum over all examples that are kept, from one step of a trainer, without noise."""
    task, chosen = ordinary["task"], {}
    if "per_example_loss" in ordinary:
        chosen = {"per_example_loss": ordinary.pop("per_example_loss")}
    if "subject" in ordinary:
        ordinary["subject"] = ordinary["subject"](task)
    data = [subjects.examples(COUNT, task)[number] for number in kept]
    all_of_them = plan(sample_rate=1.0, steps=1, num_examples=len(kept), max_grad_norm=bound)
    made = private(
        trainer(folder / str(kept), data=data, max_steps=1, **ordinary),
        plan=all_of_them,
        **chosen,
    )
    made.train()
    return subjects.flat(made.private.gradients)


def _most(folder: Any, ordinary: dict[str, Any], bound: float = BOUND) -> float:
    """How far the absence of an example moves the sum, at most."""
    everybody = list(range(COUNT))
    whole = _released(folder, everybody, bound, **ordinary)
    gone = [[one for one in everybody if one != left] for left in (0, 3, COUNT - 1)]
    return max(float((whole - _released(folder, kept, bound, **ordinary)).norm()) for kept in gone)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_example_moves_a_step_by_the_bound_at_most(tmp_path, name):
    """… and by all of it, since these gradients are longer."""
    moved = _most(tmp_path, TRAINERS[name])
    assert BOUND * 0.999 < moved <= BOUND * (1 + 1e-5)


def test_the_measure_sees_the_usual_mistake(tmp_path):
    """If nothing is checked, and where most gradients are within the bound."""
    wrong = {"task": "tokens", "per_example_loss": _mean_over_the_batch_s_tokens}
    wrong |= {"per_device_train_batch_size": COUNT}
    assert _most(tmp_path, wrong, bound=1.0) > 1.05


def test_the_usual_mistake_is_refused_before_a_release(tmp_path):
    made = private(
        trainer(tmp_path, task="tokens", data=subjects.examples(COUNT, "tokens")),
        plan=plan(num_examples=COUNT, sample_rate=1.0),
        per_example_loss=_mean_over_the_batch_s_tokens,
        verify=True,
    )
    with pytest.raises(dpnlu.UnsupportedLayerError, match="depend"):
        made.train()
    assert len(made.private.ledger) == 0
