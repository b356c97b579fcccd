"""Which rows of an embedding table training has moved, given the public table it started from.

A row moves if its token occurred. So the table gives away which rare tokens did, whatever the
model predicts; frozen embeddings give away nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from attacks._validate import Bools, Floats, any_array, count, floats, shown

# A row counts as moved beyond so many times the typical movement of those that stood still.
_STILL = 1e-6
# A larger number is no entry of an embedding table; nor is a row that is shorter than its inverse.
# Its sixth power, which is as large as what is computed of such tables, is still a number.
_LARGEST = 1e50


@dataclass(frozen=True, kw_only=True)
class Movement:
    """How far each row of a table moved.

    Attributes:
        distance: (N,) from the initial row, after the shrinkage that all rows share (weight decay)
            was undone; relative to the typical length of an initial row.
        shrinkage: what all rows were multiplied by; 1 without weight decay.
    """

    distance: Floats
    shrinkage: float

    @property
    def moved(self) -> Bools:
        """(N,): whether the row moved at all, up to rounding.

        In private training noise moves all rows, and in ordinary training with a dense optimiser
        none that never occurred.
        """
        moved: Bools = self.distance > _STILL
        return moved


def movement(trained: ArrayLike, initial: ArrayLike) -> Movement:
    """Compare an embedding table with the public one that training began with.

    Args:
        trained: (N, d).
        initial: (N, d).

    Raises:
        ValueError: tables of different shapes, or equal ones: the embeddings were frozen.
    """
    after, before = floats("trained", trained, dimensions=2), floats("initial", initial)
    if after.shape != before.shape or after.size == 0:
        raise ValueError(
            f"Expected two tables of one shape (N, d), got {after.shape} and {before.shape}: "
            "compare with the very table that training began with."
        )
    if not (np.abs(np.stack((after, before))) < _LARGEST).all():
        raise ValueError(
            f"Expected tables of numbers below {_LARGEST:g}, got larger ones: the model has "
            "diverged."
        )
    if np.array_equal(after, before):
        raise ValueError(
            "Expected a table that training has moved, got the initial one: the embeddings were "
            "frozen, and unique tokens leave no trace in them."
        )
    squares = (before**2).sum(axis=1)
    there = squares > _LARGEST**-2
    # Most rows are of tokens that did not occur; the median is theirs.
    ratios = (after * before).sum(axis=1)[there] / squares[there]
    shrinkage = float(np.median(ratios)) if ratios.size else 1.0
    length = float(np.sqrt(np.median(squares[there]))) if ratios.size else 1.0
    distance = np.linalg.norm(after - shrinkage * before, axis=1) / length
    return Movement(distance=distance, shrinkage=shrinkage)


def most_moved(found: Movement, rows: Sequence[int], *, most: int) -> tuple[int, ...]:
    """The places in `rows`, ids of candidates, whose rows moved furthest, the furthest first.

    Args:
        rows: (V,) ids, for example those of the candidates for a secret.
        most: how many to return at most.

    Raises:
        ValueError: an id is not in the table.
    """
    ids = any_array("rows", rows)
    if (
        ids.ndim != 1
        or ids.dtype.kind not in "iu"
        or ((ids < 0) | (ids >= found.distance.size)).any()
    ):
        raise ValueError(
            f"Expected `rows` as ids in [0, {found.distance.size}), got {shown(ids.tolist())}: "
            "pass the rows of the table that the candidates have."
        )
    order = np.argsort(-found.distance[ids], kind="stable")
    return tuple(order[: count("most", most, least=1)].tolist())
