"""What came of a training: the numbers in metrics.json, and the directory that holds the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.data import Example
from dpnlu.runs.experiment import Experiment
from dpnlu.runs.model_card import model_card
from dpnlu.runs.model_directory import ModelDirectoryError, save
from dpnlu.runs.train import Trained, measure


@dataclass(frozen=True, kw_only=True)
class Results:
    """How well a model does, and what training it took; None: not measured, absent in the file.

    Attributes:
        intent_accuracy, slot_f1, frame_accuracy, examples: as in `dpnlu.nlu.metrics.Metrics`.
        train_seconds: wall time.
        steps: optimizer steps.
        peak_memory_mib: peak memory during training; see `Trained`.
        epsilon, delta: what the ledger says was spent; None: ordinary training.
        physical_batch_size: that was found to fit into memory; None: it was not asked for.
        public_use: when public data were learnt from; see `TrainSettings`. None: there were none.
    """

    intent_accuracy: float | None = None
    slot_f1: float | None = None
    frame_accuracy: float
    examples: int
    train_seconds: float
    steps: int
    peak_memory_mib: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    physical_batch_size: int | None = None
    public_use: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of metrics.json."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Results:
        """The results that `to_dict` described; what another version measured besides is left out.

        Raises:
            ModelDirectoryError: one that every training has is missing.
        """
        for field in fields(cls):
            if field.default is MISSING and field.name not in content:
                raise ModelDirectoryError(
                    f"Expected metrics of a training, got some without {field.name!r}: restore "
                    "metrics.json, or train again."
                )
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})


def results_of(
    trained: Trained, examples: Sequence[Example], *, plan: PrivacyPlan | None
) -> Results:
    """The results of a training, the classifier measured on examples.

    Args:
        plan: what it was trained under; None: ordinary training.
    """
    spent, measured = trained.result.epsilon, measure(trained.classifier, examples)
    return Results(
        intent_accuracy=measured.intent_accuracy,
        slot_f1=measured.slot_f1,
        frame_accuracy=measured.frame_accuracy,
        examples=measured.examples,
        train_seconds=trained.result.seconds,
        steps=trained.result.steps,
        peak_memory_mib=trained.peak_memory_mib,
        epsilon=spent,
        delta=None if plan is None or spent is None else plan.target_delta,
    )


def save_trained(
    trained: Trained,
    directory: Path,
    *,
    experiment: Experiment,
    plan: PrivacyPlan | None,
    ledger: Ledger | None,
    results: Results,
    not_covered: Sequence[str],
) -> None:
    """Write what a model directory holds besides the ledger, the model card included.

    Args:
        ledger: of the training; its file is in the directory already. None: ordinary training.
        not_covered: as in `model_card`.
    """
    card = model_card(
        architecture=experiment.architecture,
        plan=plan,
        ledger=ledger,
        not_covered=not_covered,
        metrics=results.to_dict(),
    )
    save(
        trained.classifier,
        directory,
        recipe=experiment.recipe,
        plan=plan,
        metrics=results.to_dict(),
        card=card,
    )
