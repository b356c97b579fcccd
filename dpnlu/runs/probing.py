"""The physical batch size of one of our own classifiers, found out on random texts."""

from __future__ import annotations

import numpy as np

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import LONGEST_TEXT, Labels, encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.models import Batch, EncoderClassifier, moved
from dpnlu.runs.physical_size import UnknownMemoryError, physical_batch_size
from dpnlu.training.loop import ComputeConfig, Recipe

# So many different texts, over and over, fill any batch.
_TEXTS = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def found_size(
    classifier: Classifier,
    *,
    plan: PrivacyPlan | None,
    recipe: Recipe,
    num_examples: int,
    compute: ComputeConfig,
) -> int:
    """The largest physical batch whose step fits into memory, by `physical_batch_size`.

    Guarantee: it follows from the model, its label sets, the plan and this machine's memory. Of the
    training data nothing is looked at, not even the length of a text: random ones have as many
    words as an encoder reads, which is more than utterances have.

    Args:
        classifier: goes to the device of `compute`.
        plan: None: ordinary training, whose steps take no more than private ones; these are tried.
        recipe: no more is found for ordinary training than its batch has.
        num_examples: of the training set.

    Raises:
        ValueError: memory is unknown here, or not even one example fits.
    """
    device = compute.device
    model = classifier.model.to(device).train()
    encoded = encode_all(classifier.encoding, random_texts(classifier.encoding.labels, _TEXTS))
    if isinstance(model, EncoderClassifier) and classifier.architecture.freeze_encoder:
        encoded = read_once(model, classifier.encoding, encoded)

    def random_batch(size: int) -> Batch:
        texts = [encoded[place % _TEXTS] for place in range(size)]
        return moved(classifier.encoding.collate(texts), next(model.parameters()).device)

    try:
        found = physical_batch_size(
            model,
            plan or _instead(recipe, num_examples),
            model.per_example_loss,
            random_batch,
            engine=compute.engine,
        )
    except UnknownMemoryError:
        raise ValueError(
            f"Expected a number for --physical-batch-size on {device}, where this system does not "
            "say how much memory there is, got auto: give one."
        ) from None
    return found if plan is not None else min(found, recipe.batch_size)


def random_texts(labels: Labels, count: int) -> list[Example]:
    """Texts of words that mean nothing, as long as an encoder reads them, with labels."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        words = tuple("".join(rng.choice(list(_LETTERS), 6)) for _ in range(LONGEST_TEXT))
        found.append(
            Example(
                id=f"train-{number:05}",
                text=" ".join(words),
                tokens=words,
                tags=("O",) * len(words) if labels.tags else None,
                intent=labels.intents[number % len(labels.intents)] if labels.intents else None,
                split="train",
            )
        )
    return found


def _instead(recipe: Recipe, num_examples: int) -> PrivacyPlan:
    """A plan for batches of the recipe, by which nothing is ever trained."""
    return PrivacyPlan(
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        sample_rate=min(1.0, recipe.batch_size / num_examples),
        steps=1,
        target_delta=1e-12,
        num_examples=num_examples,
    )
