"""Matrix products with the fastest kernel at hand.

torch multiplies float32 matrices on a CPU with MKL. On processors with AVX-512 that are not the
library maker's own, MKL reaches half the speed of oneDNN, the library behind torch's recurrent
kernels there; with AVX2 alone it is the faster one. Where torch carries oneDNN's product, it is
used on the former; elsewhere, and for other types, the ordinary one. Both round alike, in float32.

oneDNN compiles a kernel for every shape it meets and keeps working memory for it. So it is given
few shapes: blocks of fixed size, and small batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torch's operator for x Wᵀ + b through oneDNN, and the one that lays W out for it; None where
# they are missing or not the faster ones.
_product: Any = None
_lay_out: Any = None
if (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
):
    _product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    _lay_out = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

# Numbers of terms in which long sums are taken by oneDNN, longest first; the rest by MKL.
_BLOCKS = (1024, 512, 256)
# Below this many multiplications a product is over before oneDNN has set itself up.
_SMALL = 2**16


@dataclass(frozen=True)
class Multiplier:
    """rows -> rows Wᵀ + b, for many products of few rows with one matrix.

    Attributes:
        weight: (N, K), laid out for the kernel.
        bias: (N,), or None.
        fast: whether it is.
    """

    weight: Tensor
    bias: Tensor | None
    fast: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, rows: int) -> Multiplier:
        """Prepare for products of about `rows` rows."""
        fast = _suits(weight) and rows * weight.numel() >= _SMALL
        if fast:
            return cls(_lay_out(weight.contiguous(), rows), bias, fast)
        return cls(weight, bias, fast)

    def __call__(self, rows: Tensor) -> Tensor:
        """(M, K) -> (M, N), a new tensor."""
        if self.fast:
            return _product(rows, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return torch.nn.functional.linear(rows, self.weight, self.bias)


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out (M, N) += left (M, K) times right (K, N), in place."""
    terms, done = left.shape[1], 0
    if _suits(left) and _suits(right) and _BLOCKS[-1] * out.numel() >= _SMALL:
        for block in _BLOCKS:
            while terms - done >= block:
                # It is fastest with rows that lie in order; the other factor may lie as it does.
                rows, columns = left[:, done : done + block], right[done : done + block]
                out.add_(_product(rows.contiguous(), columns.mT, None, "none", [], ""))
                done += block
    if done < terms:
        out.addmm_(left[:, done:], right[done:])
    return out


def _suits(matrix: Tensor) -> bool:
    return (
        _product is not None
        and _lay_out is not None
        and matrix.dtype is torch.float32
        and matrix.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )
