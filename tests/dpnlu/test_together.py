"""Many tensors' gradients at once: the same as one after the other, in fewer operations."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpnlu.gradients import together
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.rows import Bags, Rows
from dpnlu.gradients.together import add_weighted_sums, added, norms_of_all
from dpnlu.gradients.uses import combine

BATCH = 3


def outer(positions, d, p, transposed=False):
    left, right = torch.randn(BATCH, positions, d), torch.randn(BATCH, positions, p)
    return OuterProducts(left, right, transposed)


def rows(positions, d, vocabulary):
    ids = torch.randint(-1, vocabulary, (BATCH, positions))
    return Rows(ids, torch.randn(BATCH, positions, d), (vocabulary, d))


def bags(positions, d, vocabulary):
    ids = torch.randint(-1, vocabulary, (BATCH, positions))
    return Bags(ids, torch.randn(BATCH, positions), torch.randn(BATCH, d), (vocabulary, d))


def shared_factors():
    """Query, key and value have the same input."""
    first = outer(2, 16, 12)
    return [[OuterProducts(first.left, torch.randn(BATCH, 2, p))] for p in (12, 30, 12)]


def models() -> dict[str, list[list[Gradients]]]:
    torch.manual_seed(0)
    every = {
        "nothing": [],
        "one tensor": [[outer(2, 16, 12)]],
        "one small tensor": [[Dense(torch.randn(BATCH, 4))]],
        "Gram matrices of one size": [[outer(2, 16, 12)], [outer(2, 9, 7)], [rows(2, 5, 6)]],
        "Gram matrices of several sizes": [[outer(t, 40, 50)] for t in (2, 3, 2, 4, 3, 0)],
        "shared factors": shared_factors(),
        "small tensors": [[Dense(torch.randn(BATCH, *s))] for s in [(4,), (2, 3), (), (0,), (5,)]],
        "long ones": [[Dense(torch.randn(BATCH, n))] for n in (1024, 700, 2**14, 2**14 + 1)],
        "one position": [[outer(1, 4, 5)], [outer(1, 4, 5, True)]],
        "written out": [[outer(40, 4, 3)], [outer(40, 4, 3, True)]],
        "tied": [combine([rows(4, 6, 5), outer(2, 6, 5)]), [rows(4, 6, 5)], [outer(2, 16, 12)]],
    }
    every["all of them"] = [uses for one in every.values() for uses in one] + [[bags(4, 3, 5)]]
    return every


every_model = pytest.mark.parametrize("name", models())
every_cut = pytest.mark.parametrize("near", [0, 40, 2**18])


def _written_out(uses: list[Gradients]) -> Tensor:
    """(B, n) in float64."""
    return sum(use.dense().reshape(BATCH, use.entries).double() for use in uses)


@every_cut
@every_model
@pytest.mark.usefixtures("double")
def test_norms_are_those_of_all_gradients_written_out(monkeypatch, name, near):
    monkeypatch.setattr(together, "_NEAR", near)
    parts = models()[name]
    found = norms_of_all(parts, torch.zeros(BATCH))
    expected = sum((_written_out(u).square().sum(1) for u in parts), torch.zeros(BATCH))
    assert found.values.shape == found.slack.shape == (BATCH,)
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=0)


@every_cut
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("double")
def test_sums_are_those_of_each_tensor(monkeypatch, name, near, dtype):
    """… added to what is there, in whatever precision that is kept."""
    monkeypatch.setattr(together, "_NEAR", near)
    parts, coefficients = models()[name], torch.tensor([0.5, -2.0, 0.0])
    pairs, expected = [], []
    for uses in parts:
        out = torch.randn(uses[0].dense().shape[1:], dtype=dtype)
        right = coefficients @ _written_out(uses)
        expected.append(out + right.reshape(out.shape).to(dtype))
        pairs += [(use, out) for use in uses]
    add_weighted_sums(pairs, coefficients)
    found = list(dict.fromkeys(out for _, out in pairs))
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {}
    torch.testing.assert_close(found, expected, **close)


@every_cut
@every_model
@pytest.mark.parametrize("cancels", [None, 1e-3, 1e-7])
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e8])
def test_the_slack_covers_what_rounding_does(monkeypatch, name, near, cancels, scale):
    """In float32, where terms almost cancel, too. Guarantee: the true norm is at most values +
    slack."""
    monkeypatch.setattr(together, "_NEAR", near)
    parts = [[_scaled(use, scale, cancels) for use in uses] for uses in models()[name]]
    found = norms_of_all(parts, torch.zeros(BATCH))
    exact = sum(
        (sum(_in_double(u)).square().sum(1) for u in parts), torch.zeros(BATCH, dtype=torch.float64)
    )
    assert bool((exact <= (found.values.double() + found.slack.double()) * (1 + 1e-9)).all())


def _scaled(use: Gradients, scale: float, cancels: float | None) -> Gradients:
    """The gradients times `scale`; of those with terms, the second half takes away the first, but
    for a part `cancels`."""
    if isinstance(use, OuterProducts):
        left, right = use.left, use.right * scale
        if cancels is not None:
            left = torch.cat((left, left), dim=1)
            right = torch.cat((right, -right * (1 - cancels)), dim=1)
        return OuterProducts(left, right, use.transposed)
    if isinstance(use, Rows):
        ids, values = use.ids, use.values * scale
        if cancels is not None:
            ids = torch.cat((ids, ids), dim=1)
            values = torch.cat((values, -values * (1 - cancels)), dim=1)
        return Rows(ids, values, use.shape)
    if isinstance(use, Bags):
        return Bags(use.ids, use.row_weights, use.right * scale, use.shape)
    return Dense(use.dense() * scale)


def _in_double(uses: list[Gradients]) -> list[Tensor]:
    """(B, n) each, of the same factors."""
    found = []
    for use in uses:
        held = [
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in vars(use).values()
        ]
        found.append(type(use)(*held).dense().reshape(BATCH, use.entries))
    return found


@every_cut
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_an_example_that_is_not_finite_leaves_the_others_alone(monkeypatch, near, poison):
    monkeypatch.setattr(together, "_NEAR", near)
    parts = models()["all of them"]
    before = norms_of_all(parts, torch.zeros(BATCH)).values
    for uses in parts:
        for use in uses:
            values = use.right if isinstance(use, (OuterProducts, Bags)) else use.values
            values[1] = poison
    after = norms_of_all(parts, torch.zeros(BATCH)).values
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not bool(torch.isfinite(after[1]))


def test_no_tensor_has_no_norm():
    found = added([], torch.ones(4))
    assert found.values.tolist() == found.slack.tolist() == [0.0] * 4


# ---- how many operations ---------------------------------------------------------------------


class _Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _counted(parts):
    pairs = [(use, torch.zeros(use.dense().shape[1:])) for uses in parts for use in uses]
    with _Counted() as counted:
        norms_of_all(parts, torch.zeros(BATCH))
        add_weighted_sums(pairs, torch.ones(BATCH))
    return counted.names


def test_more_small_tensors_take_no_more_operations():
    few, many = ([[Dense(torch.randn(BATCH, 4))] for _ in range(n)] for n in (2, 50))
    assert sum(_counted(many).values()) == sum(_counted(few).values())


def test_more_weights_take_one_operation_more_for_each_factor():
    """… and for each weighted sum, which has to be computed anyway."""
    few, many = ([[outer(2, 16, 12)] for _ in range(n)] for n in (2, 50))
    for names in (_counted(few), _counted(many)):
        names["bmm"] = names["mul"] = names["addmm_"] = 0
        assert sum(names.values()) < 25
    assert sum(_counted(many).values()) - sum(_counted(few).values()) == 48 * 4


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_factor_that_comes_again_is_multiplied_once(place):
    assert _counted(shared_factors())["bmm"] == 1 + 3
