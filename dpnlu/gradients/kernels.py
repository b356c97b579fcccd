"""Matrix products with the fastest kernel at hand.

torch multiplies float32 matrices on a CPU with MKL. On processors with AVX-512 that are not made by
MKL's maker, oneDNN, the library behind torch's recurrent kernels, is faster with the small products
of recurrent layers; with long sums of products it has taken half of MKL's time on some of them, and
longer on others, so that for these a few products are timed when this module is imported. On its
maker's processors, and with AVX2 alone, MKL is the faster one. oneDNN's products are used where it
is faster and torch has them, for float32; elsewhere, and where the environment says
`DPNLU_KERNELS=torch`, the ordinary one. Both compute in float32.

oneDNN compiles a kernel for every new shape and keeps working memory for it. So it gets few shapes:
blocks of fixed size, and small batches.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _is_by_mkls_maker() -> bool:
    """Whether the processor is Intel's."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "GenuineIntel" in platform.processor()


# torch's operator for x Wᵀ + b through oneDNN, and the one that reorders W for it; None where they
# are missing or not faster.
_product: Any = None
_lay_out: Any = None
if (
    os.environ.get("DPNLU_KERNELS") != "torch"
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and not _is_by_mkls_maker()
):
    _product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    _lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

# Long sums are computed by oneDNN in blocks of so many terms, largest first; the rest by MKL.
_BLOCKS = (1024, 512, 256)
# What is timed: a product of so many rows and columns, so often, by each kernel in turn.
_TIMED, _ROUNDS = 512, 4
# The share of MKL's time that oneDNN must stay below, so that chance decides nothing.
_CLEARLY_LESS = 0.9
# Below this many multiplications, setting up oneDNN takes longer than the product.
_SMALL = 2**16


def are_those_of_torch() -> bool:
    """Whether all products are torch's ordinary ones."""
    return _product is None or _lay_out is None


@dataclass(frozen=True)
class Multiplier:
    """rows -> rows Wᵀ + b with several matrices side by side, for many products of few rows.

    Attributes:
        weights: (D, K, N), transposed.
        biases: (D, 1, N), or None.
        laid_out: the matrices in oneDNN's order; empty where the ordinary product is used.
    """

    weights: Tensor
    biases: Tensor | None
    laid_out: tuple[Tensor, ...]

    @classmethod
    def of(cls, weights: Tensor, biases: Tensor | None, rows: int) -> Multiplier:
        """Prepare for products of about `rows` rows with weights (D, N, K), biases (D, N)."""
        laid_out: tuple[Tensor, ...] = ()
        if _suits(weights) and rows * weights[0].numel() >= _SMALL:
            laid_out = tuple(_lay_out(weight.contiguous(), rows) for weight in weights)
        # The ordinary kernel is fastest with the weights transposed in memory.
        columns = weights.contiguous().mT
        return cls(columns, None if biases is None else biases[:, None], laid_out)

    @property
    def outputs(self) -> int:
        """N."""
        return self.weights.shape[2]

    def __call__(self, rows: Tensor, *, out: Tensor) -> Tensor:
        """(D, M, K) -> (D, M, N), written to `out`."""
        if self.laid_out:
            for place, weight in enumerate(self.laid_out):
                bias = None if self.biases is None else self.biases[place, 0]
                out[place] = _product(rows[place], weight, bias, "none", [], "")
        elif len(out) == 1 and self.biases is not None:
            torch.addmm(self.biases[0], rows[0], self.weights[0], out=out[0])
        elif len(out) == 1:
            torch.mm(rows[0], self.weights[0], out=out[0])
        elif self.biases is not None:
            torch.baddbmm(self.biases, rows, self.weights, out=out)
        else:
            torch.bmm(rows, self.weights, out=out)
        return out


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out (M, N) += left (M, K) times right (K, N), in place."""
    terms, done = left.shape[1], 0
    is_long = _BLOCKS[-1] * out.numel() >= _SMALL
    if is_long and _adds_by_onednn and _suits(left) and _suits(right):
        for block in _BLOCKS:
            while terms - done >= block:
                _add_by_onednn_(out, left[:, done : done + block], right[done : done + block])
                done += block
    if done < terms:
        out.addmm_(left[:, done:], right[done:])
    return out


def _add_by_onednn_(out: Tensor, left: Tensor, right: Tensor) -> None:
    # It is fastest with contiguous rows; the order of the other factor hardly matters.
    out.add_(_product(left.contiguous(), right.mT, None, "none", [], ""))


def _takes_clearly_less(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether `one` takes clearly less time than `other`, by the best of several calls each."""
    times: dict[Callable[[], object], list[float]] = {one: [], other: []}
    for _ in range(1 + _ROUNDS):
        for function, taken in times.items():
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return min(times[one][1:]) < _CLEARLY_LESS * min(times[other][1:])


def _is_faster_with_long_sums() -> bool:
    """Whether oneDNN takes clearly less time than MKL, with factors as a backward pass has them."""
    if are_those_of_torch():
        return False
    whole: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    gradients, inputs = torch.ones(2, _BLOCKS[0], _TIMED, **whole)
    out = torch.zeros(_TIMED, _TIMED, **whole)
    return _takes_clearly_less(
        lambda: _add_by_onednn_(out, gradients.mT, inputs),
        lambda: out.addmm_(gradients.mT, inputs),
    )


def _suits(matrix: Tensor) -> bool:
    return (
        not are_those_of_torch()
        and matrix.dtype is torch.float32
        and matrix.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


_adds_by_onednn = _is_faster_with_long_sums()
