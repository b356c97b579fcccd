"""How far rounding can take a sum from its true value.

The bounds hold for every order of summation, with and without fused multiply-adds (Higham 2002,
chapter 3): a sum of n products is off by at most γ(n) = n u / (1 - n u) times the sum of their
magnitudes, where u is the unit roundoff. So they hold whatever kernel computes a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

# Long sums of squares are computed in blocks of so many terms, which keeps the bounds small.
_BLOCK = 1024

# The older setting for products without shortcuts, and where the newer one is, from torch 2.9 on.
_EXACT, _IEEE = "highest", "ieee"
_NEWER: list[Any] = [
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(backend, "matmul", None), "fp32_precision")
]

# A margin on the bounds, as what they are multiplied with is itself rounded.
_MARGIN = 1.02


def growth(terms: int, dtype: torch.dtype) -> float:
    """γ(terms), relative to the sum of magnitudes; infinity for so many terms that there is no
    bound."""
    product = terms * torch.finfo(dtype).eps / 2
    return _MARGIN * product / (1 - product) if product < 0.5 else math.inf


def coarsest_of(values: Iterable[Tensor | None]) -> float:
    """Distance from 1 to the next number, of the coarsest type among tensors; 0 for none."""
    return max((torch.finfo(v.dtype).eps for v in values if v is not None), default=0.0)


def underflow(dtype: torch.dtype) -> float:
    """What to add to squared lengths so that bounds relative to them cover underflow as well."""
    info = torch.finfo(dtype)
    return info.tiny / (info.eps / 2)


def squared_sums(values: Tensor) -> Tensor:
    """(B, …) -> (B,) sums of squares, off by at most γ(`squared_terms`), relative to themselves."""
    flat = _flat(values)
    whole = flat.shape[1] // _BLOCK * _BLOCK
    rest: Tensor = torch.linalg.vecdot(flat[:, whole:], flat[:, whole:])
    if not whole:
        return rest
    blocks = torch.unflatten(flat[:, :whole], 1, (-1, _BLOCK))
    return _blocked_sum(torch.linalg.vecdot(blocks, blocks)) + rest


def inner_products(one: Tensor, other: Tensor) -> Tensor:
    """(B, …) twice -> (B,) inner products, off by at most γ(`squared_terms`) relative to the
    product of both norms."""
    return _blocked_sum(_flat(one) * _flat(other))


def squared_terms(count: int) -> int:
    """The number of terms that a sum of `count` squares or products, in blocks, counts as."""
    terms = 2
    while count > _BLOCK:
        count, terms = count // _BLOCK + 1, terms + 2 * _BLOCK
    return terms + 2 * count


def _blocked_sum(values: Tensor) -> Tensor:
    """(B, n) -> (B,), in blocks of blocks."""
    while values.shape[1] > _BLOCK:
        whole = values.shape[1] // _BLOCK * _BLOCK
        blocks = torch.unflatten(values[:, :whole], 1, (-1, _BLOCK)).sum(2)
        values = torch.cat((blocks, values[:, whole:].sum(1, keepdim=True)), dim=1)
    return values.sum(1)


def _flat(values: Tensor) -> Tensor:
    """(B, …) -> (B, n), for any B."""
    return values.reshape(values.shape[0], values.shape[1:].numel())


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Have products of float32 matrices computed in float32, not by autocast, TF32 or bfloat16, for
    which the bounds do not hold."""
    kinds = filter(torch.amp.is_autocast_available, {"cpu", device.type})
    casts = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    newer = [(place, place.fp32_precision) for place in _NEWER]
    if not casts and all(before == _IEEE for _, before in newer) and _older() == _EXACT:
        yield  # one of these contexts inside another
        return
    with ExitStack() as stack:
        for kind in casts:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_ieee_products(newer))
        yield


@contextmanager
def _ieee_products(newer: list[tuple[Any, str]]) -> Iterator[None]:
    """Switch off the libraries' shortcuts for products.

    Since torch 2.9 there are two settings, and where they disagree the older one cannot be read,
    which compiled programs do. So both are changed, unless somebody set the newer one alone.

    Args:
        newer: places of the newer setting, and what it is there.
    """
    older = _older()
    try:
        if older != _EXACT:
            torch.set_float32_matmul_precision(_EXACT)
        for place, _ in newer:
            _set_precision(place, _IEEE)
        yield
    finally:
        if older != _EXACT:
            torch.set_float32_matmul_precision(older)
        for place, before in newer:
            _set_precision(place, before)


def _older() -> str:
    """The older setting; that of no shortcuts where both disagree."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _EXACT


def _set_precision(place: Any, precision: str) -> None:
    if place.fp32_precision != precision:
        place.fp32_precision = precision
