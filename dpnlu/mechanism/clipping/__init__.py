"""Clipping rules by name. A new rule is one file and one line in `CLIPPING_RULES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from dpnlu.mechanism.clipping import automatic, flat, groups, per_layer, public, quantile
from dpnlu.mechanism.clipping.rule import ClippingRule

CLIPPING_RULES: dict[str, Callable[[Sequence[str]], ClippingRule]] = {
    "flat": flat.make,
    "automatic": automatic.make,
    "per_layer": per_layer.make,
    "groups": groups.make,
    "quantile": quantile.make,
    "public": public.make,
}

# One spec of each rule, and what can be said in it.
_FORMS = (
    "flat, automatic[:γ], per_layer[:uniform|size|weights], groups[:uniform|size|weights|A,B,...], "
    "quantile:Q[:RATE[:BUDGET]] or public:Q with Q and BUDGET in (0, 1)"
)


@lru_cache(maxsize=64)
def clipping_rule(spec: str) -> ClippingRule:
    """The rule that a text describes.

    Raises:
        ValueError: there is no such rule, or one of its values is out of range.
    """
    name, *values = spec.split(":")
    make = CLIPPING_RULES.get(name)
    try:
        if make is not None:
            return make(values)
    except ValueError:
        pass
    raise ValueError(f"Expected `clipping` to be one of {_FORMS}, got {spec!r}.")
