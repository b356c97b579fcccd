"""What report.json must look like. Other tools read it, so a report that differs is refused.

`REPORT` below is the contract in one place: which keys, which types, which ranges. Keys it does not
name may be added, in any form JSON has. A measurement that was not made has no key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from attacks.report.checks import (
    ROUNDING,
    around,
    at_most,
    count,
    each,
    interval,
    is_object,
    list_of,
    nullable,
    number,
    numbers,
    one_each,
    rate,
    record,
    refuse,
    text,
    together,
    truth,
)

SCHEMA = 1

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
    is_object(report, "report")
    copy: dict[str, Any] = _plain(report, "")
    REPORT(copy, "")
    for block in copy:
        if block not in FREE_BLOCKS:
            _no_nulls(copy[block], block)
    names = [run["name"] for run in copy["runs"]]
    for index, name in enumerate(names):
        if name in names[:index]:
            refuse(f"runs[{index}].name", "unique", repr(name), "name each run differently")
    return copy


def _plain(value: Any, path: str) -> Any:
    """A deep copy in the types JSON has; refuse what it cannot say."""
    match value:
        case None | bool() | int():
            return value
        case float():
            if not math.isfinite(value):
                refuse(path, "finite", str(value), "leave out the key of what is not known")
            return float(value)  # numpy's float64 is a float too
        case str():
            return _encodable(value, path)
        case Mapping():
            return {_key(k, path): _plain(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
        case list() | tuple():
            return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    refuse(path, "as plain data", kind, "convert it with float(), int(), str() or .tolist()")


def _key(key: object, path: str) -> str:
    """The key, which must be text."""
    if not isinstance(key, str):
        refuse(path, "with keys of text", repr(key), "write numbers as text, such as '0.01'")
    return _encodable(key, path)


def _encodable(text: str, path: str) -> str:
    """The text, which must be writable to a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(path, "as valid Unicode", ascii(text), "decode it with errors='replace'")
    return str(text)


def _no_nulls(value: Any, path: str) -> None:
    """Refuse null for a measurement: it would read as one that failed."""
    if value is None and path.rpartition(".")[2] not in NULLABLE:
        refuse(path, "to be a value", "None", "leave the key out where nothing was measured")
    if isinstance(value, dict):
        for key, item in value.items():
            _no_nulls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _no_nulls(item, f"{path}[{index}]")


def _guarantee(run: Any, path: str) -> None:
    """Rule: ε needs its δ; a target needs an ε that was spent."""
    if run["epsilon"] is not None and "delta" not in run:
        refuse(f"{path}.delta", "next to `epsilon`", "nothing", "an ε means nothing without its δ")
    if run["epsilon"] is None and run["target_epsilon"] is not None:
        got = f"{run['target_epsilon']!r} without `epsilon`"
        refuse(f"{path}.target_epsilon", "null without an ε", got, "give the accounted ε")


def _curve(roc: Any, path: str) -> None:
    """Rule: one length, a rising FPR, each TPR within its band."""
    lengths = {key: len(roc[key]) for key in ("fpr", "tpr", "low", "high")}
    if len(set(lengths.values())) > 1:
        refuse(path, "with lists of one length", str(lengths), "give one entry for each point")
    if any(later < earlier for earlier, later in pairwise(roc["fpr"])):
        refuse(f"{path}.fpr", "in rising order", "a fall", "sort the points by FPR")
    for index, (low, tpr, high) in enumerate(zip(roc["low"], roc["tpr"], roc["high"], strict=True)):
        if not low - ROUNDING <= tpr <= high + ROUNDING:
            band = f"around {tpr!r}"
            refuse(f"{path}.low[{index}]", band, f"[{low!r}, {high!r}]", "check the band")


def _pairs(shown: Any, path: str) -> None:
    """Rule: one loss for each candidate."""
    if len(shown["candidates"]) != len(shown["losses"]):
        got = f"{len(shown['losses'])} for {len(shown['candidates'])} candidates"
        refuse(f"{path}.losses", "with one loss for each candidate", got, "count them anew")


def _one_token_each(example: Any, path: str) -> None:
    """Rule: a recovered token, and an original one if it is known, for each position."""
    for key in ("recovered", "original"):
        if key in example and len(example[key]) != len(example["positions"]):
            allowed = f"with a token for each of {len(example['positions'])} positions"
            refuse(f"{path}.{key}", allowed, str(len(example[key])), "count them anew")


