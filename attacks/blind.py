"""Can members be told from non-members without any model? Then no attack result means anything.

Das et al. (2024) show that blind baselines beat published attacks wherever members and non-members
were not drawn alike. Run this before believing a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse, special
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from attacks._validate import Bools, bools, count, open_unit, strings
from attacks.metrics import auc, auc_interval


@dataclass(frozen=True, kw_only=True)
class BlindBaseline:
    """How well membership can be guessed from the examples alone.

    Attributes:
        auc: of the cross-fitted guess; 0.5 when members and non-members are drawn alike.
        interval: its confidence interval.
        suspicious: whether the interval lies above 0.5, so that attack results on this split
            measure the split and not the model.
    """

    auc: float
    interval: tuple[float, float]
    suspicious: bool


def blind_baseline(
    texts: Sequence[str],
    is_member: ArrayLike,
    *,
    rng: np.random.Generator,
    labels: Sequence[str] | None = None,
    folds: int = 5,
    confidence: float = 0.95,
) -> BlindBaseline:
    """Guess membership from words, length and label by a cross-fitted logistic regression.

    Every example is scored by a regression that was fitted without it. On a fair split the verdict
    is "suspicious" with probability at most about (1 - confidence) / 2.

    Args:
        texts: N texts, without duplicates (a text that is on both sides is no non-member).
        is_member: `(N,)`, Boolean.
        rng: deals the examples into folds.
        labels: N labels, such as intents, as further evidence.
        folds: at least 2, at most the number of members or of non-members.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: for texts or labels that are no strings, texts that are all blank, lengths that
            differ, too few members or non-members for the folds, or a confidence out of range.
    """
    texts = strings("texts", texts)
    if not any(text.strip() for text in texts):
        raise ValueError(
            "Expected texts with words, got blank ones only: pass what was trained on."
        )
    members = bools("is_member", is_member, shape=(len(texts),))
    smaller = int(min(members.sum(), (~members).sum()))
    if not 2 <= count("folds", folds) <= smaller:
        raise ValueError(
            f"Expected 2 <= folds <= {smaller}, the smaller side's size, got {folds}: "
            "lower `folds`, or give more members and non-members."
        )
    labels = None if labels is None else strings("labels", labels)
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"Expected one label for each of {len(texts)} texts, got {len(labels)}.")
    scores = _cross_fit(_features(texts, labels), members, folds=folds, rng=rng)
    interval = auc_interval(scores, members, confidence=_for_doubled_variance(confidence))
    return BlindBaseline(auc=auc(scores, members), interval=interval, suspicious=interval[0] > 0.5)


def _for_doubled_variance(confidence: float) -> float:
    """The nominal confidence at which an interval for independent scores has this coverage.

    Cross-fitted scores are not independent: on a fair split, what two examples in different folds
    have in common counts twice, as either is scored by the other, which doubles the variance.
    """
    error = 1 - open_unit("confidence", confidence)
    z = np.sqrt(2) * special.ndtri(error / 2)
    # What rounds to 0 or 1 is no confidence any more.
    limits = np.finfo(np.float64)
    return float(np.clip(1 - 2 * special.ndtr(z), limits.tiny, 1 - limits.epsneg))


def _features(texts: Sequence[str], labels: Sequence[str] | None) -> Any:
    """Words and word pairs, standardised lengths, and the label, as one sparse matrix (N, F)."""
    words = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2)).fit_transform(texts)
    lengths = np.array([[len(text), len(text.split())] for text in texts], dtype=np.float64)
    parts = [words, StandardScaler().fit_transform(lengths)]
    if labels is not None:
        parts.append(OneHotEncoder().fit_transform(np.asarray(labels).reshape(-1, 1)))
    return sparse.hstack(parts, format="csr")


def _cross_fit(features: Any, members: Bools, *, folds: int, rng: np.random.Generator) -> Any:
    """Score each example by a regression fitted on the other folds."""
    seed = int(rng.integers(2**31))
    return cross_val_predict(
        LogisticRegression(solver="liblinear"),
        features,
        members,
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
        method="decision_function",
    )
