"""Adaptive clipping: the bound follows a quantile of the norms (Andrew et al. 2021).

Each release counts, with noise, the units that the bound leaves unclipped; with too many of them it
falls, with too few it rises, by a factor exp(-rate (share - quantile)). The bound is computed from
what was released alone. What the count costs is taken from the noise multiplier of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpnlu.mechanism.clipping.flat import flat
from dpnlu.mechanism.clipping.rule import Adaptation, ClippingRule, number

# The rate of the paper; and a count whose noise is 5 for noise multiplier 1, while the sum needs
# half a percent more noise.
_RATE, _BUDGET = "0.2", "0.01"


def make(values: Sequence[str]) -> ClippingRule:
    """The rule `quantile:Q`, `quantile:Q:RATE` or `quantile:Q:RATE:BUDGET`; see `Adaptation`."""
    quantile, rate, budget = [*values, *(_RATE, _BUDGET)[max(0, len(values) - 1) :]]
    adaptation = Adaptation(
        quantile=number(quantile, low=0, high=1),
        rate=number(rate, low=0, high=10),
        budget=number(budget, low=0, high=1),
    )
    return ClippingRule(coefficients=flat, adaptation=adaptation)
