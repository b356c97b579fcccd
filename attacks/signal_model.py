"""What reference models lead us to expect of a signal, example by example.

Two uses of the same machinery: the references that saw an example (IN) predict the signal of a
model that trained on it, the others (OUT) of one that did not. Shapes: N examples, M references,
S signals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from attacks._validate import Bools, Floats

# A mean is predicted from the other side only if this many examples stand behind each coefficient.
EXAMPLES_PER_COEFFICIENT = 10

# How far beyond all means on a side one may be predicted, relative to the largest.
_FARTHEST = 10.0

# Signals whose squares are at most 1 do not vary if their variance is below this.
_LEAST_VARIANCE = 1e-60

_ROUNDING = 1e-12

# The likelihood of a prior may be flat: with less, scores differ by percents between two orders of
# the examples.
_PRECISE = {"ftol": 1e-14, "gtol": 1e-9}


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of each example's signals over the references on one side.

    `count (N,)` references, their `mean (N, S)` (zero where there is none) and `scatter (N, S, S)`,
    the sum of the products of residuals.
    """

    count: Floats
    mean: Floats
    scatter: Floats


@dataclass(frozen=True, kw_only=True)
class Predictive:
    """The distribution expected of each example's signals.

    Student-t with `degrees (N,)` of freedom around `location (N, S)` with `scale (N, S, S)`, or
    Gaussian with that mean and covariance where `degrees` is None.
    """

    location: Floats
    scale: Floats
    degrees: Floats | None


def moments(references: Floats, mask: Bools) -> Moments:
    """Return the moments of `references (M, N, S)` over the models that `mask (M, N)` selects.

    Args:
        references: in units in which none is far beyond 1: squares must not overflow, and variances
            below 1e-60 are taken for none.

    Raises:
        ValueError: no example has two of them, so that nothing is known of their spread.
    """
    count = mask.sum(axis=0).astype(np.float64)
    if count.max() < 2:
        raise ValueError(
            "Expected some example with two references on each side that is used, got none: "
            "train more references, or use `rmia`, which needs no variance."
        )
    kept = mask[..., None]
    mean = np.where(kept, references, 0).sum(axis=0) / np.maximum(count, 1)[:, None]
    residuals = np.where(kept, references - mean, 0)
    return Moments(
        count=count,
        mean=mean,
        scatter=np.einsum("mns,mnt->nst", residuals, residuals),
    )


def grand_mean(own: Moments) -> Floats:
    """Return the mean over all examples as the prior mean `(N, S)` of each."""
    mean: Floats = np.broadcast_to(own.mean[own.count > 0].mean(axis=0), own.mean.shape)
    return mean


def mean_given(own: Moments, *, other: Moments) -> Floats:
    """Return the prior mean `(N, S)` of one side, predicted from the mean on the other side.

    A linear regression over the examples that have both. An example that is hard for the models
    that never saw it is hard for the others too, so this says much more than the grand mean, which
    is used only where the examples are too few for a regression. NaN marks an example without a
    reference on the other side: nothing is known of it beforehand.
    """
    paired = (own.count > 0) & (other.count > 0)
    design = np.column_stack([np.ones(len(other.mean)), other.mean])
    if paired.sum() < EXAMPLES_PER_COEFFICIENT * design.shape[1]:
        prediction = grand_mean(own)
    else:
        coefficients, *_ = np.linalg.lstsq(design[paired], own.mean[paired], rcond=None)
        # Far beyond all that was seen a line says nothing.
        farthest = _FARTHEST * np.abs(own.mean).max(axis=0)
        prediction = np.clip(design @ coefficients, -farthest, farthest)
    return np.where(other.count[:, None] > 0, prediction, np.nan)


def pooled(own: Moments, prior_mean: Floats) -> Predictive:
    """Return Gaussians with one covariance for all examples.

    It is pooled over residuals, each from its own example's mean: the spread *between* examples
    must not enter. An example without reference gets its prior mean.
    """
    covariance = _pooled_covariance(own)
    return Predictive(
        location=_known_mean(own, prior_mean),
        scale=np.broadcast_to(covariance, own.scatter.shape),
        degrees=None,
    )


