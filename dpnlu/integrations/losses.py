"""Per-example losses of logits: what Hugging Face models compute as one mean, example by example.

The mean over the batch of what is computed here is the model's own loss of texts; for tokens it
differs where examples have different numbers of them, since there each example counts alike.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

# What the losses of transformers leave out.
IGNORED = -100


def sequence_losses(
    logits: Tensor, labels: Tensor, *, problem: str | None = None, smoothing: float = 0.0
) -> Tensor:
    """(B,) losses of whole texts.

    Args:
        logits: (B, K).
        labels: (B,) classes; or, for regression or several labels at once, (B, K).
        problem: "regression", "single_label_classification" or "multi_label_classification"; None:
            by the shape and type of logits and labels, as transformers does.
        smoothing: share of the label that is spread over all classes, in [0, 1); of single labels.

    Raises:
        ValueError: another problem.
    """
    logits = logits.float()
    problem = problem or _problem(logits, labels)
    if problem == "regression":
        wanted = labels.reshape(len(logits), -1).to(logits.dtype)
        return (logits - wanted).square().mean(1)
    if problem == "single_label_classification":
        return F.cross_entropy(
            logits,
            labels.reshape(-1),
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=smoothing,
        )
    if problem == "multi_label_classification":
        wanted = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    raise ValueError(
        "Expected `problem_type` to be regression, single_label_classification or "
        f"multi_label_classification, got {problem!r}: give `per_example_loss` for other problems."
    )


def token_losses(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """(B,) losses of the tokens of each text, each the mean over the text's own labelled tokens.

    Args:
        logits: (B, T, K).
        labels: (B, T) classes; -100 is left out. A text without labelled tokens has loss 0.
        smoothing: see `sequence_losses`.
    """
    by_token = F.cross_entropy(
        logits.float().mT,
        labels,
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    return by_token.sum(1) / labelled_tokens(labels).clamp(min=1)


def labelled_tokens(labels: Tensor) -> Tensor:
    """(B,) how many tokens of each text have a label."""
    return (labels != IGNORED).sum(1)


def _problem(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[1] == 1:
        return "regression"
    is_class = not labels.is_floating_point()
    return "single_label_classification" if is_class else "multi_label_classification"
