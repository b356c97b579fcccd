"""The sums of one logical batch, which begin as its noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpnlu.mechanism.noise import fill_gaussian

_HALF = (torch.float16, torch.bfloat16)


class NoisySums(Mapping[nn.Parameter, Tensor]):
    """Parameter -> its sum, to which clipped gradients are added in place.

    Memory is taken, and the noise drawn, when a sum is first looked at: by then the activations of
    the first physical batch are gone.

    Guarantee: every entry starts from an independent draw of N(0, std²), in float32 at least.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        std: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._parameters, self._std, self._generators = parameters, std, generators
        self._sums: dict[nn.Parameter, Tensor] = {}

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        if not self._sums:
            sums = {parameter: _room(parameter) for parameter in self._parameters}
            fill_gaussian(sums.values(), std=self._std, generators=self._generators)
            self._sums = sums
        return self._sums[parameter]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _room(parameter: nn.Parameter) -> Tensor:
    dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
