"""What report.json must look like. Other tools read it, so a report that differs is refused.

`REPORT` below is the contract in one place: which keys, which types, which ranges. Keys it does not
name may be added, in any form JSON has. A measurement that was not made has no key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NoReturn, TypeAlias

Check: TypeAlias = Callable[[Any, str], None]

SCHEMA = 1

# An interval computed by another route than its value may miss it by rounding errors.
ROUNDING = 1e-9

# Only these may be null: they say that a run has no guarantee, or describe a machine or a study.
NULLABLE = ("target_epsilon", "epsilon")
FREE_BLOCKS = ("machine", "study")


def validate(report: Mapping[str, Any]) -> None:
    """Raise unless the report keeps the contract of report.json.

    Args:
        report: the report as plain Python data: mappings with string keys, lists or tuples, text,
            finite numbers, Booleans. Only `runs` is required.

    Raises:
        ValueError: for the first offence, with the path of the key, such as
            `runs[1].membership.lira.auc_interval`.
    """
    plain(report)


def plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report as dictionaries and lists of its own; raise as `validate` does."""
    _is_object(report, "report")
    copy: dict[str, Any] = _plain(report, "")
    REPORT(copy, "")
    for block in copy:
        if block not in FREE_BLOCKS:
            _no_nulls(copy[block], block)
    names = [run["name"] for run in copy["runs"]]
    for index, name in enumerate(names):
        if name in names[:index]:
            _refuse(f"runs[{index}].name", "unique", repr(name), "name each run differently")
    return copy


def _refuse(path: str, expected: str, got: str, remedy: str) -> NoReturn:
    """Raise the one kind of error there is."""
    raise ValueError(f"Expected `{path or 'report'}` {expected}, got {got}: {remedy}.")


