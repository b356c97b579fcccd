"""When batches are checked: at first, at powers of four, by a coin, and after zeros have gone."""

import random

import pytest
import torch
from torch import nn

from dpnlu.engines.checks import Checks
from dpnlu.gradients.layout import Layout


@pytest.fixture
def checks() -> Checks:
    """Whose coins never say that a batch is to be checked."""
    made = Checks(nn.Linear(2, 2))
    made._coins = Never()
    return made


class Never(random.Random):
    def random(self) -> float:
        return 1.0


def _meet(checks: Checks, signature: object = "a", **options: bool) -> tuple[bool, bool]:
    """A batch that shows whatever is asked of it."""
    asked = checks.observe(signature, **options)
    if asked[0]:
        checks.show_rows(signature, [Layout(4)])
    if asked[1]:
        checks.show_parameters(signature)
    return asked


def test_the_first_fourth_and_sixteenth_batch_are_checked(checks):
    asked = [_meet(checks) for _ in range(20)]
    assert [number for number, found in enumerate(asked, 1) if any(found)] == [1, 4, 16]
    assert all(found in ((True, True), (False, False)) for found in asked)


def test_every_signature_counts_for_itself(checks):
    for _ in range(5):
        _meet(checks, "a")
    assert _meet(checks, "b") == (True, True)
    assert _meet(checks, "a") == (False, False)


def test_what_was_not_shown_is_asked_again(checks):
    """A batch whose gradients are not finite shows nothing."""
    asked = [checks.observe("a") for _ in range(20)]
    assert asked == [(True, True)] * 20
    checks.show_parameters("a")
    assert checks.observe("a") == (True, False)
    assert checks.is_shown("a")


def test_rows_that_are_chosen_by_their_values_are_checked_every_time(checks):
    asked = [_meet(checks, chooses_rows=True) for _ in range(20)]
    assert all(rows for rows, _ in asked)
    assert sum(parameters for _, parameters in asked) == 3


def test_whose_rows_are_depends_on_the_batch_is_checked_every_time(checks):
    checks.observe("a")
    checks.show_rows("a", [Layout(4), Layout(4, owners=torch.tensor([0, 1, 3, 2]))])
    assert checks.layouts("a", 4) is None
    for _ in range(5):
        assert checks.observe("a")[0]


def test_a_doubt_is_gone_once_a_batch_of_the_same_steps_had_none(checks):
    asked = [_meet(checks, is_doubtful=True) for _ in range(20)]
    assert all(rows for rows, _ in asked)
    _meet(checks)
    assert _meet(checks, is_doubtful=True) == (False, False)


def test_a_coin_says_of_one_batch_in_five_hundred_that_it_is_checked(checks):
    """… and knows nothing of the batch."""
    checks._coins = random.Random(0)
    asked = [_meet(checks) for _ in range(100_000)]
    extra = sum(rows for rows, _ in asked) - 9  # powers of four
    assert 150 < extra < 250  # 200 are expected, with a standard deviation of 14
    assert all(found in ((True, True), (False, False)) for found in asked)


def test_coins_are_drawn_from_the_operating_system():
    made = Checks(nn.Linear(2, 2))
    before = random.getstate(), torch.get_rng_state()
    for _ in range(10):
        _meet(made)
    assert isinstance(made._coins, random.SystemRandom)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_layouts_hold_for_batches_of_other_sizes(checks):
    checks.observe("a")
    checks.show_rows("a", [Layout(4), Layout(4, 1), Layout(4, interleaved=True)])
    assert checks.layouts("a", 7) == [Layout(7), Layout(7, 1), Layout(7, interleaved=True)]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("table", torch.zeros(100))


def _known(model: nn.Module) -> Checks:
    made = Checks(model)
    made._coins = Never()
    for _ in range(4):
        _meet(made)
    assert _meet(made) == (False, False)
    return made


@pytest.mark.parametrize("name", ["gate", "share"])
def test_everything_is_checked_anew_once_something_is_no_longer_zero(name):
    model = Gated()
    made = _known(model)
    made.weights_changed()
    assert _meet(made) == (False, False)
    with torch.no_grad():
        getattr(model, name).view(-1)[0] = 1e-30
    made.weights_changed()
    assert _meet(made) == (True, True)
    for _ in range(3):
        _meet(made)
    made.weights_changed()  # it is known by now
    assert _meet(made) == (False, False)


@pytest.mark.parametrize("name", ["layer", "frozen", "table"])
def test_what_was_not_zero_or_is_not_watched_changes_nothing(name):
    model = Gated()
    made = _known(model)
    with torch.no_grad():
        value = model.layer.weight if name == "layer" else getattr(model, name)
        value.view(-1)[0] = 1.0
    made.weights_changed()
    assert _meet(made) == (False, False)
