"""Poisson sampling as it is accounted, tested in both directions."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpnlu.mechanism.sampling import LogicalBatch, logical_batches, physical_batches

DRAWS = 4000
ACCEPTED, REJECTED = 1e-3, 1e-9


@pytest.fixture
def draw(make_plan):
    """Logical batches of a plan with these fields, the coins fixed."""

    def logical(count=DRAWS, **plan):
        batches = logical_batches(make_plan(**plan), rng=np.random.default_rng(7))
        return list(islice(batches, count))

    return logical


def _membership(batches, num_examples):
    """(batches, examples) whether the example is in the batch."""
    rows = np.zeros((len(batches), num_examples), dtype=bool)
    for row, batch in zip(rows, batches, strict=True):
        ids = np.concatenate(batch.units)
        assert len(np.unique(ids)) == len(ids), "no example twice"
        row[ids] = True
    return rows


def _binomial_p_value(counts, draws, rate):
    """Chi-square test that all counts are binomial with this rate."""
    scores = (counts - draws * rate) / np.sqrt(draws * rate * (1 - rate))
    return stats.chi2.sf(np.sum(scores**2), len(counts))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8])
def test_each_example_enters_with_the_sample_rate(draw, rate):
    """… and with neither 2/3 nor 3/2 of it."""
    counts = _membership(draw(num_examples=20, sample_rate=rate), 20).sum(0)
    assert _binomial_p_value(counts, DRAWS, rate) > ACCEPTED
    for wrong in (rate * 2 / 3, min(rate * 3 / 2, 0.99)):
        assert _binomial_p_value(counts, DRAWS, wrong) < REJECTED


def test_examples_enter_independently_of_each_other(draw):
    """Batch sizes are binomial; were a batch of fixed size drawn, they would not vary."""
    sizes = _membership(draw(num_examples=20, sample_rate=0.3), 20).sum(1)
    expected = DRAWS * stats.binom.pmf(np.arange(21), 20, 0.3)
    frequent = expected > 5
    observed = np.bincount(sizes, minlength=21)
    assert stats.chisquare(observed[frequent], expected[frequent], sum_check=False)[1] > ACCEPTED


def test_batches_are_independent_of_earlier_ones(draw):
    """No example waits for its turn, as it would in a shuffled epoch, and none is favoured."""
    rows = _membership(draw(num_examples=20, sample_rate=0.3), 20).astype(float) - 0.3
    lagged = (rows[1:] * rows[:-1]).sum() / (0.3 * 0.7 * np.sqrt(rows[1:].size))
    others = (rows[:, 1:] * rows[:, :-1]).sum() / (0.3 * 0.7 * np.sqrt(rows[:, 1:].size))
    assert abs(lagged) < 4 and abs(others) < 4


def test_at_rate_one_every_example_enters_and_batches_may_be_empty_at_a_low_rate(draw):
    assert _membership(draw(50, sample_rate=1.0), 8).all()
    rare = draw(sample_rate=0.02)
    share = np.mean([not len(batch.units[0]) for batch in rare])
    assert stats.binomtest(round(share * DRAWS), DRAWS, 0.98**8).pvalue > ACCEPTED


def test_the_coins_are_the_generators(make_plan):
    plan = make_plan(num_examples=1000)
    rng = np.random.default_rng
    one, same, other = (next(logical_batches(plan, rng=rng(s))).units[0] for s in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


# ---- truncation ------------------------------------------------------------------------------


def test_truncation_keeps_a_uniformly_random_subset(draw):
    plan = {"sampling": "truncated_poisson", "max_batch_size": 4}
    rows = _membership(draw(num_examples=20, sample_rate=0.3, **plan), 20)
    sizes = rows.sum(1)
    assert sizes.max() == 4 and sizes.min() < 4
    full = rows[sizes == 4]
    assert _binomial_p_value(full.sum(0), len(full), 4 / 20) > ACCEPTED


def test_a_batch_within_the_bound_is_left_alone(draw):
    plan = {"sampling": "truncated_poisson", "max_batch_size": 20}
    assert all(
        np.array_equal(one.units[0], other.units[0])
        for one, other in zip(
            draw(50, num_examples=20, **plan), draw(50, num_examples=20), strict=True
        )
    )


# ---- micro-batches ---------------------------------------------------------------------------


def _groups(batches, num_examples):
    """(batches, examples) the group of each example, -1 where it is not in the batch."""
    found = np.full((len(batches), num_examples), -1)
    for row, batch in zip(found, batches, strict=True):
        for number, unit in enumerate(batch.units):
            row[unit] = number
    return found


@pytest.fixture
def groups(draw):
    plan = {"clipping_unit": "microbatch", "microbatches": 3}
    batches = draw(num_examples=12, sample_rate=0.5, **plan)
    assert all(len(batch.units) == 3 for batch in batches)
    return _groups(batches, 12)


def test_each_example_falls_into_each_group_alike(groups):
    for example in range(12):
        counts = np.bincount(groups[:, example][groups[:, example] >= 0], minlength=3)
        assert stats.chisquare(counts).pvalue > ACCEPTED / 12


def test_groups_are_assigned_independently(groups):
    """Two examples share a group one time in three: cut by position, neighbours would always, or
    never."""
    for distance in (1, 2, 3):
        both = (groups[:, distance:] >= 0) & (groups[:, :-distance] >= 0)
        shared = (groups[:, distance:] == groups[:, :-distance])[both]
        assert stats.binomtest(int(shared.sum()), len(shared), 1 / 3).pvalue > ACCEPTED


def test_one_more_example_does_not_move_the_others(groups):
    """No chunk shift: the other examples' groups do not depend on whether the first is there."""
    first = groups[:, 0] >= 0
    for example in range(1, 12):
        table = [
            np.bincount(groups[present, example][groups[present, example] >= 0], minlength=3)
            for present in (first, ~first)
        ]
        assert stats.chi2_contingency(table).pvalue > ACCEPTED / 11