def per_example(own: Moments, prior_mean: Floats) -> Predictive:
    """Return Gaussians with each example's own unbiased covariance.

    Too noisy below some 32 references on a side. An example with too few references for a
    covariance (S or fewer) gets the pooled one.
    """
    covariance = _pooled_covariance(own)
    freedom = np.maximum(own.count - 1, 1)[:, None, None]
    enough = own.count[:, None, None] > own.mean.shape[1]
    # The small share of the pooled covariance keeps identical signals from dividing by zero.
    scale = np.where(enough, own.scatter / freedom + 1e-9 * covariance, covariance)
    return Predictive(location=_known_mean(own, prior_mean), scale=scale, degrees=None)


def shrunk(own: Moments, prior_mean: Floats) -> Predictive:
    """Return Student-t distributions whose mean and covariance lean on all examples.

    Conjugate (normal-inverse-Wishart) Bayes: each example's covariance is drawn around the pooled
    one with the weight of ν₀ observations, its mean around the prior mean with the weight of κ₀.
    Both weights, and the scale, maximise the marginal likelihood over all examples, so that few
    references lean on the others' experience and many speak for themselves. An example without
    reference gets the prior.
    """
    informed: Bools = np.isfinite(prior_mean[:, 0])
    prior_mean = np.where(informed[:, None], prior_mean, own.mean)
    covariance = _pooled_covariance(own)
    weight, freedom, prior_scatter = _estimate_prior(own, prior_mean, covariance, informed)
    degrees = freedom + own.count - (own.mean.shape[1] - 1)
    total = (weight + own.count)[:, None]
    scatter = _posterior_scatter(own, prior_mean, weight=weight, prior_scatter=prior_scatter)
    return Predictive(
        location=(weight * prior_mean + own.count[:, None] * own.mean) / total,
        scale=scatter * ((1 + 1 / total) / degrees[:, None])[..., None],
        degrees=degrees,
    )


def log_density(predictive: Predictive, values: Floats) -> Floats:
    """Return the log density `(N,)` of `values (N, S)`, up to a constant common to all."""
    volume = _log_determinant(predictive.scale) / 2
    deviation = values - predictive.location
    solved = np.linalg.solve(predictive.scale, deviation[..., None])[..., 0]
    distance = (deviation * solved).sum(axis=1)
    if predictive.degrees is None:
        gaussian: Floats = -distance / 2 - volume
        return gaussian
    nu, size = predictive.degrees, values.shape[1]
    constant = (
        special.gammaln((nu + size) / 2) - special.gammaln(nu / 2) - size / 2 * np.log(nu / 2)
    )
    density: Floats = constant - volume - (nu + size) / 2 * np.log1p(distance / nu)
    return density


def log_upper_tail(predictive: Predictive, values: Floats) -> Floats:
    """Return the log probability `(N,)` of a signal above `values (N, S)`.

    With several signals: of a larger sum of standardised signals, so that a higher value in any
    signal never looks less like a member.
    """
    deviations = np.sqrt(np.diagonal(predictive.scale, axis1=1, axis2=2))
    correlation = predictive.scale / (deviations[:, :, None] * deviations[:, None, :])
    z = ((values - predictive.location) / deviations).sum(axis=1)
    # Of signals that all but cancel, rounding errors are all that is left.
    z = z / np.sqrt(np.maximum(correlation.sum(axis=(1, 2)), _ROUNDING))
    if predictive.degrees is None:
        tail: Floats = special.log_ndtr(-z)
        return tail
    return _log_student_tail(z, predictive.degrees)


def _log_student_tail(z: Floats, nu: Floats) -> Floats:
    """log P[T > z] of Student's t without underflow."""
    direct = special.stdtr(nu, -z)
    underflows = direct < 1e-200
    far = np.where(underflows, z, 1e3)  # elsewhere any number that the series is good for
    # The incomplete beta function as a series (DLMF 8.17.7), in logarithms.
    log_x, half = -np.log1p(far**2 / nu), nu / 2
    series = np.log(special.hyp2f1(0.5, half, half + 1, np.exp(log_x)))
    asymptotic = half * log_x - np.log(2 * half) - special.betaln(half, 0.5) + series
    tail: Floats = np.where(underflows, asymptotic, np.log(np.maximum(direct, 1e-200)))
    return tail