def version(value: Any, path: str) -> None:
    """The version of this contract."""
    if value != SCHEMA or isinstance(value, bool):
        refuse(path, f"= {SCHEMA}", repr(value), "use the version of attacks that wrote the file")


def _gap_of_groups(run: Any, path: str) -> None:
    """Rule: the gap lies between two groups of the breakdown."""
    if "group_gap" not in run:
        return
    found, place = run["group_gap"], f"{path}.group_gap"
    right = {row["name"]: row["right"] for row in run.get("breakdown", {}).get("groups", ())}
    for key in ("highest", "lowest"):
        if found[key] not in right:
            allowed = "as the name of a group in `breakdown`"
            refuse(f"{place}.{key}", allowed, repr(found[key]), "write it as there")
    between = right[found["highest"]] - right[found["lowest"]]
    if abs(found["gap"] - between) > ROUNDING:
        allowed = f"= {between!r}, as far as the two groups lie apart"
        refuse(f"{place}.gap", allowed, repr(found["gap"]), "compute it from `breakdown`")


SHARE = number(0, 1)
SHARES = interval(SHARE)
ANY = number(-math.inf, ends="()")
AT_LEAST_ZERO = number(0, ends="[)")
POSITIVE = number(0, ends="()")
DELTA = number(0, 1, ends="[)")
CONFIDENCE = number(0, 1, ends="()")

TPR = record({"value": SHARE, "interval": SHARES}, {"ceiling": SHARE}, around("value", "interval"))

ROC = record(numbers(("fpr", "tpr", "low", "high"), list_of(SHARE, least=2)), {}, _curve)

ATTACK = record(
    {"auc": SHARE, "auc_interval": SHARES},
    {
        "auc_ceiling": SHARE,
        "tpr_at_fpr": each(TPR, key=rate),
        "roc": ROC,
        "members": count,
        "non_members": count,
    },
    around("auc", "auc_interval"),
)

RECOVERY = record(
    {
        **numbers(("exact_match", "hamming", "chance_exact", "chance_hamming"), SHARE),
        "exact_match_interval": SHARES,
        "trials": count,
    },
    {},
    around("exact_match", "exact_match_interval"),
)

POSITION = record(
    {"match": SHARE, "interval": SHARES, "chance": SHARE}, {}, around("match", "interval")
)

SHOWN = record({"candidates": list_of(text, least=1), "losses": list_of(ANY, least=1)}, {}, _pairs)

EXAMPLE = record(
    {"carrier": text, "recovered": list_of(text, least=1), "positions": list_of(SHOWN, least=1)},
    {"original": list_of(text, least=1), "loss": ANY, "method": text, "notes": list_of(text)},
    _one_token_each,
)

CURVE = record(
    {
        "guesses": list_of(number(1), least=1),
        **numbers(("found", "low", "high", "chance"), list_of(SHARE)),
    },
    {},
)

CANARY = record(
    {},
    {
        **numbers(("pattern", "carrier", "method", "exposure_method"), text),
        "sampled_exposure_bits": AT_LEAST_ZERO,
        "fit_p_values": list_of(SHARE, least=1),
        "extraction": each(RECOVERY, key=text),
        "positions": list_of(POSITION, least=1),
        "guesses_needed": CURVE,
        "example": EXAMPLE,
        **numbers(("repetitions", "trials"), count),
        **numbers(("exposure_bits", "available_bits", "chance_exposure_bits"), AT_LEAST_ZERO),
        "exposure_interval": interval(ANY),
        "ranks": list_of(number(1), least=1),
        **numbers(("exact_match", "hamming", "chance_exact", "chance_hamming"), SHARE),
        "exact_match_interval": SHARES,
        **numbers(("group_epsilon", "accounted_group_epsilon"), AT_LEAST_ZERO),
    },
    together("exposure_bits", "available_bits"),
    together("exact_match", "exact_match_interval", "chance_exact"),
    together("hamming", "chance_hamming"),
    at_most("exposure_bits", "available_bits"),
    one_each("trials", "ranks"),
    around("exposure_bits", "exposure_interval"),
    around("exact_match", "exact_match_interval"),
)

AUDIT = record(
    {"epsilon_lower_bound": AT_LEAST_ZERO, "confidence": CONFIDENCE, "method": text},
    {"ceiling": AT_LEAST_ZERO, "canaries": count, "assumption": text, "scores": text},
    at_most("epsilon_lower_bound", "ceiling"),
)

