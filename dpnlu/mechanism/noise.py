"""Gaussian noise, and nothing else: from a generator, or from the operating system's entropy.

On a CPU, torch seeds its generator from 32 bits, few enough to be searched by whoever holds
the released model. `entropy_generator` fills the generator's whole state instead.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from threading import Thread

import numpy as np
import torch
from torch import Tensor

# Drawing is bound by memory from a few threads on, and not worth a thread for few entries.
_THREADS, _WORTH_A_THREAD = 4, 10**6
# Entries that stay near the processor: a draw writes uniform numbers before it makes them normal.
_NEAR = 2**18

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
            side. None at all: fresh entropy from the operating system for every draw (slow,
            cryptographically secure).
    """
    tensors = list(tensors)
    if std == 0:
        for tensor in tensors:
            tensor.zero_()
    elif not generators:
        for tensor in tensors:
            tensor.copy_(system_gaussian(tensor.numel()).view(tensor.shape)).mul_(std)
    else:
        _fill_side_by_side(tensors, std, generators)


def _fill_side_by_side(
    tensors: list[Tensor], std: float, generators: Sequence[torch.Generator]
) -> None:
    """Draw with one thread per generator, each with an equal share of the entries."""

    failures: list[Exception] = []

    def fill(pieces: list[Tensor], generator: torch.Generator) -> None:
        try:
            for piece in pieces:
                # Where there is no cache to stay in, every piece is one call more.
                size = _NEAR if piece.device.type == "cpu" else max(1, piece.numel())
                for near in torch.split(piece.view(-1), size):
                    near.normal_(0.0, std, generator=generator)
        except Exception as error:  # a thread's own would be printed, and its share left as it was
            failures.append(error)

    if sum(tensor.numel() for tensor in tensors) < _WORTH_A_THREAD:
        generators = generators[:1]
    first, *others = zip(equal_shares(tensors, len(generators)), generators, strict=True)
    threads = [Thread(target=fill, args=share) for share in others]
    for thread in threads:
        thread.start()
    fill(*first)
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
