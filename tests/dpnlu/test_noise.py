"""Noise in both directions: a test accepts the right scale, and rejects 2/3 and 3/2 of it."""

import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from dpnlu.mechanism import noise
from dpnlu.mechanism.noise import (
    entropy_generator,
    entropy_generators,
    fill_gaussian,
    system_gaussian,
)

COUNT = 20_000
SOURCES = {
    "seeded": lambda: [torch.Generator().manual_seed(11)],
    "entropy": entropy_generators,
    "system": list,
}
# A run with fresh entropy must not fail by chance.
ACCEPTED, REJECTED = 1e-6, 1e-12


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_gaussian_of_the_given_standard_deviation(source, std, dtype):
    values = torch.full((COUNT // 10, 10), math.nan, dtype=dtype)
    fill_gaussian([values], std=std, generators=source())
    draws = values.flatten().numpy()
    assert stats.kstest(draws, "norm", args=(0, std)).pvalue > ACCEPTED
    for wrong in (std * 2 / 3, std * 3 / 2):
        assert stats.kstest(draws, "norm", args=(0, wrong)).pvalue < REJECTED


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_entry_is_drawn_independently(source):
    """Across tensors, across calls, between neighbours and between the halves of one tensor."""
    generators = source()
    tensors = [torch.empty(COUNT), torch.empty(100, COUNT // 100)]
    fill_gaussian(tensors, std=1.0, generators=generators)
    again = torch.empty(COUNT)
    fill_gaussian([again], std=1.0, generators=generators)
    one, other = tensors[0], tensors[1].flatten()
    half = COUNT // 2
    pairs = [
        (one, other),
        (one, again),
        (one[1:], one[:-1]),
        (one[:half], one[half:]),
        (one[:half].abs(), one[half:].abs()),
    ]
    for a, b in pairs:
        assert stats.pearsonr(a.numpy(), b.numpy()).pvalue > ACCEPTED


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_system_noise_comes_in_any_number(count):
    draws = system_gaussian(count)
    assert draws.shape == (count,) and draws.dtype == torch.float64
    assert bool(torch.isfinite(draws).all())


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_system_noise_is_finite_for_any_entropy(monkeypatch, byte):
    monkeypatch.setattr(os, "urandom", lambda count: byte * count)
    assert bool(torch.isfinite(system_gaussian(4)).all())


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_no_noise_is_exactly_zero(source):
    values = torch.full((3, 2), math.nan)
    fill_gaussian([values], std=0.0, generators=source())
    assert torch.equal(values, torch.zeros(3, 2))


@pytest.mark.parametrize("sizes", [(3, 0, 10), (COUNT,), (1, 1, 1), (7,) * 9], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_generators_that_draw_side_by_side_leave_nothing_out(monkeypatch, sizes, count):
    monkeypatch.setattr(noise, "_WORTH_A_THREAD", 1)
    nan = torch.tensor(math.nan, dtype=torch.float64)
    tensors = [nan.repeat(size) for size in sizes] + [nan]
    fill_gaussian(tensors, std=1.0, generators=[entropy_generator() for _ in range(count)])
    draws = torch.cat([tensor.flatten() for tensor in tensors])
    assert bool(torch.isfinite(draws).all()) and len(draws.unique()) == len(draws)


@pytest.mark.parametrize("side_by_side", [1, 10**9])
def test_generators_that_draw_side_by_side_are_independent(monkeypatch, side_by_side):
    monkeypatch.setattr(noise, "_WORTH_A_THREAD", side_by_side)
    values = torch.empty(2, COUNT)
    fill_gaussian([values], std=2.0, generators=[entropy_generator() for _ in range(2)])
    one, other = values.numpy()
    assert stats.pearsonr(one, other).pvalue > ACCEPTED
    assert stats.kstest(values.flatten().numpy(), "norm", args=(0, 2.0)).pvalue > ACCEPTED


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_share_that_cannot_be_drawn_is_not_left_without_noise(monkeypatch, place):
    monkeypatch.setattr(noise, "_WORTH_A_THREAD", 1)
    generators = [entropy_generator() for _ in range(3)]
    generators[place] = "no generator"
    with pytest.raises(TypeError, match="generator"):
        fill_gaussian([torch.empty(10)], std=1.0, generators=generators)


def test_a_seeded_generator_repeats_itself_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    drawn = []
    for seed in (5, 5, 6):
        values = torch.empty(50)
        fill_gaussian([values], std=1.0, generators=[torch.Generator().manual_seed(seed)])
        drawn.append(values)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    entropy_generator()
    assert torch.equal(torch.get_rng_state(), before)


# ---- the whole state -------------------------------------------------------------------------


def _fixed_entropy(monkeypatch, seed, words):
    """The system's entropy, with the 8 bytes of the seed and the words of the state chosen."""
    rng = np.random.default_rng(words)
    monkeypatch.setattr(os, "urandom", lambda n: seed if n == 8 else rng.bytes(n))


def test_no_two_generators_are_alike():
    assert not torch.equal(torch.rand(9, generator=entropy_generator()), torch.rand(9))
    draws = [torch.rand(9, generator=entropy_generator()) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_the_state_is_more_than_its_seed(monkeypatch):
    """Who finds the seed, of which 32 bits count, has found nothing."""
    draws = []
    for words in (1, 2, 1):
        _fixed_entropy(monkeypatch, b"12345678", words)
        draws.append(torch.rand(2000, generator=entropy_generator()))
    assert bool((draws[0] != draws[1]).float().mean() > 0.99), "every draw depends on the words"
    assert torch.equal(draws[0], draws[2])
    seeded = torch.Generator().manual_seed(int.from_bytes(b"12345678", "little"))
    assert not torch.equal(torch.rand(2000, generator=seeded), draws[0])


def test_all_words_of_the_state_are_replaced_and_nothing_else(monkeypatch):
    """The layout of torch's generator state is as assumed: 24 bytes, 624 words of 8, the rest."""
    _fixed_entropy(monkeypatch, b"12345678", 1)
    seed = int.from_bytes(b"12345678", "little")
    ours = entropy_generator().get_state().numpy()
    seeded = torch.Generator().manual_seed(seed).get_state().numpy()
    assert np.array_equal(ours[:24], seeded[:24]) and np.array_equal(ours[5016:], seeded[5016:])
    words = np.random.default_rng(1).bytes(4 * 624)
    expected = np.frombuffer(words, dtype=np.uint32)
    assert np.array_equal(ours[24:5016].view(np.uint64), expected)


def test_the_generator_continues_as_a_twister_of_these_words(monkeypatch):
    """numpy's Mersenne twister, given the same words, draws the same numbers."""
    _fixed_entropy(monkeypatch, b"12345678", 3)
    words = np.frombuffer(np.random.default_rng(3).bytes(4 * 624), dtype=np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    ours = torch.randint(0, 2**24, (1500,), generator=entropy_generator())
    theirs = torch.from_numpy(twister.random_raw(1500).astype(np.int64)) % 2**24
    assert torch.equal(ours, theirs)
