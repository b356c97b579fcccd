"""Errors that callers may want to catch."""

from __future__ import annotations


class UnsupportedLayerError(ValueError):
    """The per-example gradients of a model or a loss cannot be had, or would mean nothing."""
