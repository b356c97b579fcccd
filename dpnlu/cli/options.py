"""Settings as options of a command: names, types, defaults and help are those of their fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dpnlu.runs.setting import Option

_Settings = TypeVar("_Settings")

# What stands for a number in the help.
_NUMBERS = {int: "N", float: "X"}


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add an option for each field of a dataclass whose fields are made by `setting`.

    A field without a default is required, and comes first; one that is a tuple takes several
    values, and a Boolean, False unless the option is given, takes none.
    """
    hints = get_type_hints(settings)
    for field in sorted(fields(settings), key=lambda field: not _is_required(field)):
        option: Option = field.metadata["option"]
        kind, takes_several = _value_type(hints[field.name])
        if kind is bool:
            parser.add_argument(_flag(field), action="store_true", help=option.help)
            continue
        parser.add_argument(
            _flag(field),
            type=kind if option.parse is None else _with_its_words(option.parse),
            nargs="+" if takes_several else None,
            required=_is_required(field),
            default=_default(field),
            metavar=option.metavar or _NUMBERS.get(kind),
            help=_help(option, field),
        )


def settings_from(settings: type[_Settings], options: argparse.Namespace) -> _Settings:
    """The settings that the options of `add_options` ask for.

    Raises:
        ValueError: one is out of range.
    """
    given = {field.name: getattr(options, field.name) for field in fields(settings)}  # type: ignore[arg-type]
    return settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def add_output(parser: argparse.ArgumentParser, *, holds: str) -> None:
    """Add the options of a command that works for long and fills a directory."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=holds)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Field[Any]) -> Any:
    """What stands where the option is not given; None where it must be."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _flag(field: Field[Any]) -> str:
    return f"--{field.name.replace('_', '-')}"


def _value_type(hint: Any) -> tuple[type, bool]:
    """The type of one value, words that stand for one aside, and whether there may be several."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (kind,) = (kind for kind in kinds if kind is not NoneType and get_origin(kind) is not Literal)
    return (get_args(kind)[0], True) if get_origin(kind) is tuple else (kind, False)


def _with_its_words(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same function, whose own words argparse shows when it refuses a text."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _help(option: Option, field: Field[Any]) -> str:
    """The help of the field and, unless it says so itself, its default."""
    text = option.help.replace("%", "%%")
    default = _default(field)
    if default in (None, ()):
        return text
    values: Sequence[Any] = default if isinstance(default, tuple) else (default,)
    shown = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return f"{text} (default: {shown})"
