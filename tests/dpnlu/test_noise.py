"""Noise in both directions: a test accepts the right scale, and rejects 2/3 and 3/2 of it."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from dpnlu.mechanism import noise
from dpnlu.mechanism.noise import (
    add_system_gaussian,
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


# ---- numbers that give nothing away ----------------------------------------------------------


def _grid(std):
    """The largest power of two of which std has 2^36 at least."""
    return Fraction(2) ** (math.floor(math.log2(std)) - 36)


@pytest.mark.parametrize("std", [0.013, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_becomes_a_point_of_the_grid_rounded_once(monkeypatch, std, dtype):
    """By exact arithmetic: the entry's own point, and half of the sum of four draws."""
    drawn = []
    monkeypatch.setattr(
        noise, "system_gaussian", lambda n: drawn.append(system_gaussian(n)) or drawn[-1].clone()
    )
    entries = 5 * std * torch.randn(50, dtype=dtype)
    found = entries.clone()
    add_system_gaussian([found], std=std)
    assert len(drawn) == 4
    grid = _grid(std)
    assert 36 <= math.log2(Fraction(std) / grid) < 37
    expected = []
    for place, entry in enumerate(entries.tolist()):
        whole = sum(float(part[place]) for part in drawn) * std  # rounded as float64 is
        points = round(Fraction(entry) / grid) + round(Fraction(whole) / 2 / grid)
        expected.append(float(points * grid))
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_meet_at_a_point_cannot_be_told_apart(monkeypatch, dtype):
    """Other sums with other draws: only the point where both together lie counts."""
    found = []
    for moved in (0, 1, 12345, 2**36):
        draws = torch.arange(-50, 50, dtype=torch.float64) * 1e9 * 2.0**-36
        parts = [2 * (draws - moved * 2.0**-36), *[torch.zeros(100, dtype=torch.float64)] * 3]
        monkeypatch.setattr(noise, "system_gaussian", lambda n, parts=parts: parts.pop(0).clone())
        sums = torch.full((100,), moved * 2.0**-36, dtype=torch.float64).to(dtype)
        add_system_gaussian([sums], std=1.0)
        found.append(sums)
    assert all(torch.equal(found[0], one) for one in found[1:])


def _is_coarse(values):
    """Whether numbers near 0 are whole multiples of 2^-53, as what is left of 1 + n is."""
    near = values[values.abs() < 2.0**-6]
    assert len(near) > 20
    places = near * 2.0**53
    return float((places == places.round()).double().mean())


def test_how_finely_numbers_lie_tells_plain_noise_and_not_this():
    """Sums of 0 and 1, which differ by the sensitivity (Mironov 2012; Haney et al. 2022)."""
    coarse = {}
    for whole in (0.0, 1.0):
        plain = torch.full((COUNT,), whole, dtype=torch.float64)
        plain += torch.randn(COUNT, dtype=torch.float64)
        ours = torch.full((COUNT,), whole, dtype=torch.float64)
        add_system_gaussian([ours], std=1.0)
        coarse[whole] = _is_coarse(plain), _is_coarse(ours)
    assert coarse[1.0][0] == 1.0 and coarse[0.0][0] < 0.5, "the attack finds what it looks for"
    assert coarse[0.0][1] == coarse[1.0][1] == 1.0


def test_the_last_digits_of_a_rounded_sum_tell_plain_noise_and_not_this():
    """The same in float32, which is what models have: numbers near 0 that are multiples of 2^-24,
    as 1 + n is where n was drawn in float32."""
    for whole, plainly in ((0.0, False), (1.0, True)):
        plain = torch.full((COUNT,), whole) + torch.randn(COUNT)
        ours = torch.full((COUNT,), whole)
        add_system_gaussian([ours], std=1.0)
        shares = []
        for values in (plain, ours):
            near = values[values.abs() < 2.0**-6] * 2.0**24
            shares.append(float((near == near.round()).double().mean()))
        assert (shares[0] > 0.99) == plainly and shares[1] < 0.1


