"""A trained model, ready to be used: it answers, states its ε, and is exported to transformers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from dpnlu.mechanism.durable import make_directory, write_text
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.ranges import check_count
from dpnlu.mechanism.selection import Selection
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data.errors import located
from dpnlu.nlu.prediction import Prediction, predict, read
from dpnlu.nlu.utterances import utterance
from dpnlu.runs import model_directory
from dpnlu.runs.exported import heads_in_words
from dpnlu.runs.model_directory import CARD, LEDGER, PLAN, SELECTION
from dpnlu.training.device import CPU, resolved_device

BATCH_SIZE = 64


@dataclass(frozen=True)
class LoadedModel:
    """What `dpnlu.load` returns.

    Attributes:
        classifier: the model and the way it reads text.
        plan: what private training kept to; None after ordinary training.
        metrics: what metrics.json holds.
        directory: where it was loaded from.
        ledger: what was released; None without a plan.
        selection: of which trainings it is the best; None: there was one.
    """

    classifier: Classifier
    plan: PrivacyPlan | None
    metrics: dict[str, Any]
    directory: Path
    ledger: Ledger | None
    selection: Selection | None = None

    @property
    def model(self) -> nn.Module:
        """The network, in evaluation mode."""
        return self.classifier.model

    @cached_property
    def epsilon(self) -> float | None:
        """ε that training has spent, at the plan's δ, from the ledger, or that of the choice among
        several trainings; None without a plan."""
        if self.plan is None or self.ledger is None:
            return None
        if self.selection is None:
            return self.ledger.epsilon()
        return self.selection.epsilon(self.plan.events(), delta=self.plan.target_delta)

    def predict(self, texts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """Intent, probability and slots of each text, in order.

        A text is cut into tokens as data that come without tokens are. No answer depends on the
        other texts, but for rounding.

        Args:
            batch_size: texts computed at once, >= 1.

        Raises:
            DataError: a text is blank, no valid Unicode, or longer than the model reads.
            TypeError: one text is given instead of a list of them.
        """
        if isinstance(texts, str):
            raise TypeError("Expected a list of texts, got one text: write predict([text]).")
        check_count("batch_size", batch_size)
        readings = []
        for number, text in enumerate(texts, start=1):
            with located(f"Text {number}"):
                readings.append(read(self.classifier, utterance(text)))
        starts = range(0, len(readings), batch_size)
        pieces = [predict(self.classifier, readings[at : at + batch_size]) for at in starts]
        return [prediction for piece in pieces for prediction in piece]

    def export(self, directory: Path | str) -> None:
        """Write the encoder and its tokenizer as transformers alone loads them.

            AutoModel.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)

        The heads are beside them, in heads.safetensors, with their labels in heads.json; no class
        of transformers computes what they do, which README.md says in words. The statement of ε,
        the plan and the ledger go with the weights.

        Args:
            directory: a new or an empty one, outside of the model's.

        Raises:
            ValueError: the model has no encoder, or something is at that place.
        """
        out = Path(directory)
        if not self.classifier.architecture.is_encoder:
            raise ValueError(
                "Expected a model with a Hugging Face encoder, got a BiLSTM, of which transformers "
                "knows nothing: use dpnlu.load instead."
            )
        _check_free(out, self.directory)
        make_directory(out)
        model_directory.export(self.classifier, out)
        for name in (PLAN, LEDGER, SELECTION):
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, out / name)
        card = (self.directory / CARD).read_text(encoding="utf-8")
        write_text(out / CARD, f"{card}\n{heads_in_words(self.classifier.architecture)}")


def load(directory: Path | str, *, device: str = CPU) -> LoadedModel:
    """Load a model that `dpnlu train` made, or a study.

    Args:
        directory: of the model.
        device: where it is to compute: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        ModelDirectoryError: it holds no model, or a file was changed, added or removed.
        LedgerError: the model has a plan and no ledger.
        ValueError: there is no such device.
    """
    home, place = Path(directory), resolved_device(device)
    saved = model_directory.load(home)
    saved.classifier.model.eval().to(place)
    ledger = None if saved.plan is None else Ledger.read(home / LEDGER)
    return LoadedModel(saved.classifier, saved.plan, saved.metrics, home, ledger, saved.selection)


def _check_free(out: Path, model: Path) -> None:
    if model.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"Expected a folder outside of the model {model}, which nothing may be added to, got "
            f"{out}: choose another folder."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected {out} to be new or empty, found something: choose another.")
