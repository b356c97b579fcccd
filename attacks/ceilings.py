"""What no membership attack can exceed on a model whose training is (ε, δ)-private.

Two families. The *approximate* ceilings hold for every mechanism with that (ε, δ). The *Gaussian*
ceilings describe the one Gaussian mechanism with exactly that (ε, δ), Dong et al. (2022): a tighter
and more typical yardstick, not a guarantee for another mechanism.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import optimize, special

from attacks._validate import number, open_unit, privacy_parameters


def approximate_dp_ceiling_auc(epsilon: float, delta: float) -> float:
    """Return the largest AUC possible under (ε, δ)-differential privacy.

    The area under `approximate_dp_ceiling_tpr`: 1 - (1 - δ)² / (1 + e^ε).

    Args:
        epsilon: at least 0; infinity for no guarantee.
        delta: in [0, 1).

    Raises:
        ValueError: for an argument out of range.
    """
    epsilon, delta = privacy_parameters(epsilon, delta)
    return float(1 - (1 - delta) ** 2 * special.expit(-epsilon))


def approximate_dp_ceiling_tpr(epsilon: float, delta: float, *, fpr: float) -> float:
    """Return the largest TPR at that FPR possible under (ε, δ)-differential privacy.

    Kairouz et al. (2015): min(1, δ + e^ε·FPR, 1 - e^-ε·(1 - δ - FPR)).

    Args:
        epsilon: at least 0; infinity for no guarantee.
        delta: in [0, 1).
        fpr: in (0, 1).

    Raises:
        ValueError: for an argument out of range.
    """
    epsilon, delta = privacy_parameters(epsilon, delta)
    fpr = open_unit("fpr", fpr)
    steep = delta + np.exp(min(epsilon, 700.0)) * fpr  # e^700 is the last that does not overflow
    flat = 1 - np.exp(-epsilon) * (1 - delta - fpr)
    return float(min(1.0, steep, flat))


def gaussian_ceiling_auc(epsilon: float, delta: float) -> float:
    """Return the AUC of the best attack on the Gaussian mechanism: Φ(μ / √2).

    Args:
        epsilon: at least 0; infinity for no guarantee.
        delta: in (0, 1).

    Raises:
        ValueError: for an argument out of range.
    """
    return float(special.ndtr(gaussian_mu(epsilon, delta) / np.sqrt(2)))


def gaussian_ceiling_tpr(epsilon: float, delta: float, *, fpr: float) -> float:
    """Return the TPR of the best attack on the Gaussian mechanism: Φ(μ + Φ⁻¹(FPR)).

    Args:
        epsilon: at least 0; infinity for no guarantee.
        delta: in (0, 1).
        fpr: in (0, 1).

    Raises:
        ValueError: for an argument out of range.
    """
    fpr = open_unit("fpr", fpr)
    return float(special.ndtr(gaussian_mu(epsilon, delta) + special.ndtri(fpr)))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return μ of the Gaussian mechanism that is exactly (ε, δ)-private: it solves δ(ε; μ) = δ.

    μ is the distance of the two output means in standard deviations.

    Args:
        epsilon: at least 0; infinity for no guarantee, which gives infinity.
        delta: in (0, 1).

    Raises:
        ValueError: for an argument out of range, so also for δ = 0, which no Gaussian meets.
    """
    epsilon, delta = privacy_parameters(epsilon, delta)
    delta = open_unit("delta", delta)
    if np.isinf(epsilon):
        return np.inf
    scale = 1.0
    while _log_delta(epsilon, scale) > np.log(delta):
        scale /= 2
    while _log_delta(epsilon, 2 * scale) < np.log(delta):
        scale *= 2
    return _root(lambda mu: _log_delta(epsilon, mu) - np.log(delta), scale, 2 * scale)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest ε for which a μ-Gaussian mechanism is (ε, δ)-private.

    Args:
        mu: at least 0.
        delta: in (0, 1).

    Raises:
        ValueError: for an argument out of range.
    """
    mu = number("mu", mu)
    if not 0 <= mu < np.inf:
        raise ValueError(f"Expected `mu` in [0, inf), got {mu}: it is a distance of means.")
    delta = open_unit("delta", delta)
    if mu == 0 or _log_delta(0.0, mu) <= np.log(delta):
        return 0.0
    high = 1.0
    while np.isfinite(high) and _log_delta(high, mu) > np.log(delta):
        high *= 2
    if np.isinf(high):  # larger than any float
        return np.inf
    return _root(lambda epsilon: _log_delta(epsilon, mu) - np.log(delta), 0.0, high)


def _log_delta(epsilon: float, mu: float) -> float:
    """log of δ(ε; μ) = Φ(μ/2 - ε/μ) - e^ε·Φ(-μ/2 - ε/μ), Dong et al. (2022), corollary 1."""
    near, far = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    # e^ε·Φ(-far) is φ(near) times the Mills ratio of `far`: neither overflows, and where both
    # terms underflow their ratio is still exact.
    if near < 0:
        ratio = special.erfcx(far / np.sqrt(2)) / special.erfcx(-near / np.sqrt(2))
    else:
        ratio = (
            np.exp(-near * near / 2) * special.erfcx(far / np.sqrt(2)) / (2 * special.ndtr(near))
        )
    return float(special.log_ndtr(near) + special.log1p(-ratio))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Bisection, which needs only the sign: the logarithm of δ may be minus infinity."""
    return float(optimize.bisect(function, low, high, xtol=1e-14 * high))
