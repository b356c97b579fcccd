"""A setting: a field of a dataclass that is an option of a command line, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

# As many as the memory holds.
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a setting is written and explained on the command line.

    Attributes:
        help: what it means; its default only where that is None.
        metavar: what stands for its value; None: its name.
        parse: text -> value, raises ValueError; None: the type of the field.
    """

    help: str
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None


def setting(
    help: str,
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is an option, too; without a default it is required."""
    metadata = {"option": Option(help=help, metavar=metavar, parse=parse)}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_epsilon(text: str) -> float:
    """A budget: a number above 0, or "inf" for ordinary training.

    Raises:
        ValueError: it is neither.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"expected ε > 0 or inf, got {text}")
    return value


def parse_size(text: str) -> int | Literal["auto"]:
    """A number of examples, or "auto".

    Raises:
        ValueError: it is neither.
    """
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number or auto, got {text}") from None
