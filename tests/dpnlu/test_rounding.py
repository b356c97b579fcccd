"""Bounds of rounding: never exceeded, and not far above what happens."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dpnlu.gradients.rounding import (
    coarsest_of,
    full_precision,
    growth,
    inner_products,
    squared_sums,
    squared_terms,
    underflow,
)

DTYPES = [torch.float32, torch.float64]
SIZES = [0, 1, 7, 1023, 1024, 1025, 5000, 2**20 + 3]


def _exact(values: Tensor) -> Fraction:
    return sum((Fraction(value) ** 2 for value in values.flatten().tolist()), Fraction(0))


def test_what_is_not_there_does_not_count_as_coarse():
    fine = torch.ones(1, dtype=torch.float64)
    assert coarsest_of([None]) == 0
    assert coarsest_of([None, fine]) == 2.0**-52
    assert coarsest_of([fine, fine.bfloat16(), fine.float()]) == 2.0**-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_sums_of_squares_keep_their_bound(size, dtype):
    values = torch.randn(2, size, dtype=dtype).exp()
    for found, row in zip(squared_sums(values), values, strict=True):
        exact = _exact(row)
        bound = growth(squared_terms(size), dtype) * float(exact)
        assert abs(Fraction(float(found)) - exact) <= Fraction(bound)


def test_long_sums_of_equal_terms_keep_theirs():
    """All rounding errors have the same sign where terms are equal."""
    values = torch.full((1, SIZES[-1]), 1 / 3)
    exact = SIZES[-1] * float(values[0, 0]) ** 2
    bound = growth(squared_terms(SIZES[-1]), torch.float32)
    assert abs(float(squared_sums(values)[0]) / exact - 1) <= bound < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES[:-1])
def test_inner_products_keep_their_bound(size, dtype):
    one, other = torch.randn(2, 3, size, dtype=dtype)
    found = inner_products(one, other)
    exact = (one.double() * other.double()).sum(1)
    bound = growth(squared_terms(size), dtype) * one.norm(dim=1) * other.norm(dim=1)
    slack = 1e-15 * one.norm(dim=1).double() * other.norm(dim=1).double()
    assert bool(((found.double() - exact).abs() <= bound.double() + slack).all())


def test_the_bound_grows_with_the_number_of_terms_until_nothing_can_be_said():
    unit = torch.finfo(torch.float32).eps / 2
    for terms in (1, 10, 1000):
        assert terms * unit <= growth(terms, torch.float32) <= 1.05 * terms * unit
    assert growth(2**23 - 1, torch.float32) < math.inf == growth(2**24, torch.float32)


def test_blocks_keep_the_number_of_terms_small():
    assert squared_terms(100) == 202
    assert squared_terms(10**9) < 10**4


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_underflow_takes_away_is_covered(dtype):
    """The square of a number that is too small is 0, or has lost its digits."""
    info = torch.finfo(dtype)
    for scale in (1e-3, 1.0, 1e3):
        value = math.sqrt(info.tiny) * scale / 3
        square = torch.tensor([[value]], dtype=dtype)
        lost = abs(float(squared_sums(square)[0]) - value * value)
        assert lost <= growth(2, dtype) * (value * value + underflow(dtype))


def test_products_are_computed_in_full():
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        one = torch.full((4, 4), 1 + 2**-12)
        with torch.autocast("cpu", torch.bfloat16), full_precision(one.device):
            assert torch.equal(one @ torch.eye(4), one)
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


CUDA, MKLDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
LOWERED = {
    "default": lambda: None,
    "older": lambda: setattr(CUDA, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "newer, of the CPU": lambda: setattr(MKLDNN, "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("lower", LOWERED.values(), ids=LOWERED)
def test_both_settings_of_precision_agree_meanwhile_and_come_back(lower):
    """Where they disagree torch refuses to read the older one, as its compiler does."""

    def settings():
        found = []
        for read in (torch._C._get_cublas_allow_tf32, torch.get_float32_matmul_precision):
            try:
                found.append(read())
            except RuntimeError:
                found.append("they disagree")
        return [*found, CUDA.fp32_precision, MKLDNN.fp32_precision]

    unchanged = settings()
    try:
        lower()
        before = settings()
        for device in ("cuda", "cpu"):
            with full_precision(torch.device(device)):
                assert settings() == [False, "highest", "ieee", "ieee"]
            assert settings() == before
            with pytest.raises(ZeroDivisionError), full_precision(torch.device(device)):
                raise ZeroDivisionError
            assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        CUDA.fp32_precision, MKLDNN.fp32_precision = unchanged[2:]
    assert settings() == unchanged
