"""Errors that callers may want to catch."""

from __future__ import annotations


class UnsupportedLayerError(ValueError):
    """Per-example gradients of a model or a loss cannot be computed, or would mean nothing."""


class naming_refusals:  # a generator would be shorter, and slow in the path of every operation
    """Begin the message of an `UnsupportedLayerError` that is raised in here with the module's
    name."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, UnsupportedLayerError) and not str(error).startswith("Module "):
            raise UnsupportedLayerError(f"Module {self._module}: {error}") from None
