"""Clipping by layers: each module's own parameters are clipped to a share of the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dpnlu.mechanism.clipping.flat import flat
from dpnlu.mechanism.clipping.rule import ClippingRule, Group
from dpnlu.mechanism.clipping.shares import SIZES, shared

if TYPE_CHECKING:
    from torch import Tensor


def layers_of(names: Sequence[str]) -> list[list[str]]:
    """Names of parameters, those of one module together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return list(found.values())


def make(values: Sequence[str]) -> ClippingRule:
    """The rule `per_layer`, or `per_layer:` with a key of `shares.SIZES`."""
    (how,) = values or ("uniform",)
    if how not in SIZES:
        raise ValueError

    def divide(
        parameters: Mapping[str, Tensor], listed: Sequence[Sequence[str]] | None
    ) -> list[Group]:
        return shared(parameters, layers_of(list(parameters)), how)

    return ClippingRule(coefficients=flat, divide=divide)
