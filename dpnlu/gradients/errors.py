"""Errors that callers may want to catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UnsupportedLayerError(ValueError):
    """Per-example gradients of a model or a loss cannot be computed, or would mean nothing."""


@contextmanager
def naming_refusals(module: str) -> Iterator[None]:
    """Begin the message of an `UnsupportedLayerError` that is raised in here with the module's
    name."""
    try:
        yield
    except UnsupportedLayerError as error:
        if str(error).startswith("Module "):
            raise
        raise UnsupportedLayerError(f"Module {module}: {error}") from None
