"""The fast products against ordinary ones, on both sides of every condition for them."""

import pytest
import torch

from dpnlu.gradients import kernels as products
from dpnlu.gradients.kernels import Multiplier, add_product_

# (rows, terms, columns): too small for the fast kernel, of one block, of several and a rest.
SHAPES = [(1, 1, 1), (3, 4, 5), (64, 65, 70), (40, 300, 257), (9, 1900, 33), (0, 4, 5), (4, 0, 5)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}

both_kernels = pytest.mark.usefixtures("kernel")
every_case = pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, dtype) for shape in SHAPES for dtype in TOLERANCE], ids=str
)


def _operands(shape, dtype):
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    close = {"rtol": 1e-2, "atol": TOLERANCE[dtype] * max(inner, 1) ** 0.5}
    return left, right, left.double() @ right.double(), close


@both_kernels
@every_case
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_multiplier_multiplies(shape, dtype, biased, directions):
    several = [_operands(shape, dtype) for _ in range(directions)]
    left, right, expected = (torch.stack(values) for values in list(zip(*several, strict=True))[:3])
    bias = torch.randn(directions, shape[2], dtype=dtype) if biased else None
    multiply = Multiplier.of(right.mT, bias, shape[0])
    assert multiply.outputs == shape[2]
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    assert multiply(left, out=out) is out
    if bias is not None:
        expected = expected + bias[:, None].double()
    torch.testing.assert_close(out.double(), expected, **several[0][3])


@both_kernels
def test_a_multiplier_takes_other_numbers_of_rows_than_announced():
    weight, bias = torch.randn(2, 400, 300), torch.randn(2, 400)
    multiply = Multiplier.of(weight, bias, 64)
    for rows in (0, 1, 63, 65):
        values = torch.randn(2, rows, 300)
        expected = values @ weight.mT + bias[:, None]
        found = multiply(values, out=torch.empty_like(expected))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@both_kernels
@every_case
def test_a_product_is_added_in_place(shape, dtype):
    left, right, expected, close = _operands(shape, dtype)
    for factor in (left, left.mT.contiguous().mT):
        out = torch.randn(shape[0], shape[2], dtype=dtype)
        total = out.double() + expected
        assert add_product_(out, factor, right) is out
        torch.testing.assert_close(out.double(), total, **close)


@pytest.fixture
def one_dnn(monkeypatch):
    """oneDNN's products, whichever kernel is the faster one on this machine."""
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if found is None or not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_product", found)
    monkeypatch.setattr(products, "_lay_out", torch.ops.mkldnn._reorder_linear_weight)
    monkeypatch.setattr(products, "_adds_by_onednn", True)


@pytest.fixture(params=["as here", "oneDNN"])
def kernel(request):
    """Both kernels give the same."""
    if request.param == "oneDNN":
        request.getfixturevalue("one_dnn")


@pytest.mark.usefixtures("one_dnn")
def test_what_is_tested_here_takes_the_fast_kernel():
    assert Multiplier.of(torch.randn(1, 400, 300), None, 64).laid_out
    assert not Multiplier.of(torch.randn(1, 4, 3), None, 64).laid_out
    assert not Multiplier.of(torch.randn(1, 400, 300).double(), None, 64).laid_out


@pytest.mark.parametrize(("seconds", "is_less"), [(0.5, True), (0.95, False), (2.0, False)])
def test_which_kernel_adds_long_sums_is_timed(monkeypatch, seconds, is_less):
    """By the best of several, the first not counted; and by little nothing is decided."""
    now, calls = [0.0], []
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])

    def taking(name, usual):
        def function():
            calls.append(name)
            is_slow = calls.count(name) in (1, 3)  # compiled at first, and disturbed once
            now[0] += 100.0 if is_slow else usual

        return function

    assert products._takes_clearly_less(taking("one", seconds), taking("other", 1.0)) is is_less
    assert calls[:4] == ["one", "other", "one", "other"]


@pytest.mark.usefixtures("one_dnn")
def test_long_sums_are_added_by_the_kernel_that_was_chosen(monkeypatch):
    taken = []
    monkeypatch.setattr(products, "_add_by_onednn_", lambda out, *_: taken.append(out))
    left, right = torch.randn(64, 1300), torch.randn(1300, 64)
    add_product_(torch.zeros(64, 64), left, right)
    assert len(taken) == 2  # 1024 terms and 256; the rest by MKL
    monkeypatch.setattr(products, "_adds_by_onednn", False)
    expected = left @ right
    torch.testing.assert_close(add_product_(torch.zeros(64, 64), left, right), expected)
    assert len(taken) == 2
