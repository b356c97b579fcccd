"""How the bound is divided among groups of parameters: C_l = w_l C, where the w_l² add up to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dpnlu.mechanism.clipping.rule import Group, number

if TYPE_CHECKING:
    from torch import Tensor

# The names of a group -> a number > 0, to which its share of the bound is proportional.
_Size = Callable[[Sequence["Tensor"]], float]


def _uniform(parameters: Sequence[Tensor]) -> float:
    return 1.0


def _root_of_size(parameters: Sequence[Tensor]) -> float:
    return math.sqrt(sum(parameter.numel() for parameter in parameters))


def _norm(parameters: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(p.detach().cpu().double().square().sum()) for p in parameters))


SIZES: dict[str, _Size] = {"uniform": _uniform, "size": _root_of_size, "weights": _norm}


def shared(
    parameters: Mapping[str, Tensor], names: Sequence[Sequence[str]], how: str
) -> list[Group]:
    """Groups with their shares of the bound.

    Args:
        parameters: the trained ones, by name; for "weights" they are as training finds them, which
            is public where they come from public data or a draw.
        names: of the parameters in each group.
        how: a key of `SIZES`, or numbers > 0 for all groups, separated by commas.

    Raises:
        ValueError: there are more or fewer numbers than groups, or a group's weights are all zero.
    """
    if how in SIZES:
        sizes = [SIZES[how]([parameters[name] for name in some]) for some in names]
    else:
        sizes = given_sizes(how)
        if len(sizes) != len(names):
            raise ValueError(
                f"Expected a share of the bound for each of {len(names)} groups, got {len(sizes)}: "
                "give as many numbers as `clipping_groups` has lists."
            )
    if bad := [some[0] for some, size in zip(names, sizes, strict=True) if not 0 < size < math.inf]:
        raise ValueError(
            f"Expected finite weights of norm > 0 in every group, got others with {bad[0]}: a "
            "bound of zero would freeze them; divide the bound by `uniform` or `size`."
        )
    total = math.hypot(*sizes)
    return [Group(tuple(some), size / total) for some, size in zip(names, sizes, strict=True)]


def check_how(how: str) -> None:
    """Raise ValueError unless `shared` knows this way."""
    if how not in SIZES:
        given_sizes(how)


def given_sizes(how: str) -> list[float]:
    """The numbers that a text lists."""
    return [number(size, low=0.0) for size in how.split(",")]
