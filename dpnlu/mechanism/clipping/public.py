"""A bound from public examples: the quantile of their gradients' norms (Golatkar et al. 2022).

It is taken anew before each step, at the weights of the last release. So it is computed from public
data and what was released, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpnlu.mechanism.clipping.flat import flat
from dpnlu.mechanism.clipping.rule import ClippingRule, number


def make(values: Sequence[str]) -> ClippingRule:
    """The rule `public:Q`."""
    (quantile,) = values
    return ClippingRule(coefficients=flat, public_quantile=number(quantile, low=0, high=1))