def _plain(value: Any, path: str) -> Any:
    """A deep copy in the types JSON has; refuse what it cannot say."""
    match value:
        case None | bool() | int():
            return value
        case float():
            if not math.isfinite(value):
                _refuse(path, "finite", str(value), "leave out the key of what is not known")
            return float(value)  # numpy's float64 is a float too
        case str():
            return _encodable(value, path)
        case Mapping():
            return {_key(k, path): _plain(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
        case list() | tuple():
            return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    _refuse(path, "as plain data", kind, "convert it with float(), int(), str() or .tolist()")


def _key(key: object, path: str) -> str:
    """The key, which must be text."""
    if not isinstance(key, str):
        _refuse(path, "with keys of text", repr(key), "write numbers as text, such as '0.01'")
    return _encodable(key, path)


def _encodable(text: str, path: str) -> str:
    """The text, which must be writable to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(path, "as valid Unicode", ascii(text), "decode it with errors='replace'")
    return str(text)


def _no_nulls(value: Any, path: str) -> None:
    """Refuse null for a measurement: it would read as one that failed."""
    if value is None and path.rpartition(".")[2] not in NULLABLE:
        _refuse(path, "to be a value", "None", "leave the key out where nothing was measured")
    if isinstance(value, dict):
        for key, item in value.items():
            _no_nulls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _no_nulls(item, f"{path}[{index}]")


def _number(low: float, high: float = math.inf, *, ends: str = "[]") -> Check:
    """A number in that range; `ends` are its brackets, round ones leave the end itself out."""
    allowed = f"as a number in {ends[0]}{low:g}, {high:g}{ends[1]}"

    def check(value: Any, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(path, allowed, repr(value), "leave the key out where nothing was measured")
        left_out = (ends[0] == "(" and value == low) or (ends[1] == ")" and value == high)
        if not low <= value <= high or left_out:
            _refuse(path, allowed, repr(value), "check its unit")

    return check


def _nullable(inner: Check) -> Check:
    """The same, or null."""
    return lambda value, path: None if value is None else inner(value, path)


def _count(value: Any, path: str) -> None:
    """A whole number, at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _refuse(path, "as a whole number >= 0", repr(value), "it counts things")


def _truth(value: Any, path: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        _refuse(path, "as true or false", repr(value), "it is a statement")


def _text(value: Any, path: str) -> None:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        _refuse(path, "as text", repr(value), "leave the key out where there is nothing to say")


def _version(value: Any, path: str) -> None:
    """The version of this contract."""
    if value != SCHEMA or isinstance(value, bool):
        _refuse(path, f"= {SCHEMA}", repr(value), "use the version of attacks that wrote the file")


def _is_object(value: Any, path: str) -> None:
    """A mapping."""
    if not isinstance(value, Mapping):
        _refuse(path, "as an object", repr(value), "leave the key out where nothing was measured")


def _interval(bounds: Check) -> Check:
    """Two numbers in order."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list) or len(value) != 2:
            _refuse(path, "as [low, high]", repr(value), "give both limits")
        for index, limit in enumerate(value):
            bounds(limit, f"{path}[{index}]")
        if value[0] > value[1]:
            _refuse(path, "as [low, high]", repr(value), "put the lower limit first")

    return check


def _list(item: Check, *, least: int = 0) -> Check:
    """A list of such items."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            got = repr(value) if not isinstance(value, list) else f"{len(value)} entries"
            _refuse(path, f"as a list of at least {least}", got, "give one entry for each")
        for index, entry in enumerate(value):
            item(entry, f"{path}[{index}]")

    return check


def _each(item: Check, key: Check | None = None) -> Check:
    """An object whose keys are names and whose values are such items."""

    def check(value: Any, path: str) -> None:
        _is_object(value, path)
        for name, entry in value.items():
            if key is not None:
                key(name, path)
            item(entry, f"{path}.{name}")

    return check


def _object(required: Mapping[str, Check], optional: Mapping[str, Check], *rules: Check) -> Check:
    """An object with these keys, perhaps these, perhaps others; then the rules that tie them."""

    def check(value: Any, path: str) -> None:
        _is_object(value, path)
        for key in required:
            if key not in value:
                missing = f"{path}.{key}".lstrip(".")
                _refuse(missing, "to be present", "nothing", "every report needs it")
        for key, field in {**required, **optional}.items():
            if key in value:
                field(value[key], f"{path}.{key}".lstrip("."))
        for rule in rules:
            rule(value, path)

    return check


def _around(value_key: str, interval_key: str) -> Check:
    """Rule: the interval comes with its value and contains it."""

    def check(record: Any, path: str) -> None:
        if interval_key not in record:
            return
        place = f"{path}.{interval_key}"
        if value_key not in record:
            _refuse(place, f"next to `{value_key}`", "no value", "give both or neither")
        (low, high), value = record[interval_key], record[value_key]
        if not low - ROUNDING <= value <= high + ROUNDING:
            _refuse(place, f"around {value!r}", f"[{low!r}, {high!r}]", "check what it belongs to")

    return check


def _together(key: str, *others: str) -> Check:
    """Rule: this key needs those others to be understood."""

    def check(record: Any, path: str) -> None:
        for other in others:
            if key in record and other not in record:
                _refuse(f"{path}.{other}", f"next to `{key}`", "nothing", "give both or neither")

    return check


def _at_most(smaller: str, larger: str) -> Check:
    """Rule: one number does not exceed another."""

    def check(record: Any, path: str) -> None:
        if smaller in record and larger in record:
            value, limit = record[smaller], record[larger]
            if value > limit + ROUNDING:
                allowed = f"at most `{larger}` = {limit!r}"
                _refuse(f"{path}.{smaller}", allowed, repr(value), "check the units of both")

    return check


def _one_each(count: str, entries: str) -> Check:
    """Rule: a list has as many entries as a number says."""

    def check(record: Any, path: str) -> None:
        if count in record and entries in record and record[count] != len(record[entries]):
            allowed = f"with one entry for each of `{count}` = {record[count]!r}"
            _refuse(f"{path}.{entries}", allowed, str(len(record[entries])), "count them anew")

    return check


def _guarantee(run: Any, path: str) -> None:
    """Rule: ε needs its δ; a target needs an ε that was spent."""
    if run["epsilon"] is not None and "delta" not in run:
        _refuse(f"{path}.delta", "next to `epsilon`", "nothing", "an ε means nothing without its δ")
    if run["epsilon"] is None and run["target_epsilon"] is not None:
        got = f"{run['target_epsilon']!r} without `epsilon`"
        _refuse(f"{path}.target_epsilon", "null without an ε", got, "give the accounted ε")


def _rate(key: Any, path: str) -> None:
    """A false positive rate, written as text."""
    try:
        value = float(key)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        _refuse(path, "with false positive rates as keys", repr(key), "write them like '0.01'")


def _curve(roc: Any, path: str) -> None:
    """Rule: one length, a rising FPR, each TPR within its band."""
    lengths = {key: len(roc[key]) for key in ("fpr", "tpr", "low", "high")}
    if len(set(lengths.values())) > 1:
        _refuse(path, "with lists of one length", str(lengths), "give one entry for each point")
    if any(later < earlier for earlier, later in pairwise(roc["fpr"])):
        _refuse(f"{path}.fpr", "in rising order", "a fall", "sort the points by FPR")
    for index, (low, tpr, high) in enumerate(zip(roc["low"], roc["tpr"], roc["high"], strict=True)):
        if not low - ROUNDING <= tpr <= high + ROUNDING:
            band = f"around {tpr!r}"
            _refuse(f"{path}.low[{index}]", band, f"[{low!r}, {high!r}]", "check the band")


def _numbers(names: Sequence[str], check: Check) -> dict[str, Check]:
    """The same check for several keys."""
    return dict.fromkeys(names, check)


SHARE = _number(0, 1)
SHARES = _interval(SHARE)
ANY = _number(-math.inf, ends="()")
AT_LEAST_ZERO = _number(0, ends="[)")
POSITIVE = _number(0, ends="()")
DELTA = _number(0, 1, ends="[)")
CONFIDENCE = _number(0, 1, ends="()")

TPR = _object(
    {"value": SHARE, "interval": SHARES}, {"ceiling": SHARE}, _around("value", "interval")
)

ROC = _object(_numbers(("fpr", "tpr", "low", "high"), _list(SHARE, least=2)), {}, _curve)

ATTACK = _object(
    {"auc": SHARE, "auc_interval": SHARES},
    {
        "auc_ceiling": SHARE,
        "tpr_at_fpr": _each(TPR, key=_rate),
        "roc": ROC,
        "members": _count,
        "non_members": _count,
    },
    _around("auc", "auc_interval"),
)

CANARY = _object(
    {},
    {
        "pattern": _text,
        **_numbers(("repetitions", "trials"), _count),
        **_numbers(("exposure_bits", "available_bits", "chance_exposure_bits"), AT_LEAST_ZERO),
        "exposure_interval": _interval(ANY),
        "ranks": _list(_number(1), least=1),
        **_numbers(("exact_match", "hamming", "chance_exact", "chance_hamming"), SHARE),
        "exact_match_interval": SHARES,
        "group_epsilon": AT_LEAST_ZERO,
    },
    _together("exposure_bits", "available_bits"),
    _together("exact_match", "exact_match_interval", "chance_exact"),
    _together("hamming", "chance_hamming"),
    _at_most("exposure_bits", "available_bits"),
    _one_each("trials", "ranks"),
    _around("exposure_bits", "exposure_interval"),
    _around("exact_match", "exact_match_interval"),
)

AUDIT = _object(
    {"epsilon_lower_bound": AT_LEAST_ZERO, "confidence": CONFIDENCE, "method": _text},
    {"ceiling": AT_LEAST_ZERO, "canaries": _count, "assumption": _text, "scores": _text},
    _at_most("epsilon_lower_bound", "ceiling"),
)

RUN = _object(
    {
        "name": _text,
        "target_epsilon": _nullable(AT_LEAST_ZERO),
        "epsilon": _nullable(AT_LEAST_ZERO),
    },
    {
        "delta": DELTA,
        **_numbers(("noise_multiplier", "train_seconds", "attack_seconds"), AT_LEAST_ZERO),
        **_numbers(("max_grad_norm", "overhead", "peak_memory_mib"), POSITIVE),
        "sample_rate": _number(0, 1, ends="(]"),
        **_numbers(("steps", "references"), _count),
        **_numbers(("accountant", "adjacency", "unit"), _text),
        **_numbers(("intent_accuracy", "slot_f1", "frame_accuracy", "reference_accuracy"), SHARE),
        "intent_accuracy_interval": SHARES,
        "membership": _each(ATTACK, key=_text),
        "canary": CANARY,
        "canaries": _list(CANARY),
        "audit": AUDIT,
        "warnings": _list(_text),
    },
    _guarantee,
    _around("intent_accuracy", "intent_accuracy_interval"),
)

BLIND = _object(
    {"auc": SHARE, "auc_interval": SHARES, "suspicious": _truth},
    {},
    _around("auc", "auc_interval"),
)

DATA = _object(
    {},
    {
        **_numbers(("name", "spec"), _text),
        **_numbers(("train", "valid", "test", "intents", "slots"), _count),
        **_numbers(("repeated_rows_dropped", "audit_examples", "members"), _count),
        **_numbers(("labels_are_public", "vocabulary_is_public"), _truth),
        "blind": BLIND,
    },
    _at_most("members", "audit_examples"),
)

REPORT = _object(
    {"runs": _list(RUN, least=1)},
    {
        "schema": _version,
        **_numbers(("title", "command", "created"), _text),
        "data": DATA,
        "machine": _each(lambda value, path: None),
        "study": _object({}, {"confidence": CONFIDENCE}),
    },
)
