"""How a loader makes physical batches of a logical one, by examples or by users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import LogicalBatch, PhysicalBatch, physical_batches
from dpnlu.mechanism.users import Users, user_batches

# Whose the examples are: the name of a column, an example -> its user's id, or all ids in order.
WhoseExamples = str | Callable[[Any], Any] | Iterable[Any] | Users


class Cutting:
    """Cuts the logical batches of one plan and one data set.

    Attributes:
        users: whose the examples are; None: the unit is the example.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        users: WhoseExamples | None,
        size: int | None,
        fixed_size: bool,
        rng: np.random.Generator,
    ) -> None:
        """Find out whose the examples are.

        Args:
            users: as for `PrivateTraining.loader`.
            size: of a physical batch in examples; None: a whole logical batch.
            fixed_size: fill pieces up to that.
            rng: chooses examples of users.

        Raises:
            ValueError: these do not fit the plan, or each other.
        """
        if size is not None and size < 1:
            raise ValueError(f"Expected `physical_batch_size` >= 1, got {size}.")
        if fixed_size and size is None:
            raise ValueError(
                "Expected `physical_batch_size` for batches of a fixed size, got None: say how "
                "many examples to compute at once."
            )
        self._plan, self._dataset, self._rng = plan, dataset, rng
        self._size, self._fixed = size, fixed_size
        self.users = _users(plan, dataset, users)
        if self.users is not None and fixed_size:
            raise ValueError(
                "Expected batches of any size with unit='user', got a fixed one: users are not "
                "cut in two to fill it; leave `fixed_size` out."
            )
        self.check_size()

    def check_size(self) -> None:
        """Whether the data set has as much as the plan says.

        Raises:
            ValueError: it has another size, or changed it.
        """
        size: int = len(self._dataset)  # type: ignore[arg-type]
        planned, unit = self._plan.num_examples, self._plan.unit
        if self.users is not None and size != len(self.users.owners):
            raise ValueError(
                f"Expected the user of each of {size} examples, got {len(self.users.owners)} of "
                "them: name a user for every example, and leave the data set as it is."
            )
        found = size if self.users is None else len(self.users)
        if found != planned:
            raise ValueError(
                f"Expected the {planned} {unit}s of the plan, got a data set of {found}: plan for "
                "the data set that is trained on, and leave it as it is."
            )

    def __call__(self, batch: LogicalBatch) -> list[PhysicalBatch]:
        """The pieces of a logical batch; see `physical_batches` and `user_batches`."""
        most = self._plan.examples_per_user
        if self.users is None or most is None:
            size: int = self._size or len(self._dataset)  # type: ignore[arg-type]
            return physical_batches(batch, size=size, fixed_size=self._fixed)
        return user_batches(batch, self.users, most=most, size=self._size, rng=self._rng)


def read_users(dataset: Dataset[Any] | Sequence[Any], users: WhoseExamples) -> Users:
    """Whose the examples of a data set are; all of them are looked at.

    Raises:
        ValueError: an example has no such column, or no id; see `Users.of`.
    """
    if isinstance(users, Users):
        return users
    if isinstance(users, str):
        return Users.of(_column(dataset, users))
    if callable(users):
        return Users.of(users(example) for example in _examples(dataset))
    return Users.of(users)


def _users(
    plan: PrivacyPlan, dataset: Dataset[Any] | Sequence[Any], users: WhoseExamples | None
) -> Users | None:
    if (users is not None) != (plan.unit == "user"):
        raise ValueError(
            f"Expected `users` exactly with a plan of unit='user', got {users!r:.40} and "
            f"unit={plan.unit!r}: say whose the examples are, by a column or a function, and plan "
            "for users."
        )
    return None if users is None else read_users(dataset, users)


def _examples(dataset: Any) -> Iterable[Any]:
    return (dataset[number] for number in range(len(dataset)))


def _column(dataset: Any, name: str) -> Iterable[Any]:
    """What every example has under a name."""
    if name in (getattr(dataset, "column_names", None) or ()):
        yield from dataset[name]  # without decoding all the other columns
        return
    for number, example in enumerate(_examples(dataset)):
        if isinstance(example, Mapping):
            if name not in example:
                raise ValueError(_missing(name, number))
            yield example[name]
        elif hasattr(example, name):
            yield getattr(example, name)
        else:
            raise ValueError(_missing(name, number))


def _missing(name: str, number: int) -> str:
    return (
        f"Expected a column {name!r} that says whose each example is, got none in example "
        f"{number}: name another one, or hand over a function of an example."
    )