def _known_mean(own: Moments, prior_mean: Floats) -> Floats:
    """The observed mean, or the prior mean where nothing was observed."""
    return np.where(own.count[:, None] > 0, own.mean, prior_mean)


def _pooled_covariance(own: Moments) -> Floats:
    """The covariance `(S, S)` of residuals over all examples; refused where it is degenerate."""
    freedom = np.maximum(own.count - 1, 0).sum()
    covariance: Floats = own.scatter.sum(axis=0) / freedom
    deviations = np.sqrt(np.diagonal(covariance))
    correlation = covariance / np.maximum(np.outer(deviations, deviations), _LEAST_VARIANCE)
    if np.linalg.eigvalsh(correlation).min() < 1e-10:
        raise ValueError(
            "Expected reference signals that vary independently, got one that is constant or a "
            "copy of another: leave it out."
        )
    return covariance


def _estimate_prior(
    own: Moments, prior_mean: Floats, covariance: Floats, informed: Bools
) -> tuple[float, float, Floats]:
    """Maximise the marginal likelihood: weight κ₀, freedom ν₀, prior scatter (S, S)."""
    size = len(covariance)

    def prior(logs: Floats) -> tuple[float, float, Floats]:
        weight, excess, scale = np.exp(logs)
        freedom = size - 1 + excess  # an inverse Wishart exists only above S - 1
        return weight, freedom, freedom * scale * covariance

    # As if the covariance were 1: the optimizer's tolerance is relative, the unit must not matter.
    whitened = own.count / 2 * _log_determinant(covariance)

    def loss(logs: Floats) -> float:
        evidence = _log_evidence(own, prior_mean, *prior(logs)) + whitened
        return -float(evidence[informed].sum()) / informed.size

    # Beyond these bounds a weight is as good as none or as infinitely many observations.
    bounds = [(-9.0, 9.0), (-2.0, 9.0), (-5.0, 5.0)]
    best = optimize.minimize(
        loss,
        np.array([0.0, 1.0, 0.0]),
        method="L-BFGS-B",
        jac="3-point",
        bounds=bounds,
        options=_PRECISE,
    )
    return prior(best.x)


def _log_evidence(
    own: Moments, prior_mean: Floats, weight: float, freedom: float, prior_scatter: Floats
) -> Floats:
    """Log marginal likelihood (N,) of each example, up to a constant (Murphy, 2007)."""
    size = prior_mean.shape[1]
    posterior = freedom + own.count
    scatter = _posterior_scatter(own, prior_mean, weight=weight, prior_scatter=prior_scatter)
    evidence: Floats = (
        special.multigammaln(posterior / 2, size)
        - special.multigammaln(freedom / 2, size)
        + freedom / 2 * _log_determinant(prior_scatter)
        - posterior / 2 * _log_determinant(scatter)
        + size / 2 * np.log(weight / (weight + own.count))
    )
    return evidence


def _log_determinant(matrices: Floats) -> Floats:
    """log |det| of (…, S, S); refused where nothing of it is left after rounding."""
    found: Floats = np.linalg.slogdet(matrices).logabsdet
    if not np.isfinite(found).all():
        raise ValueError(
            "Expected reference signals of one order of magnitude, got some so far from the others "
            "that these do not count beside them: leave out such examples."
        )
    return found


def _posterior_scatter(
    own: Moments, prior_mean: Floats, *, weight: float, prior_scatter: Floats
) -> Floats:
    """Prior scatter, observed scatter, and the distance of the two means, each as (N, S, S)."""
    deviation = own.mean - prior_mean
    share = (weight * own.count / (weight + own.count))[:, None, None]
    return prior_scatter + own.scatter + share * deviation[:, :, None] * deviation[:, None, :]


# Each takes (moments, prior mean) and returns a Predictive.
VARIANCES: Mapping[str, Callable[[Moments, Floats], Predictive]] = {
    "pooled": pooled,
    "per_example": per_example,
    "shrunk": shrunk,
}
