"""How well scores tell members from non-members: ROC, AUC, TPR at a small FPR, advantage.

Everywhere `scores (N,)` is larger for an example that is more likely a member, and
`is_member (N,)` is the truth. Scores may be infinite, never NaN. A guess is "member if the score
reaches the threshold", so tied scores fall on the same side and a tie never helps the attack.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from attacks._validate import Bools, Floats, open_unit, scores_and_members
from attacks.intervals import binomial_interval, lower_limit, upper_limit

# Below this many expected false positives a TPR at that FPR is mostly the luck of the threshold.
FEW_FALSE_POSITIVES = 10


@dataclass(frozen=True, kw_only=True)
class Roc:
    """The ROC curve, one point per distinct score, from (0, 0) to (1, 1).

    `thresholds[k]` gives the point `(fpr[k], tpr[k])` by the rule score >= threshold; the first
    is infinite: nobody is called a member. All arrays have the same length.
    """

    fpr: Floats
    tpr: Floats
    thresholds: Floats


@dataclass(frozen=True, kw_only=True)
class RocBand:
    """A ROC curve with a confidence interval of the TPR at each of its points."""

    fpr: Floats
    tpr: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What an attack reaches when it may call at most a share `fpr` of the non-members members.

    Attributes:
        fpr: the largest false positive rate allowed.
        value: the true positive rate, or NaN where `fpr` is finer than the data can resolve.
        interval: Clopper-Pearson interval of `value`, over the members; NaN where `value` is.
        threshold: an example is called a member when its score is *above* this non-member's.
        true_positives: members above the threshold.
        false_positives: non-members above the threshold; at most `fpr * non_members`.
        members: their number.
        non_members: their number.
        caution: why the value is NaN or unreliable, in one sentence; empty when all is well.
    """

    fpr: float
    value: float
    interval: tuple[float, float]
    threshold: float
    true_positives: int
    false_positives: int
    members: int
    non_members: int
    caution: str


def roc(scores: ArrayLike, is_member: ArrayLike) -> Roc:
    """Return the empirical ROC curve (no convex hull, no interpolation).

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.

    Raises:
        ValueError: for NaN, shapes that differ, or only members or only non-members.
    """
    values, members = scores_and_members(scores, is_member)
    order = np.argsort(-values, kind="stable")
    values, members = values[order], members[order]
    last_of_tie = np.append(values[1:] != values[:-1], True)
    tpr = np.cumsum(members)[last_of_tie] / members.sum()
    fpr = np.cumsum(~members)[last_of_tie] / (~members).sum()
    return Roc(
        fpr=np.append(0.0, fpr),
        tpr=np.append(0.0, tpr),
        thresholds=np.append(np.inf, values[last_of_tie]),
    )


def roc_band(scores: ArrayLike, is_member: ArrayLike, *, confidence: float = 0.95) -> RocBand:
    """Return the ROC curve with a pointwise Clopper-Pearson band, for plots.

    The band treats each threshold as fixed: it holds the chance of the members, not that of the
    non-members, and covers the curve point by point, not as a whole.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.
        confidence: of each point's interval, in (0, 1).

    Raises:
        ValueError: as `roc`, and for a confidence out of range.
    """
    confidence = open_unit("confidence", confidence)
    curve = roc(scores, is_member)
    members = int(np.count_nonzero(is_member))
    hits = np.rint(curve.tpr * members)
    error = (1 - confidence) / 2
    return RocBand(
        fpr=curve.fpr,
        tpr=curve.tpr,
        low=lower_limit(hits, members, error=error),
        high=upper_limit(hits, members, error=error),
    )


def auc(scores: ArrayLike, is_member: ArrayLike) -> float:
    """Return the probability that a member's score exceeds a non-member's; a tie counts half.

    This is the Mann-Whitney statistic, unbiased; the area under the convex hull is not (on pure
    noise it exceeds 1/2).

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.

    Raises:
        ValueError: as `roc`.
    """
    values, members = scores_and_members(scores, is_member)
    of_members, _ = _placements(values, members)
    return float(of_members.mean())


