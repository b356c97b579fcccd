"""Gaussian noise, and nothing else: from a generator, or from the operating system's entropy.

On a CPU, torch seeds its generator from 32 bits, few enough to be searched by whoever holds
the released model. `entropy_generator` fills the generator's whole state instead. But what it
draws, in float32, are floating-point numbers like others: which of them a sum can become tells
something of the sum (Mironov 2012, Jin et al. 2022). `add_system_gaussian` has sums become points
of a grid, each of which every other sum may become, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import Thread

import numpy as np
import torch
from torch import Tensor

# Drawing is bound by memory from a few threads on, and not worth a thread for few entries.
_THREADS, _WORTH_A_THREAD = 4, 10**6
# Entries that stay near the processor: a draw writes uniform numbers before it makes them normal.
_NEAR = 2**18
# Draws behind one entry (Holohan and Braghin 2021, 2n for n = 2), and log2 of how much finer than
# the noise the grid is.
_PARTS, _FINER = 4, 36
_SMALLEST_STD = 1e-250

# Where the state of torch's CPU generator keeps the 624 words of its Mersenne twister, in bytes.
# `torch.Generator.get_state` returns: seed (8), left (4), seeded (4), next (8), words (8 each), ….
_TWISTER_WORDS = 624
_TWISTER_OFFSET = 24


def fill_gaussian(
    tensors: Iterable[Tensor], *, std: float, generators: Sequence[torch.Generator]
) -> None:
    """Overwrite every entry with an independent draw from N(0, std²).

    Args:
        tensors: contiguous floating-point tensors, changed in place.
        std: standard deviation, >= 0; 0 fills with zeros.
        generators: where the draws come from, on the tensors' device; several of them draw side by
            side. None at all: `add_system_gaussian`, to zeros.
    """
    tensors = list(tensors)
    if std == 0 or not generators:
        for tensor in tensors:
            tensor.zero_()
    if not generators:
        add_system_gaussian(tensors, std=std)
    elif std:
        works = [partial(_fill, std=std, generator=generator) for generator in generators]
        _side_by_side(tensors, works)


def add_system_gaussian(tensors: Iterable[Tensor], *, std: float) -> None:
    """Add to every entry x an independent draw n from N(0, std²), by the system's entropy.

    An entry becomes round(x / g) g + round(n / g) g, where the grid g is a power of two in
    (std / 2^37, std / 2^36], and n is half of the sum of four draws of Box and Muller in float64,
    no two of them from the same uniform numbers. The sum of the two is exact, and is rounded once,
    to the type of the tensor.

    Guarantee: what an entry becomes is a function of one whole number, the sum of that of x and
    that of n, as long as |x| < 2^15 std. So which floating-point numbers it can become, and how
    finely they lie, does not depend on x (Mironov 2012; Haney et al. 2022). To find the uniform
    numbers behind n from what was released takes 2^159 tries (Holohan and Braghin 2021, section
    5.1). The rounding of x moves a sum of d entries by at most 2^-37 √d std, which is not
    accounted: for a thousand million entries both neighbours together by std / 2 000 000.

    Not covered: how the sum itself was rounded when it was added up; that logarithms and cosines
    are those of float64, and draws end at 17 std; time, or anything but the result.

    Args:
        tensors: contiguous floating-point tensors, changed in place; drawn for on the CPU.
        std: standard deviation, 0 or >= 1e-250; 0 leaves all as it is.

    Raises:
        ValueError: it is smaller, so that sums would be no numbers on its grid.
    """
    tensors = list(tensors)
    if 0 < std < _SMALLEST_STD:
        raise ValueError(
            f"Expected noise of standard deviation 0 or >= {_SMALLEST_STD:g}, got {std:g}: that is "
            "none; plan more, or an infinite ε."
        )
    if std:
        _side_by_side(tensors, [partial(_add, std=std)] * min(_THREADS, os.cpu_count() or 1))


def _fill(near: Tensor, *, std: float, generator: torch.Generator) -> None:
    near.normal_(0.0, std, generator=generator)


def _add(near: Tensor, *, std: float) -> None:
    """See `add_system_gaussian`."""
    grid = 2.0 ** (math.frexp(std)[1] - 1 - _FINER)
    for some in torch.split(near, _NEAR):
        drawn = system_gaussian(some.numel())
        for _ in range(_PARTS - 1):
            drawn += system_gaussian(some.numel())
        drawn.mul_(std / math.sqrt(_PARTS) / grid).round_()
        some.copy_(some.cpu().double().div_(grid).round_().add_(drawn).mul_(grid))


def _side_by_side(tensors: list[Tensor], works: Sequence[Callable[[Tensor], None]]) -> None:
    """Do each work in a thread of its own, on an equal share of the entries, piece by piece."""

    failures: list[Exception] = []

    def do(pieces: list[Tensor], work: Callable[[Tensor], None]) -> None:
        try:
            for piece in pieces:
                # Where there is no cache to stay in, every piece is one call more.
                size = _NEAR if piece.device.type == "cpu" else max(1, piece.numel())
                for near in torch.split(piece.view(-1), size):
                    work(near)
        except Exception as error:  # a thread's own would be printed, and its share left as it was
            failures.append(error)

    if sum(tensor.numel() for tensor in tensors) < _WORTH_A_THREAD:
        works = works[:1]
    first, *others = zip(equal_shares(tensors, len(works)), works, strict=True)
    threads = [Thread(target=do, args=share) for share in others]
    for thread in threads:
        thread.start()
    do(*first)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def equal_shares(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Cut contiguous tensors into `count` lists of flat views with equally many entries.

    Guarantee: every entry is in exactly one view.
    """
    size = -(-sum(tensor.numel() for tensor in tensors) // count)
    shares: list[list[Tensor]] = [[] for _ in range(count)]
    place, missing = 0, size
    for tensor in tensors:
        rest = tensor.view(-1)
        while rest.numel() > missing:
            shares[place].append(rest[:missing])
            rest, place, missing = rest[missing:], place + 1, size
        shares[place].append(rest)
        missing -= rest.numel()
    return shares


def entropy_generators(device: torch.device | str = "cpu") -> list[torch.Generator]:
    """As many generators from `entropy_generator` as can draw side by side."""
    on_cpu = torch.device(device).type == "cpu"
    return [
        entropy_generator(device)
        for _ in range(min(_THREADS, os.cpu_count() or 1) if on_cpu else 1)
    ]


def entropy_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator whose state comes from the operating system's entropy.

    On a CPU that is the whole 19937-bit state. On CUDA it is the 64-bit key of Philox (Salmon et
    al. 2011) and the place in its stream at which drawing begins, of 2^60: all that torch keeps of
    it, as the other half of Philox' counter numbers the threads. Elsewhere torch keeps a 64-bit
    seed, in a form that it documents nowhere, of which 63 bits are drawn.
    """
    generator = torch.Generator(device=device)
    seed = int.from_bytes(os.urandom(8), "little") & 0x7FFF_FFFF_FFFF_FFFF
    generator.manual_seed(seed)
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = np.frombuffer(os.urandom(4 * _TWISTER_WORDS), dtype=np.uint32).astype(np.uint64)
        end = _TWISTER_OFFSET + 8 * _TWISTER_WORDS
        state[_TWISTER_OFFSET:end] = torch.frombuffer(words.view(np.uint8), dtype=torch.uint8)
        generator.set_state(state)
    elif generator.device.type == "cuda":
        generator.set_state(_philox_state())
    return generator


def _philox_state() -> Tensor:
    """A state as torch keeps it on CUDA: the seed (8 bytes), and the offset (8), in fours.

    Guarantee: there is room for 2^62 draws before the offset wraps around.
    """
    seed, offset = (int.from_bytes(os.urandom(8), "little") for _ in range(2))
    state = seed.to_bytes(8, "little") + (offset % 2**62 & ~3).to_bytes(8, "little")
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def system_gaussian(count: int) -> Tensor:
    """`count` standard normal draws, float64, from the system's entropy (Box and Muller 1958)."""
    pairs = (count + 1) // 2
    words = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    # 53 random bits, shifted into (0, 1]: the logarithm must not meet 0.
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * math.pi * uniform[1]
    draws = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(draws[:count])
