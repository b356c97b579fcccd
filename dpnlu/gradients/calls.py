"""Calls of outermost modules: which of their arguments are the batch, and how to repeat them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dpnlu.gradients.operations import tensors_held
from dpnlu.gradients.provenance import Provenance


@dataclass(frozen=True)
class Call:
    """The call of an outermost module.

    Attributes:
        autocast: (device, whether operations were cast, and to which type), for the CPU and the
            device of the arguments.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    def repeated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for other arguments, computed in the same precision."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            return self.module(*args, **kwargs)


class Calls:
    """The calls of outermost modules with one batch.

    Attributes:
        made: the calls, in their order.
        batch_size: number of examples; None: not known yet.
    """

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self.clear()

    def clear(self) -> None:
        """Forget the calls, the batch and what was announced of it."""
        self.made: list[Call] = []
        self._expected: int | None = None
        self.batch_size: int | None = None
        self._is_batch_given = False  # whether a module was called with the announced batch

    def expect(self, batch_size: int | None, batch: Any) -> None:
        """Announce that modules will be called with this batch; see `Tape.expect`."""
        self._expected = batch_size
        self._provenance.announce(tensors_held(batch))

    def hand_over(self, batch: Any, batch_size: int | None) -> None:
        """State that every tensor in `batch`, and no other, is of the batch."""
        tensors = tensors_held(batch)
        self.batch_size = _leading_size(tensors) if batch_size is None else batch_size
        self._provenance.hand_over(tensors)

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call. Its arguments are of the batch, unless they are known to be independent of
        it.

        Raises:
            UnsupportedLayerError: an argument was computed from an earlier batch.
        """
        given = [t for t in tensors_held((args, kwargs)) if not self._provenance.is_known(t)]
        if self.batch_size is None:
            self.batch_size = self._expected or _leading_size(given)
        announced = [tensor for tensor in given if self._provenance.is_announced(tensor)]
        if self._is_batch_given and not announced:
            # This module is called with something else, which may have as many rows by chance.
            given = [tensor for tensor in given if self.batch_size in tensor.shape[:2]]
        self._is_batch_given |= bool(announced)
        packed = [held for held in (*args, *kwargs.values()) if isinstance(held, PackedSequence)]
        self._provenance.hand_over(tensor for tensor in given if self._may_hold_examples(tensor))
        self._provenance.hand_over([*announced, *tensors_held(packed)])
        device = next((tensor.device.type for tensor in given), "cpu")
        self.made.append(Call(module, args, kwargs, _autocast(device)))

    def _may_hold_examples(self, tensor: Tensor) -> bool:
        """Whether an argument of which nothing else is known may be of the batch, by its shape."""
        if not tensor.dim() or not self.batch_size:
            return tensor.dim() > 0
        first, *others = tensor.shape
        is_time_first = first > 1 and bool(others) and others[0] == self.batch_size
        return first % self.batch_size == 0 or is_time_first


def _autocast(device: str) -> tuple[tuple[str, bool, torch.dtype], ...]:
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted({"cpu", device})
    )


def _leading_size(tensors: list[Tensor]) -> int | None:
    """Size of dimension 0 of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), None)
