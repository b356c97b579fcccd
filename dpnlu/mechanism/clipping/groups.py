"""Clipping by groups of parameters that the plan lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dpnlu.mechanism.clipping.flat import flat
from dpnlu.mechanism.clipping.rule import ClippingRule, Group
from dpnlu.mechanism.clipping.shares import check_how, shared

if TYPE_CHECKING:
    from torch import Tensor


def resolved(names: Sequence[str], listed: Sequence[Sequence[str]]) -> list[list[str]]:
    """The trained parameters of each group.

    Args:
        names: of all of them.
        listed: groups of names, of parameters or of modules, all of whose parameters are meant.

    Raises:
        ValueError: a parameter is in no group or in two, or a name stands for none.
    """
    found = [[name for given in some for name in _meant(given, names)] for some in listed]
    counted = Counter(name for some in found for name in some)
    if repeated := [name for name, count in counted.items() if count > 1]:
        raise ValueError(
            f"Expected every trained parameter in one of `clipping_groups`, got {repeated[0]} "
            "twice: its gradient would enter the sum twice; leave one of them out."
        )
    if missed := [name for name in names if name not in counted]:
        raise ValueError(
            f"Expected every trained parameter in one of `clipping_groups`, but {missed[0]} is in "
            "none: nothing would clip it; add it, or freeze it."
        )
    return found


def _meant(given: str, names: Sequence[str]) -> list[str]:
    meant = [name for name in names if name == given or name.startswith(f"{given}.")]
    if not meant:
        raise ValueError(
            f"Expected names of trained parameters or modules in `clipping_groups`, got {given!r}: "
            "take those of model.named_parameters()."
        )
    return meant


def make(values: Sequence[str]) -> ClippingRule:
    """The rule `groups`, or `groups:` with what `shares.shared` knows."""
    (how,) = values or ("uniform",)
    check_how(how)

    def divide(
        parameters: Mapping[str, Tensor], listed: Sequence[Sequence[str]] | None
    ) -> list[Group]:
        return shared(parameters, resolved(list(parameters), listed or ()), how)

    return ClippingRule(coefficients=flat, divide=divide, takes_groups=True)
