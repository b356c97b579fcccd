"""Where the examples lie: every layout against a loop over entries."""

import pytest
import torch
from torch import Tensor

from dpnlu.gradients.layout import Layout, added_up, by_example, candidates

BATCH, ENTRIES = 3, 2
LAYOUTS = {
    "one after the other": Layout(BATCH),
    "interleaved": Layout(BATCH, interleaved=True),
    "along dimension 1": Layout(BATCH, 1),
    "along dimension 1, interleaved": Layout(BATCH, 1, interleaved=True),
    "along the last dimension": Layout(BATCH, 2),
    "as their values had it": Layout(BATCH, owners=torch.tensor([2, 0, -1, 2, 1, 0])),
    "an example without entries": Layout(BATCH, owners=torch.tensor([2, 0, -1, 2, -1, 0])),
    "uneven": Layout(BATCH, 1, owners=torch.tensor([1, 1, 1, 1, 0, 1])),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def _values(layout: Layout) -> Tensor:
    shape = [4, 5, 4]
    shape[layout.dim] = BATCH * ENTRIES
    return torch.randn(shape, dtype=torch.float64)


def _entries(layout: Layout, example: int) -> list[int]:
    """Which entries along the dimension are the example's, by definition."""
    count = BATCH * ENTRIES
    if layout.owners is not None:
        return [entry for entry in range(count) if layout.owners[entry] == example]
    if layout.interleaved:
        return [entry for entry in range(count) if entry % BATCH == example]
    return [entry for entry in range(count) if entry // ENTRIES == example]


@every_layout
def test_the_entries_of_each_example_come_apart(layout):
    values = _values(layout)
    apart = layout.apart(values)
    assert len(apart) == BATCH
    for example in range(BATCH):
        own = values.movedim(layout.dim, 0)[_entries(layout, example)]
        assert torch.equal(apart[example, : len(own)], own)
        assert not apart[example, len(own) :].any()


@every_layout
def test_missing_entries_are_filled(layout):
    ids = torch.arange(BATCH * ENTRIES)
    apart = layout.apart(ids, 0, fill=-1)
    for example in range(BATCH):
        assert [entry for entry in apart[example].tolist() if entry >= 0] == _entries(
            layout, example
        )


@every_layout
def test_owners_say_the_same(layout):
    owner = layout.owner(BATCH * ENTRIES)
    for example in range(BATCH):
        assert (owner == example).nonzero()[:, 0].tolist() == _entries(layout, example)


@every_layout
def test_rows_of_each_example(layout):
    """(B, T, d), whose order does not matter, as long as it is the same for both factors."""
    values = _values(layout)
    if layout.dim == 2:
        return
    rows = by_example(values, layout)
    for example in range(BATCH):
        own = values.movedim(layout.dim, 0)[_entries(layout, example)].reshape(-1, 4)
        filled = torch.zeros(rows.shape[1], 4, dtype=own.dtype)
        filled[: len(own)] = own
        assert torch.equal(rows[example], filled)


@every_layout
def test_what_is_added_up_for_each_example(layout):
    values = _values(layout)
    if layout.dim == 2:
        return
    found = added_up(values, layout, (4,))
    for example in range(BATCH):
        own = values.movedim(layout.dim, 0)[_entries(layout, example)].reshape(-1, 4)
        torch.testing.assert_close(found[example], own.sum(0))


def test_half_precision_is_added_up_in_float32():
    values = torch.full((2, 4096, 1), 1 / 3).bfloat16()
    found = added_up(values, Layout(2), (1,))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2, 1), 4096 * float(values[0, 0])))


def test_no_examples():
    assert Layout(0).apart(torch.empty(0, 3)).shape == (0, 0, 3)


def test_candidates_are_dimensions_that_can_be_shared_out():
    found = list(candidates(torch.Size([6, 3, 4]), range(3), 3))
    expected = [Layout(3, 0), Layout(3, 0, interleaved=True), Layout(3, 1)]
    assert found == expected
    assert not list(candidates(torch.Size([5, 4]), range(2), 3))
    assert not list(candidates(torch.Size([]), (0,), 3))
    assert list(candidates(torch.Size([4]), (0,), 1)) == [Layout(1, 0)]
