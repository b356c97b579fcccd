"""A moment to which a computation can go back: random numbers and buffers as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Moments:
    """Takes moments of one model; of its buffers it remembers those that change."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changing: set[int] | None = None

    def now(self) -> Moment:
        """The present moment."""
        buffers = list(self._model.buffers())
        kept = [b for b in buffers if self._changing is None or id(b) in self._changing]
        device = next((parameter.device for parameter in self._model.parameters()), None)
        moment = Moment(device or torch.device("cpu"), kept)
        self._changing = self._changing or set()
        return moment

    def notice(self, moment: Moment) -> None:
        """Something ran since that moment: see which buffers it changed."""
        assert self._changing is not None
        self._changing |= {id(buffer) for buffer in moment.changed()}


class Moment:
    """The states of all random generators, and what some buffers held."""

    def __init__(self, device: torch.device, buffers: list[Tensor]) -> None:
        self._device = device
        self._states = _states(device)
        self._buffers = [(buffer, buffer._version, buffer.clone()) for buffer in buffers]

    def changed(self) -> list[Tensor]:
        """The buffers that are not what they were."""
        return [buffer for buffer, version, _ in self._buffers if buffer._version != version]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """In here everything is as it was; afterwards, as if nothing had run here."""
        states, buffers = _states(self._device), [(b, b.clone()) for b, *_ in self._buffers]
        _restore(self._device, self._states, [(b, values) for b, _, values in self._buffers])
        try:
            yield
        finally:
            _restore(self._device, states, buffers)


def _states(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy = np.random.get_state()  # noqa: NPY002 — it is what others draw from
    return torch.get_rng_state(), on_device, random.getstate(), numpy


def _restore(
    device: torch.device, states: tuple[Any, ...], buffers: list[tuple[Tensor, Tensor]]
) -> None:
    on_cpu, on_device, python, numpy = states
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    with torch.no_grad():
        for buffer, values in buffers:
            if buffer.shape == values.shape:
                buffer.copy_(values)
