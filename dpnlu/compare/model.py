"""Attacking a model that is already trained.

Members are the training split of the data, non-members its other splits. Reference models are
trained like the model, each on a random half of the examples in question. As members and
non-members were not drawn by coins, they may differ in more than membership: the blind baseline
measures that, and what it finds the attacks find too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from attacks.report import write_report
from dpnlu.compare.attacking import needs_references
from dpnlu.compare.reporting import build_report
from dpnlu.compare.running import (
    Finished,
    Prepared,
    Settings,
    claim_directory,
    train_references,
)
from dpnlu.compare.study import Study
from dpnlu.compare.training import Budget
from dpnlu.nlu.data import Corpus, HashedVocabulary, drop_repeated, load_corpus
from dpnlu.nlu.encoding import WordEncoding
from dpnlu.runs.model_directory import SavedModel, load
from dpnlu.runs.progress import Told
from dpnlu.runs.train import Experiment, new_classifier
from dpnlu.training.loop import ComputeConfig


def attack_model(
    directory: Path,
    out: Path,
    *,
    data: str,
    attacks: tuple[str, ...],
    references: int,
    audit_examples: int,
    confidence: float,
    physical_batch_size: int,
    device: str,
    seed: int,
    command: str,
    told: Told,
) -> dict[str, Any]:
    """Attack the model in `directory` and write a report to `out`.

    Args:
        data: SPEC; its training split is what the model was trained on.
        attacks, references, audit_examples, confidence, device, seed: as in `Settings`.

    Raises:
        ValueError: the model, the data or the output directory does not do.
    """
    if directory.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"Expected the report outside of the model {directory}, which nothing may be added to, "
            f"got {out}: choose another folder."
        )
    saved = load(directory)
    settings = Settings(
        data=data,
        model=saved.classifier.architecture.name,
        epsilons=(saved.metrics.get("epsilon", math.inf),),
        delta=saved.plan.target_delta if saved.plan else 1e-5,
        attacks=attacks,
        references=references,
        audit_examples=audit_examples,
        confidence=confidence,
        physical_batch_size=physical_batch_size,
        device=device,
        seed=seed,
    )
    corpus, repeats = drop_repeated(load_corpus(data, seed=seed))
    study = _study(corpus, settings)
    budget = _budget(saved, corpus, study, settings, name=directory.name)
    prepared = Prepared(settings, corpus, repeats, study, (budget,))
    study.check_sides(for_references=needs_references(attacks))
    if references > 0:
        new_classifier(budget.experiment, seed=seed)  # now, and not after files were written
    saved.classifier.model.to(budget.experiment.compute.device)
    target = budget.read(saved.classifier, 0)
    claim_directory(out, settings)
    models = [target, *train_references(settings, budget, out, told)]
    finished = Finished(budget, models, saved.metrics)
    report = build_report(prepared, [finished], command=command)
    write_report(report, out)
    return report


def _study(corpus: Corpus, settings: Settings) -> Study:
    """As many members as non-members, at most as asked for; references on random halves."""
    rng = np.random.default_rng([settings.seed, 1])
    held_out = (*corpus.split("test"), *corpus.split("valid"))
    size = min(settings.audit_examples // 2, len(held_out), len(corpus.split("train")))
    chosen = [
        *(corpus.split("train")[i] for i in rng.permutation(len(corpus.split("train")))[:size]),
        *(held_out[i] for i in rng.permutation(len(held_out))[:size]),
    ]
    halves = rng.random((settings.references, 2 * size)) < 0.5
    truth = np.arange(2 * size) < size
    return Study(base=(), audit=tuple(chosen), coins=np.concatenate([truth[None], halves]))


def _budget(
    saved: SavedModel, corpus: Corpus, study: Study, settings: Settings, *, name: str
) -> Budget:
    encoding = saved.classifier.encoding
    words = encoding.vocabulary if isinstance(encoding, WordEncoding) else HashedVocabulary()
    experiment = Experiment(
        architecture=saved.classifier.architecture,
        recipe=saved.recipe,
        labels=encoding.labels,
        vocabulary=words,
        compute=ComputeConfig(
            physical_batch_size=settings.physical_batch_size, device=settings.device
        ),
    )
    return Budget(
        name=name,
        target_epsilon=saved.metrics.get("epsilon"),
        study=study,
        experiment=experiment,
        plan=saved.plan,
        test=corpus.split("test"),
        seed=settings.seed,
    )