# ---- physical batches ------------------------------------------------------------------------

UNITS = st.lists(st.integers(0, 7), min_size=1, max_size=4)


@given(sizes=UNITS, size=st.integers(1, 9))
def test_physical_batches_partition_the_logical_batch(sizes, size):
    """Every id once, in order, in pieces of at most `size` that never straddle two groups; marks
    say where a group and where the batch ends."""
    ends = np.cumsum([0, *sizes])
    units = tuple(np.arange(a, b) for a, b in pairwise(ends))
    pieces = physical_batches(LogicalBatch(units), size=size)
    rebuilt, current = [], []
    for piece in pieces:
        assert 1 <= len(piece.ids) <= size
        current.extend(piece.ids)
        if piece.closes_unit:
            rebuilt.append(current)
            current = []
    assert not current
    assert rebuilt == [list(unit) for unit in units if len(unit)]
    assert [piece.closes_step for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(
        pieces
    )
    assert len(pieces) == sum(-(-length // size) for length in sizes)


@given(length=st.integers(1, 40), size=st.integers(1, 9))
def test_pieces_of_a_group_are_of_like_size(length, size):
    pieces = physical_batches(LogicalBatch((np.arange(length),)), size=size)
    sizes = [len(piece.ids) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1


@given(sizes=UNITS, size=st.integers(1, 9))
def test_pieces_of_a_fixed_size_hold_the_same_and_fillers_of_their_own(sizes, size):
    ends = np.cumsum([0, *sizes])
    batch = LogicalBatch(tuple(np.arange(a, b) for a, b in pairwise(ends)))
    filled = physical_batches(batch, size=size, fixed_size=True)
    kept = [piece.ids[: size - piece.fillers] for piece in filled]
    assert np.concatenate([[], *kept]).tolist() == list(range(ends[-1]))
    for piece, own in zip(filled, kept, strict=True):
        assert len(piece.ids) == size and set(piece.ids) == set(own)
        assert piece.fillers == 0 or piece.closes_unit
    marks = [(piece.closes_unit, piece.closes_step) for piece in physical_batches(batch, size=size)]
    assert [(piece.closes_unit, piece.closes_step) for piece in filled] == marks


def test_an_empty_logical_batch_has_no_pieces():
    empty = np.arange(0)
    assert physical_batches(LogicalBatch((empty,)), size=4) == []
    assert physical_batches(LogicalBatch((empty,)), size=4, fixed_size=True) == []
    assert physical_batches(LogicalBatch((empty, empty)), size=4) == []
