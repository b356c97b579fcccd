"""Per-example losses are those that the model, or the Trainer, says of each example alone."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from dpnlu.integrations.losses import labelled_tokens, sequence_losses, token_losses
from tests.dpnlu.integrations import subjects

BATCH, CLASSES, LENGTH = 5, 4, 6


def _alone(model, inputs):
    """The model's own loss of each example."""
    rows = range(len(inputs["input_ids"]))
    return torch.stack(
        [model(**{name: v[row : row + 1] for name, v in inputs.items()}).loss for row in rows]
    )


@dataclass(frozen=True)
class Case:
    """What a classifier may be asked."""

    size: int
    labels: Tensor
    problem: str | None


def _cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)
    number = torch.randn(BATCH, generator=generator)
    numbers = torch.randn(BATCH, CLASSES, generator=generator)
    classes = torch.tensor([0, 3, 1, 1, 2])
    several = (numbers > 0).float()
    return {
        "a number": Case(1, number, "regression"),
        "a number, not declared": Case(1, number, None),
        "numbers": Case(CLASSES, numbers, "regression"),
        "a class": Case(CLASSES, classes, "single_label_classification"),
        "a class, not declared": Case(CLASSES, classes, None),
        "classes": Case(CLASSES, several, "multi_label_classification"),
        "classes, not declared": Case(CLASSES, several, None),
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_a_text_has_the_loss_that_its_model_gives_it(name):
    case = CASES[name]
    model = subjects.model(num_labels=case.size, problem_type=case.problem).eval()
    words = torch.randint(1, subjects.WORDS, (BATCH, LENGTH))
    found = sequence_losses(model(input_ids=words).logits, case.labels, problem=case.problem)
    alone = _alone(model, {"input_ids": words, "labels": case.labels})
    assert torch.allclose(found, alone, atol=1e-6)


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match=r"problem_type.*ranking.*per_example_loss"):
        sequence_losses(torch.zeros(2, 3), torch.zeros(2).long(), problem="ranking")


@pytest.fixture
def tagged():
    """Tokens of which some have no label."""
    labels = torch.randint(CLASSES, (BATCH, LENGTH))
    labels[:, 0] = -100
    labels[1, 2:] = -100
    return torch.randn(BATCH, LENGTH, CLASSES), labels


def test_a_tagged_text_has_the_loss_that_its_model_gives_it():
    model = subjects.model("tokens").eval()
    inputs = subjects.collate(subjects.examples(BATCH, "tokens"))
    found = token_losses(
        model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
    )
    assert torch.allclose(found, _alone(model, inputs), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_smoothed_losses_are_those_of_the_trainer_s_smoother(tagged, smoothing):
    smoother, (logits, labels) = LabelSmoother(epsilon=smoothing), tagged
    alone = [smoother((logits[i : i + 1],), labels[i : i + 1]) for i in range(BATCH)]
    assert torch.allclose(token_losses(logits, labels, smoothing=smoothing), torch.stack(alone))
    of_texts = [smoother((logits[i : i + 1, 1],), labels[i : i + 1, 1]) for i in range(BATCH)]
    found = sequence_losses(logits[:, 1], labels[:, 1], smoothing=smoothing)
    assert torch.allclose(found, torch.stack(of_texts))


def test_a_text_without_labels_has_no_loss(tagged):
    logits, labels = tagged
    labels[3] = -100
    assert token_losses(logits, labels)[3] == 0
    assert token_losses(logits, labels).isfinite().all()
    assert labelled_tokens(labels).tolist() == [5, 1, 5, 0, 5]
