"""Errors that callers may want to catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UnsupportedLayerError(ValueError):
    """Per-example gradients of a model or a loss cannot be computed, or would mean nothing."""


def named(error: UnsupportedLayerError, module: str) -> UnsupportedLayerError:
    """The error with a message that begins with a module's name, unless it does already."""
    if str(error).startswith("Module "):
        return error
    return UnsupportedLayerError(f"Module {module}: {error}")


@contextmanager
def naming_refusals(module: str) -> Iterator[None]:
    """Begin the message of an `UnsupportedLayerError` that is raised in here with the module's
    name."""
    try:
        yield
    except UnsupportedLayerError as error:
        raise named(error, module) from None
