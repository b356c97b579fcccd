"""What a model says about examples: the arrays that attacks score.

Signals are read in evaluation mode and taken in float64 from the logits: a probability near 1
rounds to 1, and with it everything that low false positive rates depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """A model's logits for B examples, and the true labels.

    Attributes:
        intent_logits: (B, K), or None for a model without intents.
        intents: (B,), likewise.
        tag_logits: (B, T, L), or None for a model without slots; not without both.
        tags: (B, T), negative where there is no tag to predict: padding must not count.
    """

    intent_logits: Tensor | None = None
    intents: Tensor | None = None
    tag_logits: Tensor | None = None
    tags: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Signals:
    """One number per example (N,) of each kind.

    Attributes:
        loss: -log p of the true intent, plus the mean over the words of -log p of the true tag, as
            far as there are any.
        intent_margin: log p_y - log Σ_{c≠y} p_c of the intent, LiRA's scaled confidence; absent
            without intents.
        slot_loss: the tags' part of the loss; absent without slots, as is `slot_margin`.
        slot_margin: mean over the words of what `intent_margin` is for the intent.
    """

    loss: Floats
    intent_margin: Floats | None = None
    slot_loss: Floats | None = None
    slot_margin: Floats | None = None

    @property
    def margins(self) -> Floats:
        """(N,) or, with intents and slots, (N, 2): for attacks that take several at once."""
        both = (self.intent_margin, self.slot_margin)
        there = [margin for margin in both if margin is not None]
        return there[0] if len(there) == 1 else np.stack(there, axis=1)

    def to_arrays(self) -> dict[str, Floats]:
        """The fields that are there, for files."""
        return {name: values for name, values in vars(self).items() if values is not None}


def collect(
    model: nn.Module, predict: Callable[[Any], Predictions], batches: Iterable[Any]
) -> Signals:
    """Read the signals of all batches, in order.

    The model is put into evaluation mode, and back: dropout would blur what it knows.

    Args:
        model: the model that `predict` runs.
        predict: batch -> logits and labels.
        batches: whatever `predict` takes; at least one.

    Raises:
        ValueError: there is no batch, or a model without intents and without slots.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [_signals(predict(batch)) for batch in batches]
    finally:
        model.train(was_training)
    if not parts:
        raise ValueError("Expected at least one batch of examples, got none: score some examples.")
    return Signals(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _signals(predictions: Predictions) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    losses = []
    if predictions.intent_logits is not None and predictions.intents is not None:
        loss, margin = _loss_and_margin(predictions.intent_logits, predictions.intents)
        losses.append(loss.numpy(force=True))
        found["intent_margin"] = margin.numpy(force=True)
    if predictions.tag_logits is not None and predictions.tags is not None:
        found |= _slot_signals(predictions.tag_logits, predictions.tags)
        losses.append(found["slot_loss"])
    if not losses:
        raise ValueError("Expected logits and labels of intents or of tags, got neither.")
    return {"loss": losses[0] if len(losses) == 1 else losses[0] + losses[1]} | found


def _slot_signals(logits: Tensor, tags: Tensor) -> dict[str, Floats]:
    known = (tags >= 0).cpu()
    words = known.sum(1).clamp(min=1)
    by_word = _loss_and_margin(logits, tags.clamp(min=0))
    loss, margin = (
        (torch.where(known, values, 0.0).sum(1) / words).numpy(force=True) for values in by_word
    )
    return {"slot_loss": loss, "slot_margin": margin}


def _loss_and_margin(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(…, K) logits and (…) labels -> -log p_y and log p_y - log Σ_{c≠y} p_c, in float64."""
    # On the CPU, as not every device has float64.
    logits, labels = logits.cpu().double(), labels.cpu()
    true = logits.gather(-1, labels[..., None])[..., 0]
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    margin = true - others.logsumexp(-1)
    return torch.nn.functional.softplus(-margin), margin
