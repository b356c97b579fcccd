"""ε by privacy loss distributions: how much its grid adds, and what it does at the edges."""

import math

import numpy as np
import pytest

from dpnlu.accounting.pld import grid_for, pld_epsilon


def random_question(seed):
    """A release of any kind that training could ask about, and a δ."""
    draw = np.random.default_rng(seed).uniform
    sigma, rate = math.exp(draw(math.log(0.3), math.log(50))), math.exp(draw(math.log(1e-5), 0))
    steps, delta = round(math.exp(draw(0, math.log(1e5)))), 10 ** draw(-12, -2)
    return [(sigma, rate, steps)], delta


@pytest.mark.parametrize("seed", range(30))
def test_a_finer_grid_hardly_lowers_epsilon(seed):
    releases, delta = random_question(seed)
    usual = pld_epsilon(releases, delta)
    finer = pld_epsilon(releases, delta, coarsening=0.3)
    assert finer * (1 - 1e-5) - 1e-9 <= usual <= finer * 1.0003 + 3e-5
    assert usual <= pld_epsilon(releases, delta, coarsening=5) * (1 + 1e-5) + 1e-9


def test_a_million_steps_at_a_small_delta():
    """Where untilted transforms, at the same grid, give 1.154, less than what it truly is."""
    found = pld_epsilon([(0.8, 1e-4, 1_000_000)], 1e-10)
    assert 1.1649 <= found <= 1.1652  # 1.16494 on finer grids and with other tilts


def test_levels_of_noise_in_any_order_and_number():
    levels = [(0.97**level, 0.04, 20) for level in range(12)]
    assert pld_epsilon(levels[::-1], 1e-5) == pytest.approx(pld_epsilon(levels, 1e-5), rel=1e-9)
    assert pld_epsilon(levels, 1e-5) > pld_epsilon([(1.0, 0.04, 240)], 1e-5)


def test_who_is_hardly_ever_drawn_loses_nothing():
    """Not with noise as little as this, where a single batch with the example gives it away."""
    drawn = -math.expm1(100 * math.log1p(-1e-6))
    assert pld_epsilon([(0.02, 1e-6, 100)], drawn * 1.001) == 0
    assert pld_epsilon([(0.02, 1e-6, 100)], drawn * 0.99) > 1
    assert pld_epsilon([(0.02, 1e-6, 100), (1.0, 1.0, 1)], drawn * 1.001) > 1


def test_hardly_any_loss_is_no_loss():
    assert pld_epsilon([(1e6, 1.0, 1)], 1e-5) == 0
    assert pld_epsilon([(5.0, 1e-7, 1)], 1e-5) == 0
    assert 0 < grid_for([(1e6, 1.0, 1)], 1e-5) < 1e-3


@pytest.mark.parametrize("sigma", [0.1, 0.05])
def test_delta_about_the_share_of_batches_with_the_example(sigma):
    """With little noise the example is seen when it is drawn, with probability 1e-3: below that δ
    only a great ε is enough, above it hardly any is needed."""
    assert pld_epsilon([(sigma, 1e-3, 1)], 0.9e-3) > 25
    assert pld_epsilon([(sigma, 1e-3, 1)], 1.1e-3) < 1e-2
