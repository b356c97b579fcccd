"""Accuracy by class, from arrays alone: on which intents, slots, rare words or groups privacy costs
most.

Privacy weighs most on what few examples teach: Bagdasaryan, Poursaeed and Shmatikov (2019),
Differential privacy has disparate impact on model accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks.intervals import binomial_interval, paired_interval


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """What is asked in the test, class by class.

    Attributes:
        names: of the C classes.
        training: (C,) how often each occurs in training; None: a class is a range of frequencies.
        classes: (N,) the class of each thing that is asked, as an index of names; -1: it is in
            none.
    """

    names: tuple[str, ...]
    training: tuple[int, ...] | None
    classes: NDArray[np.int64]

    def shares(
        self,
        right: NDArray[np.bool_],
        *,
        ordinary: NDArray[np.bool_] | None = None,
        confidence: float,
    ) -> list[dict[str, Any]]:
        """The share that is right in each class that occurs in the test, for the report.

        Args:
            right: (N,) whether the model is right about each.
            ordinary: (N,) whether the model to compare with is; None: there is none.
            confidence: of the intervals, in (0, 1).
        """
        return [
            self._row(index, right, ordinary, confidence)
            for index in np.unique(self.classes[self.classes >= 0]).tolist()
        ]

    def _row(
        self,
        index: int,
        right: NDArray[np.bool_],
        ordinary: NDArray[np.bool_] | None,
        confidence: float,
    ) -> dict[str, Any]:
        asked = self.classes == index
        here = right[asked]
        row: dict[str, Any] = {"name": self.names[index]}
        if self.training is not None:
            row["training"] = self.training[index]
        row |= {
            "test": len(here),
            "right": float(here.mean()),
            "right_interval": list(
                binomial_interval(int(here.sum()), len(here), confidence=confidence)
            ),
        }
        if ordinary is not None:
            there = ordinary[asked]
            row["change"] = float(here.mean() - there.mean())
            row["change_interval"] = list(paired_interval(there, here, confidence=confidence))
        return row


def by_frequency(frequencies: Sequence[int]) -> Breakdown:
    """The classes of things by how often something about them occurs in training.

    Args:
        frequencies: (N,) of each thing.
    """
    starts = np.array([least for least, _ in RANGES])
    classes = np.searchsorted(starts, np.asarray(frequencies, np.int64), side="right") - 1
    return Breakdown(names=tuple(name for _, name in RANGES), training=None, classes=classes)


# Where each range of training frequencies begins, and its name, the rarest first.
RANGES = ((0, "none"), (1, "1 to 4"), (5, "5 to 19"), (20, "20 to 99"), (100, "over 99"))
