"""What was computed from weights, kept to be computed only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")


class Memory:
    """Results that depend on weights alone: of one forward pass, and of several."""

    def __init__(self) -> None:
        self._of_this_pass: dict[Any, Any] = {}
        self._prepared: dict[Any, _Prepared] = {}

    def remembered(self, weights: tuple[Tensor, ...], make: Callable[[], T], *key: Any) -> T:
        """The result of `make`, which is called once in a forward pass.

        Args:
            weights: that the result depends on.
            key: what else it depends on.
        """
        whole = (*key, *(id(weight) for weight in weights))
        if whole not in self._of_this_pass:
            # The weights are held, so that no other tensors get their ids.
            self._of_this_pass[whole] = (weights, make())
        made: T = self._of_this_pass[whole][1]
        return made

    def prepared(self, weights: tuple[Tensor, ...], make: Callable[[], T], *key: Any) -> T:
        """The result of `make`, which is called again only if the numbers in the weights changed.

        They are compared with copies: an assignment to `.data` leaves no other trace. In a program
        that is traced nothing is kept: it computes what it needs each time that it is run.

        Args:
            weights, key: as in `remembered`.
        """
        if any(isinstance(weight.detach(), FakeTensor) for weight in weights):
            return make()
        whole = (*key, *(id(weight) for weight in weights))
        held = self._prepared.get(whole)
        if held is None or not held.is_of(weights):
            held = self._prepared[whole] = _Prepared.of(weights, make())
        made: T = held.made
        return made

    def forget_pass(self) -> None:
        """Another forward pass begins."""
        self._of_this_pass = {}

    def forget_prepared(self) -> None:
        """The weights changed: release the memory of what was prepared from them."""
        self._prepared = {}


@dataclass(frozen=True)
class _Prepared:
    """A result, and the weights that it was computed from.

    Attributes:
        copies: their values at that time; None: not to be compared.
    """

    made: Any
    weights: tuple[Tensor, ...]
    copies: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, weights: tuple[Tensor, ...], made: Any) -> _Prepared:
        # On other devices the comparison would make the CPU wait, and preparing is cheap.
        is_comparable = all(weight.device.type == "cpu" for weight in weights)
        copies = tuple(weight.detach().clone() for weight in weights) if is_comparable else None
        return cls(made, weights, copies)

    def is_of(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether the weights have, number by number, the values they had."""
        return self.copies is not None and all(
            torch.equal(weight.detach(), copy)
            for weight, copy in zip(weights, self.copies, strict=True)
        )
