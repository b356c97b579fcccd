"""Memory for the sums of one logical batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpnlu.engines.outcome import buffer_like

# Numbers in one block, if no parameter has more; and multiples of how many a parameter's share
# begins at, as kernels are fastest there.
_BLOCK, _ALIGNED = 2**24, 128


@dataclass(frozen=True)
class Buffers:
    """A tensor for each parameter, not filled.

    Attributes:
        of: parameter -> its own tensor, contiguous, in float32 at least.
        blocks: contiguous tensors that all of these are parts of, to be filled in few operations.
    """

    of: dict[nn.Parameter, Tensor]
    blocks: list[Tensor]

    @classmethod
    def like(cls, parameters: Sequence[nn.Parameter]) -> Buffers:
        """On a CPU each parameter has a block of its own: a large one would be given back to the
        system after every step, and cost page faults in the next."""
        if all(parameter.device.type == "cpu" for parameter in parameters):
            of = {parameter: buffer_like(parameter) for parameter in parameters}
            return cls(of, list(of.values()))
        return cls.in_blocks(parameters)

    @classmethod
    def in_blocks(cls, parameters: Sequence[nn.Parameter]) -> Buffers:
        """Many parameters share a block."""
        found = cls({}, [])
        for some in _alike(parameters):
            sizes = [-(-parameter.numel() // _ALIGNED) * _ALIGNED for parameter in some]
            block = torch.empty(sum(sizes), dtype=_dtype(some[0]), device=some[0].device)
            found.blocks.append(block)
            for parameter, part in zip(some, torch.split(block, sizes), strict=True):
                found.of[parameter] = part[: parameter.numel()].view(parameter.shape)
        return found


def _alike(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose tensors have the same type and place, as many at once as fill a block."""
    waiting: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = parameter.device, _dtype(parameter)
        some = waiting.setdefault(key, [])
        if some and sum(one.numel() for one in some) + parameter.numel() > _BLOCK:
            yield some
            some = waiting[key] = []
        some.append(parameter)
    yield from waiting.values()


def _dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
