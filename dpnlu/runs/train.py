"""One training, from examples to a trained classifier and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Classifier, build
from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import Encoded, encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.metrics import Metrics, evaluate, mean_loss
from dpnlu.nlu.models import EncoderClassifier
from dpnlu.runs.experiment import Experiment, users_of
from dpnlu.runs.resources import memory_of
from dpnlu.training.checkpoint import Checkpoints
from dpnlu.training.loop import ComputeConfig, FitResult, Progress, Randomness, Recipe, fit
from dpnlu.training.public import PublicExamples


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained classifier, and what training it took.

    Attributes:
        peak_memory_mib: peak memory during training, the process's resident memory or, trained on
            CUDA, what torch took there; None: unknown here.
    """

    classifier: Classifier
    result: FitResult
    peak_memory_mib: float | None


def new_classifier(experiment: Experiment, *, seed: int) -> Classifier:
    """The classifier before training: random weights from the seed, or a pretrained encoder.

    Raises:
        ValueError: there is no such encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_entropy(seed, _WEIGHTS))
        return build(experiment.architecture, experiment.labels, experiment.vocabulary)


def train(
    classifier: Classifier,
    examples: Sequence[Example],
    *,
    recipe: Recipe,
    compute: ComputeConfig,
    plan: PrivacyPlan | None,
    seed: int,
    repeatable_noise: bool = False,
    system_noise: bool = False,
    ledger: Ledger | Path | None = None,
    checkpoints: Checkpoints | None = None,
    on_progress: Progress | None = None,
    validation: Sequence[Example] = (),
    public: PublicExamples | None = None,
) -> Trained:
    """Train a classifier.

    Args:
        plan: None for ordinary training. With users as its unit they are named by the examples.
        seed: of dropout and the order of ordinary batches.
        repeatable_noise: take noise and sampling from the seed as well. For studies only: who knows
            the seed can subtract the noise.
        system_noise: draw it all from the system's entropy; see `privatize`.
        ledger, checkpoints: see `privatize` and `Checkpoints`.
        on_progress: called after every step.
        validation: what early stopping looks at, where the recipe has patience.
        public: `Example`s that are learnt from beside the private ones, and how.

    Raises:
        ValueError: as `fit`, for example patience without validation examples.
    """
    # Private physical batches are of neighbours; those of like length need little padding.
    examples = sorted(examples, key=lambda example: len(example.tokens))
    encoded = encode_all(classifier.encoding, examples)
    if public is not None:
        public = _encoded(public, classifier, seed=seed, repeatable=repeatable_noise)
    started = time.perf_counter()
    classifier.model.to(compute.device)
    encoded = _read(classifier, encoded)
    if public is not None:
        public = replace(public, examples=_read(classifier, public.listed()))
    prepared = time.perf_counter() - started
    memory = memory_of(compute.device)
    memory.reset_peak()
    with torch.random.fork_rng(devices=_cuda(compute.device)):
        torch.manual_seed(_entropy(seed, _DROPOUT))
        result = fit(
            classifier.model,
            encoded,
            loss=classifier.model.per_example_loss,
            collate=classifier.encoding.collate,
            recipe=recipe,
            plan=plan,
            compute=compute,
            randomness=_randomness(
                seed,
                repeatable=plan is None or repeatable_noise,
                device=compute.device,
                system_noise=system_noise,
            ),
            users=users_of(examples) if plan is not None and plan.unit == "user" else None,
            ledger=ledger,
            checkpoints=checkpoints,
            progress=on_progress,
            validation_loss=_loss_on(classifier, validation) if validation else None,
            public=public,
        )
    result = replace(result, seconds=prepared + result.seconds)
    return Trained(classifier=classifier, result=result, peak_memory_mib=memory.peak())


def measure(classifier: Classifier, examples: Sequence[Example]) -> Metrics:
    """How well a classifier does on examples."""
    encoded = encode_all(classifier.encoding, examples)
    return evaluate(classifier.model, classifier.encoding, encoded, examples)


def _encoded(
    public: PublicExamples, classifier: Classifier, *, seed: int, repeatable: bool
) -> PublicExamples:
    """The tensors of public examples, drawn from the seed where that is asked for."""
    public = replace(public, examples=encode_all(classifier.encoding, public.listed()))
    if not repeatable:
        return public
    return replace(public, rng=np.random.default_rng(_entropy(seed, _PUBLIC)))


def _read(classifier: Classifier, encoded: list[Encoded]) -> list[Encoded]:
    """Examples as the model reads them: what a frozen encoder makes of them is computed once."""
    model = classifier.model
    if isinstance(model, EncoderClassifier) and classifier.architecture.freeze_encoder:
        return read_once(model, classifier.encoding, encoded)
    return encoded


def _loss_on(classifier: Classifier, examples: Sequence[Example]) -> Callable[[], float]:
    encoded = encode_all(classifier.encoding, examples)
    return lambda: mean_loss(classifier.model, classifier.encoding, encoded)


# Uses of a seed, kept apart.
_WEIGHTS, _DROPOUT, _ORDER, _NOISE, _PUBLIC = range(5)


def _entropy(seed: int, use: int) -> int:
    return int(np.random.SeedSequence([seed, use]).generate_state(1, np.uint64)[0] >> 1)


def _cuda(device: str) -> list[torch.device]:
    """The device, if its chance is to be put back like that of the CPU, which always is."""
    return [torch.device(device)] if device.startswith("cuda") else []


def _randomness(seed: int, *, repeatable: bool, device: str, system_noise: bool) -> Randomness:
    if not repeatable:
        order = np.random.default_rng()
        return Randomness(order=order, noise="system" if system_noise else None)
    return Randomness(
        order=np.random.default_rng(_entropy(seed, _ORDER)),
        noise=torch.Generator(device=device).manual_seed(_entropy(seed, _NOISE)),
    )
