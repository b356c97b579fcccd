"""What a model says about the test texts, and how it is kept in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attacks.farm import Arrays
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Example
from dpnlu.nlu.encoding import encode_all
from dpnlu.nlu.metrics import Answers, answer

# Names in files.
_START, _SECONDS = "test_", "train_seconds"


def read_answers(classifier: Classifier, examples: Sequence[Example]) -> Answers:
    """What a classifier says about examples, all probabilities unrounded."""
    encoded = encode_all(classifier.encoding, examples)
    return answer(classifier.model, classifier.encoding, encoded)


def to_arrays(answers: Answers) -> Arrays:
    """The answers, for files."""
    return {_START + name: said for name, said in vars(answers).items() if said is not None}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Answers | None:
    """The answers that `to_arrays` described; None where an earlier version asked for none."""
    said = {field.name: arrays.get(_START + field.name) for field in fields(Answers)}
    return None if all(answers is None for answers in said.values()) else Answers(**said)


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What a model says that was trained as the target was, but from another seed.

    Attributes:
        train_seconds: wall time of its training.
    """

    answers: Answers
    train_seconds: float

    def to_arrays(self) -> Arrays:
        """The retraining, for files."""
        return to_arrays(self.answers) | {_SECONDS: np.array(self.train_seconds)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Retraining:
        """The retraining that `to_arrays` described.

        Raises:
            ValueError: an array is missing.
        """
        answers = from_arrays(arrays)
        if answers is None or _SECONDS not in arrays:
            raise ValueError(
                f"Expected the arrays of a retraining, got {', '.join(arrays)}: remove the file to "
                "have it made anew."
            )
        return cls(answers=answers, train_seconds=float(arrays[_SECONDS]))
