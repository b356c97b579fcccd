"""Every form of per-example gradients against the same gradients written out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dpnlu.gradients import forms as gradients
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense
from dpnlu.gradients.grams import Gram, GramCache, computed_entries, strips
from dpnlu.gradients.rows import (
    Bags,
    Rows,
)
from dpnlu.gradients.uses import combine, squared_norms

pytestmark = pytest.mark.usefixtures("double")


class CountingGrams(GramCache):
    """Says how often Gram matrices were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __call__(self, rows: Tensor) -> Gram:
        self.asked += 1
        return super().__call__(rows)


def outer(batch, positions, d, p, transposed=False):
    return OuterProducts(
        torch.randn(batch, positions, d), torch.randn(batch, positions, p), transposed
    )


def rows(batch, positions, d, vocabulary):
    ids = torch.randint(-1, vocabulary, (batch, positions))
    return Rows(ids, torch.randn(batch, positions, d), (vocabulary, d))


def bags(batch, positions, d, vocabulary):
    ids = torch.randint(-1, vocabulary, (batch, positions))
    return Bags(ids, torch.randn(batch, positions), torch.randn(batch, d), (vocabulary, d))


def outer_written_out(use: OuterProducts) -> Tensor:
    total = torch.einsum("bti,btj->bij", use.right, use.left)
    return total.mT if use.transposed else total


def rows_written_out(use: Rows) -> Tensor:
    table = torch.zeros(len(use.ids), *use.shape)
    for example, ids in enumerate(use.ids.tolist()):
        for position, row in enumerate(ids):
            if row >= 0:
                table[example, row] += use.values[example, position]
    return table


def written_out(use: gradients.Gradients) -> Tensor:
    """(B, *shape), by the definition of each form."""
    if isinstance(use, OuterProducts):
        return outer_written_out(use)
    if isinstance(use, Bags):
        values = use.row_weights[:, :, None] * use.right[:, None]
        return rows_written_out(Rows(use.ids, values, use.shape))
    return rows_written_out(use) if isinstance(use, Rows) else use.values


@dataclass(frozen=True)
class Form:
    """A form of gradients, and whether its norms should come from Gram matrices."""

    name: str
    make: Callable[[], gradients.Gradients]
    by_grams: bool

    def __str__(self) -> str:
        return self.name


def time_major(batch, positions, d, p):
    """Factors as a recurrent layer leaves them: (T, B, ·) in memory."""
    return OuterProducts(
        torch.randn(positions, batch, d).transpose(0, 1),
        torch.randn(positions, batch, p).transpose(0, 1),
    )


