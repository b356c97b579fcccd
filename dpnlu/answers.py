"""Answers of `dpnlu budget` kept on disk, so that a question asked again takes no accountant.

Only that command reads them: training computes what it states. An answer is found by the question,
the sources of this package and the versions of the libraries that reckon, and by nothing less.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_RECKONING = ("dp-accounting", "opacus", "numpy", "scipy")
_NO_PLACE = (OSError, RuntimeError)  # the latter if nobody knows where home is


def recall(question: Mapping[str, Any]) -> Any:
    """What `keep` was given for this question in this installation; None if nothing, or damaged.

    Args:
        question: numbers, strings and None by name.
    """
    stated = _stated(question)
    try:
        kept = json.loads(_path(stated).read_text(encoding="utf-8"))
    except (*_NO_PLACE, ValueError):
        return None
    whole = isinstance(kept, dict) and kept.get("digest") == _digest([stated, kept.get("answer")])
    return kept["answer"] if whole else None


def keep(question: Mapping[str, Any], answer: Any) -> None:
    """Keep an answer (anything JSON can hold) for `recall`; without a writable place, do nothing.

    The place is the folder `dpnlu` in `$XDG_CACHE_HOME`, or else in `~/.cache`.
    """
    stated = _stated(question)
    content = json.dumps({"answer": answer, "digest": _digest([stated, answer])})
    try:
        path = _path(stated)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")  # others may ask the same now
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except _NO_PLACE:
        return


def _stated(question: Mapping[str, Any]) -> dict[str, Any]:
    """The question with all that its answer depends on."""
    return {
        "question": dict(question),
        "sources": _sources(),
        "libraries": {name: _version(name) for name in _RECKONING},
        "python": sys.version,
    }


def _sources() -> str:
    """A digest of the modules of this package: a version number lags behind what one edits."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _path(stated: Mapping[str, Any]) -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "dpnlu" / f"budget-{_digest(stated)}.json"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
