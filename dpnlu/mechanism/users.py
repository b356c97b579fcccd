"""Users as the unit of privacy: whose the examples are, and which of them count in a step.

Poisson sampling draws users; of each that is drawn some examples are chosen, which are clipped as a
whole. A choice is independent of everything but the user's own examples, so that a step is a
sampled Gaussian mechanism of users, whatever their examples are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnlu.mechanism.sampling import LogicalBatch, PhysicalBatch


@dataclass(frozen=True)
class Users:
    """Whose each example is.

    Attributes:
        owners: (N,) the number of each example's user; all numbers from 0 to the largest occur.

    Raises:
        ValueError: there is a user without an example, or there are none at all.
    """

    owners: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.owners) or int(self.owners.min()) < 0:
            raise ValueError("Expected the number >= 0 of each example's user, at least one.")
        if not self.counts.all():
            raise ValueError(
                f"Expected an example of every user, got none of user {int(self.counts.argmin())}: "
                "leave out users without examples, who would count as drawn."
            )

    @classmethod
    def of(cls, ids: Iterable[Any]) -> Users:
        """The users with these ids, one for each example; equal ids are one user.

        Args:
            ids: strings, bytes, integers or tuples of them. What is compared by identity, as most
                objects are, would make every example a user of its own, and protect nobody.

        Raises:
            ValueError: an id is missing, or of another kind.
        """
        plain = [_plain(one, example) for example, one in enumerate(ids)]
        if len(kinds := {type(one) for one in plain}) > 1:
            raise ValueError(
                f"Expected user ids of one kind, got {' and '.join(sorted(map(_name, kinds)))}: "
                "7 and '7' would be two users; convert them."
            )
        numbers: dict[Hashable, int] = {}
        owners = [numbers.setdefault(one, len(numbers)) for one in plain]
        return cls(np.array(owners, dtype=np.int64))

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(U,) how many examples each user has; at least 1."""
        return np.bincount(self.owners)

    def __len__(self) -> int:
        """U, the number of users."""
        return len(self.counts)

    def chosen(
        self, drawn: NDArray[np.int64], *, most: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose examples of some users.

        Guarantee: of each user a uniformly random subset of min(`most`, its number of examples),
        independent of the other users.

        Args:
            drawn: (n,) numbers of different users.
            most: >= 1.

        Returns:
            (m,) ids of the examples, user by user, and (m,) the place in `drawn` of their user.
        """
        counts = self.counts[drawn]
        places = np.repeat(np.arange(len(drawn)), counts)
        first = np.cumsum(counts) - counts
        members = self._ordered[
            self._starts[drawn][places] + np.arange(len(places)) - first[places]
        ]
        order = np.lexsort((rng.random(len(places)), places))  # at random within each user
        kept = order[np.arange(len(places)) - first[places] < most]
        return members[kept], places[kept]

    @cached_property
    def _ordered(self) -> NDArray[np.int64]:
        """(N,) ids of the examples, user by user."""
        return np.argsort(self.owners, kind="stable")

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """(U,) where each user's begin there."""
        return np.cumsum(self.counts) - self.counts


def user_batches(
    batch: LogicalBatch,
    users: Users,
    *,
    most: int,
    size: int | None,
    rng: np.random.Generator,
) -> list[PhysicalBatch]:
    """Choose examples of the users of a logical batch, and cut these into pieces.

    Users with like numbers of examples go together, as all in a piece take the memory of the
    largest; of these, neighbours in the data: if they are in order of length, little is padded.
    Whoever has more than fit into one piece has several, alone, which close one clipping unit.

    Args:
        most: examples of a user, at most.
        size: users times examples of the largest in a piece, at most; None: as many examples as
            there are in the whole logical batch.
        rng: chooses; see `Users.chosen`.

    Returns:
        The pieces in order; none at all for an empty logical batch.
    """
    (drawn,) = batch.units
    ids, places = users.chosen(drawn, most=most, rng=rng)
    if not len(ids):
        return []
    size = len(ids) if size is None else size
    counts = np.bincount(places)
    starts = np.cumsum(counts) - counts
    order = np.lexsort((np.bincount(places, weights=ids) / counts, -counts))
    pieces: list[PhysicalBatch] = []
    start = 0
    while start < len(order):
        some = order[start : start + max(1, size // int(counts[order[start]]))]
        start += len(some)
        chosen = np.concatenate([ids[starts[one] : starts[one] + counts[one]] for one in some])
        if len(chosen) > size:
            pieces += _parts(chosen, size)
        else:
            owners = np.repeat(np.arange(len(some)), counts[some])
            pieces.append(PhysicalBatch(chosen, True, False, users=owners))
    pieces[-1] = replace(pieces[-1], closes_step=True)
    return pieces


def _parts(ids: NDArray[np.int64], size: int) -> list[PhysicalBatch]:
    """One user's examples in several pieces."""
    cuts = range(0, len(ids), size)
    return [PhysicalBatch(ids[cut : cut + size], cut == cuts[-1], False) for cut in cuts]


def _plain(value: Any, example: int) -> Hashable:
    """An id by its value, whatever holds it."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # of numpy or torch
    if isinstance(value, tuple) and value:
        return tuple(_plain(part, example) for part in value)
    is_blank = isinstance(value, (str, bytes)) and not value.strip()
    if isinstance(value, (str, bytes, int)) and not isinstance(value, bool) and not is_blank:
        return value
    found = "a blank one" if is_blank else "none" if value is None else _name(type(value))
    raise ValueError(
        f"Expected a user id, a string or an integer, of every example, got {found} for example "
        f"{example}: name its user, by something that is compared by its value."
    )


def _name(kind: type) -> str:
    return kind.__name__
