"""Membership attacks: what models say about examples, to one score per example.

Shapes: N examples, M reference models, S signals. `membership (M, N)` says which example trained
which *reference*; whether an example trained the target is what the score is about, and no attack
is ever told. Every score is larger for an example that is more likely a member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from attacks._validate import Bools, Floats, any_array, bools, floats, one_of, open_unit
from attacks.signal_model import (
    VARIANCES,
    Moments,
    Predictive,
    grand_mean,
    log_density,
    log_upper_tail,
    mean_given,
    moments,
)

# Its square in units of the least spread is still finite.
_OUT_OF_PROPORTION = 1e100

Mode = Literal["online", "offline"]
Variance = Literal["shrunk", "pooled", "per_example"]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A membership attack as the registry lists it.

    Attributes:
        signal: what it reads from a model, "loss" or "logit_margin".
        needs_references: whether reference models are needed.
        score: `score(target)` without references, `score(target, references, membership)` with.
    """

    signal: Literal["loss", "logit_margin"]
    needs_references: bool
    score: Callable[..., Floats]


def loss_threshold(target_loss: ArrayLike) -> Floats:
    """Score by the negated loss: one threshold for all examples (Yeom et al., 2018).

    Args:
        target_loss: `(N,)`, the target's loss on each example.

    Returns:
        `(N,)` scores, higher = more likely a member.

    Raises:
        ValueError: for NaN or a wrong shape.
    """
    return -floats("target_loss", target_loss, dimensions=1)


def lira(
    target: ArrayLike,
    references: ArrayLike,
    membership: ArrayLike,
    *,
    mode: Mode = "online",
    variance: Variance = "shrunk",
) -> Floats:
    """Score by the likelihood ratio attack (Carlini et al., 2022).

    Online: the log ratio of the target's signal being drawn like those of references that trained
    on the example (IN) and of those that did not (OUT). Offline: minus the log probability that an
    OUT model shows a higher signal, so signals must grow with membership, as the logit margin does.
    Neither saturates: both stay in logarithms.

    `variance` says how a signal's spread over models is found. "shrunk", the default, is a
    conjugate Bayesian fit per example (see `attacks.signal_model.shrunk`), best with few references
    and as good as "per_example" with many; "pooled" shares one covariance among all examples;
    "per_example" is for 64 references and more. IN and OUT always have their own.

    An example that no reference (or every reference) trained on has no IN (or OUT) signals; its
    expected signal is then predicted from the other side, by a regression over all other examples
    (offline: it is the mean over all examples).

    Args:
        target: `(N,)` signals of the target model, or `(N, S)` for S signals jointly, for example
            the logit margins of intent and of slots.
        references: `(M, N)` or `(M, N, S)`, the same signals of the reference models.
        membership: `(M, N)`, Boolean, of the references.
        mode: "online" or "offline"; offline ignores the references that trained on an example.
        variance: "shrunk", "pooled" or "per_example".

    Returns:
        `(N,)` scores, higher = more likely a member.

    Raises:
        ValueError: for NaN or infinite signals, shapes that do not fit, references too few for a
            variance, signals that do not vary, a target that is out of all proportion to the
            references, or an unknown mode or variance.
    """
    one_of("mode", mode, choices=("online", "offline"))
    one_of("variance", variance, choices=tuple(VARIANCES))
    fit = VARIANCES[variance]
    values, signals, members = _signals(target, references, membership)
    outside = _Side.of(values, signals, ~members)
    if mode == "offline":
        return -log_upper_tail(fit(outside.moments, grand_mean(outside.moments)), outside.values)
    inside = _Side.of(values, signals, members)
    in_model = fit(inside.moments, mean_given(inside.moments, other=outside.moments))
    out_model = fit(outside.moments, mean_given(outside.moments, other=inside.moments))
    return inside.log_density(in_model) - outside.log_density(out_model)


def rmia(
    target_loss: ArrayLike,
    reference_losses: ArrayLike,
    membership: ArrayLike,
    *,
    mode: Mode = "online",
    offline_scale: float = 0.3,
) -> Floats:
    """Score by the robust membership inference attack (Zarifzadeh et al., 2024), as a log ratio.

    The score is log p(x | target) - log p(x), where p(x) is the mean of the references' mean
    probability with and without the example. The paper's comparison with population points is a
    monotone step function of it, so the order, and hence every ROC, is the same but for ties.

    Offline, and for an example that no reference trained on, the mean probability with the example
    is guessed as a·p_out + 1 - a with a = `offline_scale`. For an example that every
    reference trained on, the mean with it stands for both, which favours "non-member".

    Args:
        target_loss: `(N,)`, the target's loss -log p(true labels); with intent and slots, the sum.
        reference_losses: `(M, N)`, the same of the references; one reference suffices.
        membership: `(M, N)`, Boolean, of the references.
        mode: "online" or "offline"; offline ignores the references that trained on an example.
        offline_scale: a, in (0, 1).

    Returns:
        `(N,)` scores, higher = more likely a member.

    Raises:
        ValueError: for NaN or infinite losses, shapes that do not fit, an unknown mode, a scale out
            of range, or offline references that leave no example out.
    """
    one_of("mode", mode, choices=("online", "offline"))
    offline_scale = open_unit("offline_scale", offline_scale)
    losses, reference, members = _signals(target_loss, reference_losses, membership)
    if losses.shape[1] != 1:
        raise ValueError(f"Expected one loss per example, got {losses.shape[1]}: add them up.")
    used = members if mode == "online" else np.zeros_like(members)
    with np.errstate(over="ignore"):  # of differences between losses of opposite signs
        inside = _log_mean(-reference[..., 0], used)
        outside = _known_outside(_log_mean(-reference[..., 0], ~members), inside)
        guess = np.logaddexp(np.log(offline_scale) + outside, np.log1p(-offline_scale))
        inside = np.where(np.isneginf(inside), guess, inside)
        scores: Floats = np.log(2) - losses[:, 0] - np.logaddexp(inside, outside)
    return scores