def auc_interval(
    scores: ArrayLike, is_member: ArrayLike, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return a confidence interval of the AUC, for independent examples.

    The wider, on either side, of two: DeLong et al. (1988) on the logit scale, which adapts to
    any distribution but is too short where few errors are left, and the score interval of Newcombe
    (2006, method 5), which holds near 0 and 1 but supposes similar shapes.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.
        confidence: in (0, 1).

    Raises:
        ValueError: as `roc`, and for a confidence out of range.
    """
    confidence = open_unit("confidence", confidence)
    values, members = scores_and_members(scores, is_member)
    of_members, of_others = _placements(values, members)
    z = -float(special.ndtri((1 - confidence) / 2))  # (1 + confidence) / 2 may round to 1
    low, high = _newcombe_interval(of_members.mean(), of_members.size, of_others.size, z)
    delong = _delong_interval(of_members, of_others, confidence)
    return min(low, delong[0]), max(high, delong[1])


def operating_point(
    scores: ArrayLike, is_member: ArrayLike, *, fpr: float, confidence: float = 0.95
) -> OperatingPoint:
    """Return the ROC point of largest TPR whose FPR is at most `fpr`, with all its doubt.

    With fewer than `1 / fpr` non-members the only such point has no false positive at all, which
    says nothing about that FPR: the value is NaN and `caution` says so. The interval is over the
    members; the chance of the threshold is not in it, hence the caution below ten expected false
    positives.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.
        fpr: largest false positive rate, in (0, 1).
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: as `roc`, and for an `fpr` or confidence out of range.
    """
    fpr = open_unit("fpr", fpr)
    confidence = open_unit("confidence", confidence)
    values, members = scores_and_members(scores, is_member)
    inside, outside = values[members], np.sort(values[~members])[::-1]
    expected = fpr * outside.size + 1e-9  # 0.29 * 100 is 28.999999999999996
    # The first non-member that may not be reached; everything above it may.
    threshold = outside[min(int(expected), outside.size - 1)]
    hits = int((inside > threshold).sum())
    resolved = expected >= 1
    return OperatingPoint(
        fpr=fpr,
        value=hits / inside.size if resolved else np.nan,
        interval=binomial_interval(hits, inside.size, confidence=confidence)
        if resolved
        else (np.nan, np.nan),
        threshold=float(threshold),
        true_positives=hits,
        false_positives=int((outside > threshold).sum()),
        members=inside.size,
        non_members=outside.size,
        caution=_caution(fpr, outside.size, expected),
    )


def tpr_at_fpr(scores: ArrayLike, is_member: ArrayLike, *, fpr: float) -> float:
    """Return the largest TPR among the ROC points with FPR at most `fpr`.

    NaN, with a warning that says why, when `fpr * non_members < 1`. `operating_point` gives the
    same number with its interval and counts, and never warns.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.
        fpr: largest false positive rate, in (0, 1).

    Raises:
        ValueError: as `operating_point`.
    """
    point = operating_point(scores, is_member, fpr=fpr)
    if point.caution:
        warnings.warn(point.caution, stacklevel=2)
    return point.value


def advantage(scores: ArrayLike, is_member: ArrayLike) -> float:
    """Return the maximum over thresholds of TPR - FPR (Yeom et al., 2018), in [0, 1].

    The threshold is chosen on the examples it is judged on, so the value is biased upwards: on
    scores without any signal it is about `0.63 * sqrt(1 / members + 1 / non_members)`.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.

    Raises:
        ValueError: as `roc`.
    """
    curve = roc(scores, is_member)
    return float((curve.tpr - curve.fpr).max())


def balanced_accuracy(scores: ArrayLike, is_member: ArrayLike) -> float:
    """Return the maximum over thresholds of (TPR + TNR) / 2, in [0.5, 1].

    It is `(1 + advantage) / 2`, with the same upward bias.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.

    Raises:
        ValueError: as `roc`.
    """
    return (1 + advantage(scores, is_member)) / 2


def _placements(values: Floats, members: Bools) -> tuple[Floats, Floats]:
    """Per member, the share of non-members below it; per non-member, of members above it."""
    ranks = stats.rankdata(values)  # a tie gets the mean rank, so it counts half
    inside, outside = ranks[members], ranks[~members]
    of_members = (inside - stats.rankdata(inside)) / outside.size
    of_others = 1 - (outside - stats.rankdata(outside)) / inside.size
    return of_members, of_others


def _delong_interval(
    of_members: Floats, of_others: Floats, confidence: float
) -> tuple[float, float]:
    """DeLong et al. (1988) on the logit scale; a point where its variance says nothing."""
    area = float(of_members.mean())
    if not 0 < area < 1 or min(of_members.size, of_others.size) < 2:
        return area, area
    parts = np.array([group.var(ddof=1) / group.size for group in (of_members, of_others)])
    variance = parts.sum()
    if variance == 0:
        return area, area
    # With few members a normal quantile is too short: Brunner and Munzel (2000) take Student's t.
    freedom = variance**2 / (parts**2 / (of_members.size - 1, of_others.size - 1)).sum()
    quantile = -special.stdtrit(freedom, (1 - confidence) / 2)
    margin = quantile * np.sqrt(variance) / (area * (1 - area))
    low, high = special.expit(special.logit(area) + np.array([-margin, margin]))
    return float(low), float(high)


def _newcombe_interval(area: float, members: int, others: int, z: float) -> tuple[float, float]:
    """Newcombe (2006), method 5: the areas whose Hanley-McNeil variance allows the observed one."""

    def excess(true: float) -> float:
        pairs = (members + others) / 2 - 1
        spread = 1 + pairs * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * spread / (members * others)
        return float((area - true) ** 2 - z**2 * variance)

    # `excess` is 0 at an observed 0 or 1 itself: step inside to bracket the other root.
    inner = float(np.clip(area, 1e-12, 1 - 1e-12))
    if excess(inner) >= 0:  # at next to no confidence
        return float(area), float(area)
    low = 0.0 if area <= 0 else float(optimize.brentq(excess, 0, inner))
    high = 1.0 if area >= 1 else float(optimize.brentq(excess, inner, 1))
    return low, high


def _caution(fpr: float, non_members: int, expected: float) -> str:
    """Say why a TPR at this FPR is undefined or unreliable; empty when it is neither."""
    if expected < 1:
        return (
            f"TPR at FPR {fpr:g} is undefined with {non_members} non-members: "
            f"score at least {np.ceil(1 / fpr - 1e-9):.0f}."
        )
    if expected < FEW_FALSE_POSITIVES:
        return (
            f"TPR at FPR {fpr:g} rests on {int(expected)} false positive(s) among {non_members} "
            f"non-members: score at least {np.ceil(FEW_FALSE_POSITIVES / fpr - 1e-9):.0f}."
        )
    return ""