@pytest.mark.parametrize("near", [3, 64])
def test_every_entry_has_four_draws_that_share_nothing(monkeypatch, near):
    """Of each piece; what two entries share, a pair of uniform numbers, no two of its draws do."""
    monkeypatch.setattr(noise, "_NEAR", near)
    monkeypatch.setattr(noise, "_WORTH_A_THREAD", 1)
    bytes_drawn = []
    really = os.urandom
    monkeypatch.setattr(os, "urandom", lambda n: bytes_drawn.append(really(n)) or bytes_drawn[-1])
    tensors = [torch.zeros(size, dtype=torch.float64) for size in (0, 1, 2, 7, 200)]
    add_system_gaussian(tensors, std=1.0)
    found = torch.cat(tensors)
    assert bool((found != 0).all()) and len(found.unique()) == len(found) == 210
    pieces = [one for one in bytes_drawn if one]
    assert len(pieces) == len(set(pieces)) and len(pieces) % 4 == 0
    assert sum(map(len, bytes_drawn)) >= 4 * 8 * 210


def test_the_four_draws_are_independent(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        noise, "system_gaussian", lambda n: drawn.append(system_gaussian(n)) or drawn[-1].clone()
    )
    found = torch.zeros(COUNT, dtype=torch.float64)
    add_system_gaussian([found], std=2.0)
    torch.testing.assert_close(found, sum(drawn), rtol=0, atol=2.0**-35)
    for place, one in enumerate(drawn):
        assert stats.kstest(one.numpy(), "norm").pvalue > ACCEPTED
        for other in drawn[:place]:
            assert stats.pearsonr(one.numpy(), other.numpy()).pvalue > ACCEPTED
            assert stats.pearsonr(one.abs().numpy(), other.abs().numpy()).pvalue > ACCEPTED


def test_the_moments_of_what_is_added_are_those_of_a_gaussian():
    """Up to the fourth; three draws of four, or five, have other ones."""
    sums = torch.linspace(-3, 3, 10 * COUNT, dtype=torch.float64)
    found = sums.clone()
    add_system_gaussian([found], std=0.5)
    added = ((found - sums) / 0.5).numpy()
    deviation = 6 / math.sqrt(len(added))
    assert abs(added.mean()) < deviation
    assert abs(added.var() - 1) < math.sqrt(2) * deviation
    assert abs((added**3).mean()) < math.sqrt(15) * deviation
    assert abs((added**4).mean() - 3) < math.sqrt(96) * deviation
    assert abs(stats.pearsonr(added, sums.numpy()).statistic) < deviation


@pytest.mark.parametrize("place", [0, 1])
def test_a_draw_that_fails_fails_the_whole(monkeypatch, place):
    monkeypatch.setattr(noise, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(noise, "_THREADS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    calls = []

    def fails(count):
        calls.append(count)
        if count == (5, 4)[place]:
            raise OSError("no entropy")
        return system_gaussian(count)

    monkeypatch.setattr(noise, "system_gaussian", fails)
    with pytest.raises(OSError, match="no entropy"):
        add_system_gaussian([torch.zeros(9)], std=1.0)


@pytest.mark.parametrize("std", [1e-250, 1e30])
def test_noise_of_any_size_leaves_numbers(std):
    sums = torch.tensor([0.0, 1.0, -3e38, 1e-45, 2.0**20 * min(std, 1e10)])
    add_system_gaussian([sums], std=std)
    assert bool(torch.isfinite(sums).all())
    if std < 1:
        assert sums[1:3].tolist() == [1.0, float(torch.tensor(-3e38))]


def test_noise_that_is_none_is_refused():
    with pytest.raises(ValueError, match="standard deviation 0 or >= 1e-250, got 1e-300"):
        add_system_gaussian([torch.ones(2)], std=1e-300)


def test_noise_of_zero_leaves_sums_as_they_are():
    sums = torch.randn(20)
    found = sums.clone()
    add_system_gaussian([found], std=0.0)
    assert torch.equal(found, sums)


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