def _log_mean(log_probabilities: Floats, mask: Bools) -> Floats:
    """Log of the mean probability (N,) over the masked models; minus infinity where none is."""
    total = np.logaddexp.reduce(np.where(mask, log_probabilities, -np.inf), axis=0)
    mean: Floats = total - np.log(np.maximum(mask.sum(axis=0), 1))
    return mean


def _known_outside(outside: Floats, inside: Floats) -> Floats:
    """Fill in the examples that no reference left out: the mean with them, else over the others."""
    known = ~np.isneginf(outside)
    if not known.any():
        raise ValueError(
            "Expected references that leave examples out, got none: "
            "train the references on other data, or on random halves of these."
        )
    elsewhere = np.logaddexp.reduce(outside[known]) - np.log(known.sum())
    return np.where(known, outside, np.where(np.isneginf(inside), elsewhere, inside))


def _signals(
    target: ArrayLike, references: ArrayLike, membership: ArrayLike
) -> tuple[Floats, Floats, Bools]:
    """Check the three arrays; return them as (N, S), (M, N, S) and (M, N)."""
    shape = any_array("target", target).shape
    dimensions = len(shape)
    if dimensions not in (1, 2) or 0 in shape:
        raise ValueError(
            f"Expected the target's signals as (N,) or (N, S), got shape {shape}: "
            "pass one number per example, or one row."
        )
    values = floats("target", target, dimensions=dimensions)
    signals = floats("references", references, dimensions=dimensions + 1)
    if signals.shape[1:] != values.shape or len(signals) == 0:
        raise ValueError(
            f"Expected references of shape (M, {', '.join(map(str, values.shape))}) with M >= 1, "
            f"got {signals.shape}: one row per reference model, the examples in the same order."
        )
    if not (np.isfinite(values).all() and np.isfinite(signals).all()):
        raise ValueError("Expected finite signals, got infinity: compute them in float64.")
    members = bools("membership", membership, shape=signals.shape[:2])
    if dimensions == 1:
        return values[:, None], signals[..., None], members
    return values, signals, members


@dataclass(frozen=True)
class _Side:
    """The references on one side, and the target beside them, all in a unit of their own.

    No score depends on the unit of a signal; the squares of huge and of tiny ones would be lost.

    Attributes:
        moments: of the references.
        values: `(N, S)`, the target's signals.
        log_unit: log of the product of all signals' units.
    """

    moments: Moments
    values: Floats
    log_unit: float

    @classmethod
    def of(cls, values: Floats, signals: Floats, mask: Bools) -> _Side:
        """The side of the references that the mask selects. The unit of a signal is the power of
        two that brings all of it into [-1, 1]."""
        kept = np.where(mask[..., None], signals, 0.0)
        _, exponents = np.frexp(np.abs(kept).max(axis=(0, 1)))
        with np.errstate(over="ignore"):
            scaled = np.ldexp(values, -exponents)
        found = moments(np.ldexp(kept, -exponents), mask)
        if np.abs(scaled).max() > _OUT_OF_PROPORTION:
            raise ValueError(
                f"Expected a target of about the references' signals, got one over "
                f"{_OUT_OF_PROPORTION:g} times as large: compute both in the same way."
            )
        return cls(found, scaled, float(exponents.sum() * np.log(2)))

    def log_density(self, model: Predictive) -> Floats:
        """The log density of the target's signals under a model of this side."""
        return log_density(model, self.values) - self.log_unit


ATTACKS: Mapping[str, Attack] = {
    "loss": Attack(signal="loss", needs_references=False, score=loss_threshold),
    "lira": Attack(signal="logit_margin", needs_references=True, score=lira),
    "lira-offline": Attack(
        signal="logit_margin", needs_references=True, score=partial(lira, mode="offline")
    ),
    "rmia": Attack(signal="loss", needs_references=True, score=rmia),
    "rmia-offline": Attack(
        signal="loss", needs_references=True, score=partial(rmia, mode="offline")
    ),
}
