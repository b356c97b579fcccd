"""Checks of single values and of records, put together to a contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

Check: TypeAlias = Callable[[Any, str], None]
# An interval computed by another route than its value may miss it by rounding errors.
ROUNDING = 1e-9


def refuse(path: str, expected: str, got: str, remedy: str) -> NoReturn:
    """Raise the one kind of error there is."""
    raise ValueError(f"Expected `{path or 'report'}` {expected}, got {got}: {remedy}.")


def number(low: float, high: float = math.inf, *, ends: str = "[]") -> Check:
    """A number in that range; `ends` are its brackets, round ones leave the end itself out."""
    allowed = f"as a number in {ends[0]}{low:g}, {high:g}{ends[1]}"

    def check(value: Any, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(path, allowed, repr(value), "leave the key out where nothing was measured")
        left_out = (ends[0] == "(" and value == low) or (ends[1] == ")" and value == high)
        if not low <= value <= high or left_out:
            refuse(path, allowed, repr(value), "check its unit")

    return check


def nullable(inner: Check) -> Check:
    """The same, or null."""
    return lambda value, path: None if value is None else inner(value, path)


def count(value: Any, path: str) -> None:
    """A whole number, at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        refuse(path, "as a whole number >= 0", repr(value), "it counts things")


def truth(value: Any, path: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        refuse(path, "as true or false", repr(value), "it is a statement")


def text(value: Any, path: str) -> None:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        refuse(path, "as text", repr(value), "leave the key out where there is nothing to say")


def is_object(value: Any, path: str) -> None:
    """A mapping."""
    if not isinstance(value, Mapping):
        refuse(path, "as an object", repr(value), "leave the key out where nothing was measured")


def interval(bounds: Check) -> Check:
    """Two numbers in order."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list) or len(value) != 2:
            refuse(path, "as [low, high]", repr(value), "give both limits")
        for index, limit in enumerate(value):
            bounds(limit, f"{path}[{index}]")
        if value[0] > value[1]:
            refuse(path, "as [low, high]", repr(value), "put the lower limit first")

    return check


def list_of(item: Check, *, least: int = 0) -> Check:
    """A list of such items."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            got = repr(value) if not isinstance(value, list) else f"{len(value)} entries"
            refuse(path, f"as a list of at least {least}", got, "give one entry for each")
        for index, entry in enumerate(value):
            item(entry, f"{path}[{index}]")

    return check


def each(item: Check, key: Check | None = None) -> Check:
    """An object whose keys are names and whose values are such items."""

    def check(value: Any, path: str) -> None:
        is_object(value, path)
        for name, entry in value.items():
            if key is not None:
                key(name, path)
            item(entry, f"{path}.{name}")

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check], *rules: Check) -> Check:
    """An object with these keys, perhaps these, perhaps others; then the rules that tie them."""

    def check(value: Any, path: str) -> None:
        is_object(value, path)
        for key in required:
            if key not in value:
                missing = f"{path}.{key}".lstrip(".")
                refuse(missing, "to be present", "nothing", "every report needs it")
        for key, field in {**required, **optional}.items():
            if key in value:
                field(value[key], f"{path}.{key}".lstrip("."))
        for rule in rules:
            rule(value, path)

    return check


def around(value_key: str, interval_key: str) -> Check:
    """Rule: the interval comes with its value and contains it."""

    def check(record: Any, path: str) -> None:
        if interval_key not in record:
            return
        place = f"{path}.{interval_key}"
        if value_key not in record:
            refuse(place, f"next to `{value_key}`", "no value", "give both or neither")
        (low, high), value = record[interval_key], record[value_key]
        if not low - ROUNDING <= value <= high + ROUNDING:
            refuse(place, f"around {value!r}", f"[{low!r}, {high!r}]", "check what it belongs to")

    return check


def together(key: str, *others: str) -> Check:
    """Rule: this key needs those others to be understood."""

    def check(record: Any, path: str) -> None:
        for other in others:
            if key in record and other not in record:
                refuse(f"{path}.{other}", f"next to `{key}`", "nothing", "give both or neither")

    return check


def at_most(smaller: str, larger: str) -> Check:
    """Rule: one number does not exceed another."""

    def check(record: Any, path: str) -> None:
        if smaller in record and larger in record:
            value, limit = record[smaller], record[larger]
            if value > limit + ROUNDING:
                allowed = f"at most `{larger}` = {limit!r}"
                refuse(f"{path}.{smaller}", allowed, repr(value), "check the units of both")

    return check


def one_each(count: str, entries: str) -> Check:
    """Rule: a list has as many entries as a number says."""

    def check(record: Any, path: str) -> None:
        if count in record and entries in record and record[count] != len(record[entries]):
            allowed = f"with one entry for each of `{count}` = {record[count]!r}"
            refuse(f"{path}.{entries}", allowed, str(len(record[entries])), "count them anew")

    return check


def rate(key: Any, path: str) -> None:
    """A false positive rate, written as text."""
    try:
        value = float(key)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        refuse(path, "with false positive rates as keys", repr(key), "write them like '0.01'")


def numbers(names: Sequence[str], check: Check) -> dict[str, Check]:
    """The same check for several keys."""
    return dict.fromkeys(names, check)
