"""Matrix products with the fastest kernel at hand.

torch multiplies float32 matrices on a CPU with MKL. On processors with AVX-512 that are not made by
MKL's maker, MKL reaches half the speed of oneDNN, the library behind torch's recurrent kernels; on
its maker's processors, and with AVX2 alone, MKL is the faster one. So with AVX-512 on another
maker's processor, and where torch has a product through oneDNN, that product is used for float32;
elsewhere, and where the environment says `DPNLU_KERNELS=torch`, the ordinary one. Both compute in
float32.

oneDNN compiles a kernel for every new shape and keeps working memory for it. So it gets few shapes:
blocks of fixed size, and small batches.
"""

from __future__ import annotations

import os
import platform
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
    if _suits(left) and _suits(right) and _BLOCKS[-1] * out.numel() >= _SMALL:
        for block in _BLOCKS:
            while terms - done >= block:
                # It is fastest with contiguous rows; the order of the other factor hardly matters.
                rows, columns = left[:, done : done + block], right[done : done + block]
                out.add_(_product(rows.contiguous(), columns.mT, None, "none", [], ""))
                done += block
    if done < terms:
        out.addmm_(left[:, done:], right[done:])
    return out


def _suits(matrix: Tensor) -> bool:
    return (
        not are_those_of_torch()
        and matrix.dtype is torch.float32
        and matrix.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )
