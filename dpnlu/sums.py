"""The sums of one logical batch, which begin as its noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpnlu.noise import fill_gaussian

_HALF = (torch.float16, torch.bfloat16)
# Entries drawn together: enough to be worth several threads.
_TOGETHER = 2**22


class NoisySums(Mapping[nn.Parameter, Tensor]):
    """Parameter -> its sum, to which clipped gradients are added in place.

    Memory is taken, and the noise drawn, when a sum is first looked at, together with that of its
    neighbours: by then the activations of the first physical batch are gone, and, where sums are
    added to one after the other, so is what the earlier ones were made of.

    Guarantee: every entry starts from an independent draw of N(0, std²), in float32 at least.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        std: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._groups = {parameter: group for group in _groups(parameters) for parameter in group}
        self._std, self._generators = std, generators
        self._sums: dict[nn.Parameter, Tensor] = {}

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self._sums:
            sums = {neighbour: _room(neighbour) for neighbour in self._groups[parameter]}
            fill_gaussian(sums.values(), std=self._std, generators=self._generators)
            self._sums |= sums
        return self._sums[parameter]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def _room(parameter: nn.Parameter) -> Tensor:
    dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)


def _groups(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours with `_TOGETHER` entries or more between them, but for the last."""
    groups: list[list[nn.Parameter]] = []
    entries = _TOGETHER
    for parameter in parameters:
        if entries >= _TOGETHER:
            groups.append([])
            entries = 0
        groups[-1].append(parameter)
        entries += parameter.numel()
    return groups
