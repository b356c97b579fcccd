"""Scores of one membership attack and the truth, to the numbers a report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from attacks._validate import floats, scores_and_members
from attacks.ceilings import approximate_dp_ceiling_auc, approximate_dp_ceiling_tpr
from attacks.metrics import OperatingPoint, auc, auc_interval, operating_point


@dataclass(frozen=True, kw_only=True)
class TruePositiveRate:
    """TPR at one FPR: the value, its interval, and what (ε, δ) allows at most, if that is known."""

    value: float
    interval: tuple[float, float]
    ceiling: float | None


@dataclass(frozen=True, kw_only=True)
class MembershipResult:
    """How well one attack tells members from non-members.

    Attributes:
        auc: area under the ROC curve.
        auc_interval: its confidence interval.
        auc_ceiling: the largest AUC (ε, δ) allows; None without a guarantee.
        tpr_at_fpr: from the FPR, written as "0.01", to the TPR. An FPR that the non-members are
            too few for is left out, and `warnings` says so.
        members: number of members scored.
        non_members: number of non-members scored.
        warnings: what a reader of the numbers must know, in sentences.
    """

    auc: float
    auc_interval: tuple[float, float]
    auc_ceiling: float | None
    tpr_at_fpr: Mapping[str, TruePositiveRate]
    members: int
    non_members: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry `membership.<attack>` of report.json; what is unknown has no key."""
        return {
            "auc": self.auc,
            "auc_interval": list(self.auc_interval),
            "tpr_at_fpr": {key: _rate_to_dict(rate) for key, rate in self.tpr_at_fpr.items()},
        }


def evaluate(
    scores: ArrayLike,
    is_member: ArrayLike,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    fprs: Sequence[float] = (0.01, 0.001),
    confidence: float = 0.95,
) -> MembershipResult:
    """Judge an attack by the truth, which the attack itself never saw.

    Args:
        scores: `(N,)`, higher = more likely a member.
        is_member: `(N,)`, Boolean.
        epsilon: what the training claims; None for no guarantee, and then no ceiling is given.
        delta: goes with `epsilon`.
        fprs: false positive rates, each in (0, 1).
        confidence: of all intervals, in (0, 1).

    Raises:
        ValueError: for scores or labels as in `attacks.metrics.roc`, an argument out of range, or
            only one of `epsilon` and `delta`.
    """
    if (epsilon is None) != (delta is None):
        raise ValueError(
            f"Expected `epsilon` and `delta` together, got {epsilon} and {delta}: "
            "a guarantee needs both, no guarantee neither."
        )
    guarantee = None if epsilon is None or delta is None else (epsilon, delta)
    _, members = scores_and_members(scores, is_member)
    points = [
        operating_point(scores, is_member, fpr=fpr, confidence=confidence)
        for fpr in floats("fprs", fprs, dimensions=1).tolist()
    ]
    area_interval = auc_interval(scores, is_member, confidence=confidence)
    area_ceiling = None if guarantee is None else approximate_dp_ceiling_auc(*guarantee)
    rates = {f"{p.fpr:g}": _rate(p, guarantee) for p in points if not math.isnan(p.value)}
    excesses = [_excess("AUC", area_interval, area_ceiling)]
    excesses += [_excess(f"TPR at FPR {f}", r.interval, r.ceiling) for f, r in rates.items()]
    return MembershipResult(
        auc=auc(scores, is_member),
        auc_interval=area_interval,
        auc_ceiling=area_ceiling,
        tpr_at_fpr=rates,
        members=int(members.sum()),
        non_members=int((~members).sum()),
        warnings=tuple(filter(None, [point.caution for point in points] + excesses)),
    )


def _rate(point: OperatingPoint, guarantee: tuple[float, float] | None) -> TruePositiveRate:
    """The point as a report shows it, next to what the guarantee allows."""
    ceiling = None if guarantee is None else approximate_dp_ceiling_tpr(*guarantee, fpr=point.fpr)
    return TruePositiveRate(value=point.value, interval=point.interval, ceiling=ceiling)


def _rate_to_dict(rate: TruePositiveRate) -> dict[str, Any]:
    """The same with plain types; no ceiling, no key."""
    entry: dict[str, Any] = {"value": rate.value, "interval": list(rate.interval)}
    return entry if rate.ceiling is None else entry | {"ceiling": rate.ceiling}


def _excess(what: str, interval: tuple[float, float], ceiling: float | None) -> str:
    """Say that a measurement refutes the guarantee; empty when it does not."""
    if ceiling is None or interval[0] <= ceiling:
        return ""
    return (
        f"{what} is at least {interval[0]:.4g}, above the {ceiling:.4g} that the guarantee allows: "
        "the guarantee is false, or members and non-members differ by more than membership."
    )