CHANGE = number(-1, 1)

CLASS = record(
    {"name": text, "test": count, "right": SHARE},
    {
        "training": count,
        "right_interval": SHARES,
        "change": CHANGE,
        "change_interval": interval(CHANGE),
    },
    around("right", "right_interval"),
    around("change", "change_interval"),
)

GROUP_GAP = record(
    {"highest": text, "lowest": text, "gap": SHARE},
    {"gap_by_chance": SHARE, "change": CHANGE, "change_interval": interval(CHANGE)},
    around("change", "change_interval"),
)

CALIBRATION = record(
    {"texts": count, **numbers(("accuracy", "mean_confidence", "ece"), SHARE)},
    {
        "overconfidence": CHANGE,
        "overconfidence_interval": interval(CHANGE),
        "ece_interval": SHARES,
        "ece_by_chance": SHARE,
        "bins": list_of(
            record(
                {"texts": count, "confidence": SHARE, "accuracy": SHARE},
                {"accuracy_interval": SHARES},
                around("accuracy", "accuracy_interval"),
            )
        ),
    },
    around("overconfidence", "overconfidence_interval"),
    around("ece", "ece_interval"),
)

FLIPS = record(
    {
        "against": text,
        "texts": count,
        **numbers(("negative", "positive", "disagreement"), SHARE),
    },
    {
        **numbers(
            ("negative_interval", "positive_interval", "disagreement_interval"),
            SHARES,
        ),
        "train_seconds": AT_LEAST_ZERO,
    },
    *(around(key, f"{key}_interval") for key in ("negative", "positive", "disagreement")),
    *(at_most(key, "disagreement") for key in ("negative", "positive")),
)

RUN = record(
    {
        "name": text,
        "target_epsilon": nullable(AT_LEAST_ZERO),
        "epsilon": nullable(AT_LEAST_ZERO),
    },
    {
        "delta": DELTA,
        **numbers(("noise_multiplier", "constant_noise_multiplier"), AT_LEAST_ZERO),
        **numbers(("train_seconds", "attack_seconds"), AT_LEAST_ZERO),
        **numbers(("max_grad_norm", "overhead", "peak_memory_mib"), POSITIVE),
        "sample_rate": number(0, 1, ends="(]"),
        **numbers(("steps", "references", "examples_per_user"), count),
        **numbers(("accountant", "second_accountant", "adjacency", "unit"), text),
        **numbers(("noise_schedule", "clipping"), text),
        "second_epsilon": AT_LEAST_ZERO,
        **numbers(("intent_accuracy", "slot_f1", "frame_accuracy", "reference_accuracy"), SHARE),
        "intent_accuracy_interval": SHARES,
        "membership": each(ATTACK, key=text),
        "canary": CANARY,
        "canaries": list_of(CANARY),
        "recovered": list_of(EXAMPLE),
        "audit": AUDIT,
        "breakdown": record(
            {}, numbers(("intents", "slots", "groups", "rarest_word"), list_of(CLASS))
        ),
        "group_gap": GROUP_GAP,
        "calibration": CALIBRATION,
        "flips": FLIPS,
        "retrainings": list_of(FLIPS),
        "warnings": list_of(text),
    },
    _guarantee,
    together("second_epsilon", "second_accountant"),
    around("intent_accuracy", "intent_accuracy_interval"),
    _gap_of_groups,
)

BLIND = record(
    {"auc": SHARE, "auc_interval": SHARES, "suspicious": truth},
    {},
    around("auc", "auc_interval"),
)

DATA = record(
    {},
    {
        **numbers(("name", "spec"), text),
        **numbers(("train", "valid", "test", "intents", "slots"), count),
        **numbers(("repeated_rows_dropped", "audit_examples", "members"), count),
        **numbers(("audit_users", "member_users"), count),
        **numbers(("labels_are_public", "vocabulary_is_public"), truth),
        "blind": BLIND,
    },
    at_most("members", "audit_examples"),
    at_most("member_users", "audit_users"),
)

REPORT = record(
    {"runs": list_of(RUN, least=1)},
    {
        "schema": version,
        **numbers(("title", "command", "created"), text),
        "data": DATA,
        "machine": each(lambda value, path: None),
        "study": record({}, {"confidence": CONFIDENCE}),
    },
)
