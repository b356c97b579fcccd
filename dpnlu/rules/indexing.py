"""Entries picked out of a parameter by ids: transitions of a conditional random field, w[a, b]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients import Gradients, Rows
from dpnlu.rules.shapes import by_example
from dpnlu.tape import Tape


def getitem(tape: Tape, table: Tensor, index: Any) -> Any:
    """table[ids, …], with one tensor of ids for each of the first dimensions: rows of a table."""
    ids = index if isinstance(index, tuple) else (index,)
    if not tape.is_free(table) or not all(_is_ids(each) for each in ids):
        return NotImplemented
    picked = table[ids]
    if picked.requires_grad:
        tape.record(picked, _rows(table, ids))
    return picked


def _rows(table: Tensor, ids: tuple[Tensor, ...]) -> Any:
    sizes = table.shape[: len(ids)]
    row = torch.zeros((), dtype=torch.long, device=table.device)
    for each, size in zip(ids, sizes, strict=True):
        row = row * size + each % size
    width = table.shape[len(ids) :].numel()

    def finish(gradient: Tensor, batch: int) -> Iterator[tuple[Tensor, Gradients]]:
        values = by_example(gradient.reshape(*row.shape, width), batch)
        yield table, Rows(row.reshape(values.shape[:2]), values, (sizes.numel(), width))

    return finish


def _is_ids(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


REWRITES = {Tensor.__getitem__: getitem}
