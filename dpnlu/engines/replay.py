"""Programs whose kernels a GPU begins as one (CUDA graphs).

For a text model Python takes longer to begin a kernel than a GPU to run it: through most of a
private step the GPU waits. A capture runs a program once and notes down its kernels, with the
memory that they read and write; a replay begins all of them by one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Runs before the capture, in which libraries choose their kernels and set themselves up.
_WARM_UP = 2

# Names memory on the GPU that programs share which do not run at the same time.
Pool = Any
Program = Callable[..., Sequence[Tensor]]


class Replay:
    """A program on one GPU; captured when it is first called, for inputs of that shape.

    Guarantee: it computes what the program does of the values that its inputs, what it holds, and
    the parameters in it have at the time of a call. What it holds, and the parameters, must stay
    where they are in memory. The draws of torch's generator are new ones in every call.
    """

    def __init__(self, program: Program, *, held: Sequence[Tensor] = (), pool: Pool) -> None:
        """Nothing is run yet.

        Args:
            program: inputs, held tensors -> tensors; looks at no value.
            held: what the program reads, or writes, where it is.
            pool: of `torch.cuda.graph_pool_handle`.
        """
        self._program, self._held, self._pool = program, held, pool
        self._inputs: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The program's results; the next call writes others into the same memory."""
        with torch.cuda.device(inputs[0].device):  # several may be there
            if self._graph is None:
                self._graph = self._captured(inputs)
            else:
                torch._foreach_copy_(self._inputs, list(inputs))
            self._graph.replay()
        return self._outputs

    def _captured(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [tensor.clone() for tensor in inputs]
        arguments = (*self._inputs, *self._held)
        device = arguments[0].device
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self._program(*arguments)
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, to load data.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"
        ):
            self._outputs = self._program(*arguments)
        return graph
