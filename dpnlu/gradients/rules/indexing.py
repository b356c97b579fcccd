"""Indexing: entries picked from a parameter, as transitions of a conditional random field, w[a, b];
a learned row put in the place of masked ones, x[mask] = w."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.layout import Layout, by_example
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.rows import Rows


def getitem(recorder: Recorder, table: Tensor, index: Any) -> Any:
    """table[ids, …], with one tensor of ids for each of the first dimensions: rows of a table;
    NotImplemented for other indices."""
    ids = index if isinstance(index, tuple) else (index,)
    if not recorder.is_batch_independent(table) or not all(_is_ids(each) for each in ids):
        return NotImplemented
    picked = table[ids]
    if picked.requires_grad:
        dims = range(picked.dim() - table.dim() + len(ids))
        recorder.record(picked, _rows(table, ids), dims=dims)
    return picked


def _rows(table: Tensor, ids: tuple[Tensor, ...]) -> Any:
    sizes = table.shape[: len(ids)]
    row = torch.zeros((), dtype=torch.long, device=table.device)
    for each, size in zip(ids, sizes, strict=True):
        row = row * size + each % size
    width = table.shape[len(ids) :].numel()

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        values = by_example(gradient.reshape(*row.shape, width), layout)
        rows = layout.apart(row, fill=-1).reshape(values.shape[:2])
        yield table, Rows(rows, values, (sizes.numel(), width))

    return rule


def setitem(recorder: Recorder, target: Tensor, index: Any, value: Any) -> Any:
    """x[index] = w, with w batch-independent: a copy of it enters for each entry that is
    replaced."""
    if (
        not isinstance(value, Tensor)
        or not recorder.is_batch_independent(value)
        or not value.requires_grad
    ):
        return NotImplemented
    with torch.no_grad():
        shape = target[index].shape
    copies = value.expand(shape)
    dims = range(max(1, len(shape) - value.dim()))
    recorder.enter(value, copies, _copies_added(value.shape), dims=dims)
    target[index] = copies
    return None


def _copies_added(shape: torch.Size) -> Any:
    def per_example(gradient: Tensor, layout: Layout) -> Tensor:
        apart = layout.apart(gradient)
        extra = apart.dim() - 1 - len(shape)
        added = apart.sum(tuple(range(1, extra + 1))) if extra > 0 else apart
        return added.sum_to_size(layout.batch, *shape)

    return per_example


def _is_ids(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


REWRITES: dict[Any, Any] = {Tensor.__getitem__: getitem, Tensor.__setitem__: setitem}
