"""The fast product against the ordinary one, on both sides of every condition for it."""

import pytest
import torch

from dpnlu.products import add_product_, product, product_plus

SHAPES = [(1, 1, 1), (3, 4, 5), (64, 65, 70), (257, 33, 40), (0, 4, 5), (300, 1, 200)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}


def _operands(rows, inner, columns, dtype):
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    return left, right, left.double() @ right.double(), TOLERANCE[dtype] * inner**0.5


every_case = [
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("dtype", TOLERANCE, ids=str),
]


def _with(marks):
    def decorate(test):
        for mark in marks:
            test = mark(test)
        return test

    return decorate


@_with(every_case)
def test_product(shape, dtype):
    left, right, expected, atol = _operands(*shape, dtype)
    weight, bias = right.mT.contiguous(), torch.randn(shape[2], dtype=dtype)
    for rows, matrix in ((left, weight), (left.mT.contiguous().mT, right.mT)):
        found = product(rows, matrix)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=atol)
        found = product(rows, matrix, bias)
        shifted = expected + bias.double()
        torch.testing.assert_close(found.double(), shifted, rtol=1e-2, atol=atol)


def test_product_of_sequences():
    rows, weight, bias = torch.randn(9, 20, 30), torch.randn(40, 30), torch.randn(40)
    expected = torch.einsum("tbi,oi->tbo", rows, weight) + bias
    torch.testing.assert_close(product(rows, weight, bias), expected, rtol=1e-4, atol=1e-4)
    turned = rows.transpose(0, 1)
    found = product(turned, weight, bias)
    torch.testing.assert_close(found, expected.transpose(0, 1), rtol=1e-4, atol=1e-4)


@_with(every_case)
def test_product_plus(shape, dtype):
    left, right, expected, atol = _operands(*shape, dtype)
    addend = torch.randn(shape[0], shape[2], dtype=dtype)
    before = addend.clone()
    found = product_plus(addend, left, right.mT.contiguous())
    close = {"rtol": 1e-2, "atol": atol}
    torch.testing.assert_close(found.double(), expected + before.double(), **close)
    assert torch.equal(addend, before), "a new tensor"


@_with(every_case)
def test_add_product_in_place(shape, dtype):
    left, right, expected, atol = _operands(*shape, dtype)
    for factor in (left, left.mT.contiguous().mT):
        out = torch.randn(shape[0], shape[2], dtype=dtype)
        total = out.double() + expected
        assert add_product_(out, factor, right) is out
        torch.testing.assert_close(out.double(), total, rtol=1e-2, atol=atol)


def test_autocast_decides_by_itself():
    left, weight = torch.randn(300, 40), torch.randn(50, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(left, weight).dtype == torch.bfloat16