FORMS = [
    Form("outer, few positions", lambda: outer(3, 2, 16, 12), True),
    Form("outer, many positions", lambda: outer(3, 40, 4, 3), False),
    Form("outer, wide input", lambda: outer(3, 3, 40, 5), True),
    Form("outer, one position", lambda: outer(3, 1, 4, 5), False),
    Form("outer, positions in strips", lambda: outer(2, 130, 150, 250), True),
    Form("outer transposed, positions in strips", lambda: outer(2, 201, 260, 300, True), True),
    Form("outer, too many positions in strips", lambda: outer(2, 201, 100, 100), False),
    Form("outer, no position", lambda: outer(3, 0, 4, 5), True),
    Form("outer, no example", lambda: outer(0, 2, 16, 12), True),
    Form("outer, one example", lambda: outer(1, 5, 3, 2), False),
    Form("outer transposed, few positions", lambda: outer(3, 2, 16, 12, True), True),
    Form("outer transposed, many positions", lambda: outer(3, 40, 4, 3, True), False),
    Form("outer, time-major", lambda: time_major(3, 5, 4, 6), False),
    Form("outer, time-major, wide input", lambda: time_major(3, 2, 30, 6), True),
    Form("rows, pairwise", lambda: rows(3, 7, 4, 5), True),
    Form("rows, sorted", lambda: rows(3, 130, 4, 50), False),
    Form("rows, one position", lambda: rows(3, 1, 4, 5), True),
    Form("rows, no position", lambda: rows(3, 0, 4, 5), True),
    Form("rows, no example", lambda: rows(0, 7, 4, 5), True),
    Form("rows, no example, sorted", lambda: rows(0, 130, 4, 5), False),
    Form(
        "rows, all padding",
        lambda: Rows(torch.full((2, 3), -1), torch.randn(2, 3, 4), (5, 4)),
        True,
    ),
    Form(
        "rows, all padding, sorted",
        lambda: Rows(torch.full((2, 130), -1), torch.randn(2, 130, 4), (5, 4)),
        False,
    ),
    Form("bags", lambda: bags(3, 7, 4, 5), False),
    Form("bags, one position", lambda: bags(3, 1, 4, 5), False),
    Form("bags, no position", lambda: bags(3, 0, 4, 5), False),
    Form("bags, no example", lambda: bags(0, 7, 4, 5), False),
    Form("dense", lambda: Dense(torch.randn(3, 4, 5)), False),
    Form("dense, of a scalar", lambda: Dense(torch.randn(3)), False),
    Form("dense, no example", lambda: Dense(torch.randn(0, 4)), False),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
# Those in which one example can be spoilt, and another one remains.
SPOILABLE = [form for form in FORMS if not {"no", "one"} & set(form.name.split())]
SPOILABLE += [form for form in FORMS if form.name.endswith("one position")]
every_spoilable_form = pytest.mark.parametrize("form", SPOILABLE, ids=str)


@every_form
def test_dense_is_the_definition(form):
    use = form.make()
    torch.testing.assert_close(use.dense(), written_out(use))


@every_form
def test_squared_norms_are_those_of_the_gradients_written_out(form):
    use, grams = form.make(), CountingGrams()
    found = use.squared_norms(grams).values
    expected = written_out(use)
    expected = expected.reshape(len(found), expected.shape[1:].numel()).square().sum(1)
    torch.testing.assert_close(found, expected)
    assert bool(grams.asked) is form.by_grams


@every_form
def test_weighted_sums_are_those_of_the_gradients_written_out(form):
    """… added to what is there, by coefficients of any sign, zero included."""
    use = form.make()
    expected = written_out(use)
    coefficients = torch.linspace(-1, 1, len(expected))
    out = torch.randn(expected.shape[1:])
    expected = out + torch.einsum("b,b...->...", coefficients, expected)
    use.add_weighted_sum(coefficients, out)
    torch.testing.assert_close(out, expected)


@every_spoilable_form
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_finite_rows_leave_exactly_nothing_of_the_others(form, poison):
    """0 · ∞ is not 0: whatever is in an excluded example, it adds exactly nothing."""
    use = form.make()
    clean = written_out(use).clone()
    for values in vars(use).values():
        if isinstance(values, Tensor) and values.is_floating_point():
            values[1] = poison
    finite = torch.ones(len(clean), dtype=torch.bool)
    finite[1] = False
    kept = use.finite_rows(finite)
    coefficients = torch.where(finite, 0.5, 0.0)
    out = torch.zeros(clean.shape[1:])
    kept.add_weighted_sum(coefficients, out)
    expected = 0.5 * (clean.sum(0) - clean[1])
    torch.testing.assert_close(out, expected)
    assert not kept.dense()[1].any() and kept.squared_norms(GramCache()).values[1] == 0


@every_spoilable_form
def test_a_non_finite_example_does_not_touch_the_norms_of_others(form):
    use = form.make()
    before = use.squared_norms(GramCache()).values
    values = use.right if isinstance(use, (OuterProducts, Bags)) else use.values
    values[1] = math.inf
    after = use.squared_norms(GramCache()).values
    others = torch.arange(len(before)) != 1
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_go_into_buffers_of_other_precision(dtype):
    for use in (Dense(torch.randn(3, 5, 5)), outer(3, 2, 5, 5), rows(3, 2, 5, 5)):
        out = torch.zeros(5, 5, dtype=dtype)
        use.add_weighted_sum(torch.ones(3), out)
        expected = written_out(use).sum(0).to(dtype)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# ---- several uses of one tensor --------------------------------------------------------------


USES = {
    "one": lambda: [outer(3, 2, 6, 5)],
    "layer used twice": lambda: [outer(3, 2, 6, 5), outer(3, 4, 6, 5)],
    "both orientations": lambda: [outer(3, 2, 6, 5), outer(3, 4, 5, 6, True)],
    "table used twice": lambda: [rows(3, 4, 6, 5), rows(3, 2, 6, 5)],
    "table used twice, sorted": lambda: [rows(3, 100, 6, 5), rows(3, 60, 6, 5)],
    "dense twice": lambda: [Dense(torch.randn(3, 5, 6)), Dense(torch.randn(3, 5, 6))],
    "embedding tied to a head": lambda: [rows(3, 4, 6, 5), outer(3, 2, 6, 5)],
    "tied to a transposed head": lambda: [rows(3, 4, 6, 5), outer(3, 2, 5, 6, True)],
    "bag": lambda: [bags(3, 4, 6, 5)],
    "two bags": lambda: [bags(3, 4, 6, 5), bags(3, 2, 6, 5)],
    "bag tied to a head": lambda: [bags(3, 4, 6, 5), outer(3, 2, 6, 5)],
    "bag and table": lambda: [bags(3, 4, 6, 5), rows(3, 2, 6, 5)],
    "all forms": lambda: [
        outer(3, 2, 6, 5),
        rows(3, 4, 6, 5),
        Dense(torch.randn(3, 5, 6)),
        outer(3, 1, 5, 6, True),
        rows(3, 1, 6, 5),
    ],
}
every_tie = pytest.mark.parametrize("make", USES.values(), ids=USES)


@every_tie
def test_combining_uses_keeps_their_sum(make):
    """… in at most one part of each form."""
    uses = make()
    parts = combine(uses)
    kinds = [(type(part), getattr(part, "transposed", None)) for part in parts]
    assert len(set(kinds)) == len(kinds)
    expected = sum(written_out(use) for use in uses)
    torch.testing.assert_close(sum(written_out(part) for part in parts), expected)


@every_tie
def test_norms_are_taken_of_the_sum_of_the_uses(make):
    """Cross terms included: squared norms of two uses do not add up."""
    uses = make()
    total = sum(written_out(use) for use in uses)
    found = squared_norms(combine(uses), GramCache()).values
    torch.testing.assert_close(found, total.flatten(1).square().sum(1))


def test_uses_that_cancel_have_norm_zero():
    """… not a negative one, whose root would be no number."""
    use = outer(4, 2, 6, 5)
    table = Rows(torch.arange(5).expand(4, 5), -outer_written_out(use), (5, 6))
    found = squared_norms(combine([use, table]), GramCache()).values
    assert bool((found >= 0).all()) and bool((found < 1e-12).all())


def test_the_parts_of_nothing():
    assert combine([]) == []


# ---- Gram matrices ---------------------------------------------------------------------------


def test_gram_matrices_are_kept_by_identity_not_by_value():
    grams = GramCache()
    one, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    (kept,) = grams(one)
    torch.testing.assert_close(kept, torch.einsum("bsd,btd->bst", one, one))
    assert grams(one)[0] is kept
    torch.testing.assert_close(grams(other)[0], torch.einsum("bsd,btd->bst", other, other))
    assert grams(one)[0] is kept
    for _ in range(10):
        grams(torch.randn(2, 3, 4))
    torch.testing.assert_close(grams(one)[0], kept)


@pytest.mark.parametrize("positions", [0, 1, 128, 129, 130, 133, 256])
def test_strips_hold_a_matrix_and_no_large_one_whole(positions):
    values = torch.randn(2, positions, 3)
    gram = torch.einsum("bsd,btd->bst", values, values)
    rebuilt = torch.zeros_like(gram)
    found = GramCache()(values)
    for (start, stop), strip in zip(strips(positions), found, strict=True):
        rebuilt[:, start:stop, start:] = strip
    torch.testing.assert_close(rebuilt.triu(), gram.triu())
    assert sum(strip[0].numel() for strip in found) == computed_entries(positions)
    assert computed_entries(positions) <= (0.65 if positions > 128 else 1) * positions**2


def test_norms_of_half_precision_factors_are_those_of_full_precision_sums():
    """A norm that overflows float16 is still a norm."""
    use = outer(2, 2, 6, 5)
    huge = OuterProducts(use.left.float() * 1e3, use.right.float() * 1e3)
    expected = written_out(use).flatten(1).square().sum(1) * 1e12
    found = huge.squared_norms(GramCache()).values.double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
