"""Memory for sums: a tensor for each parameter, of as few pieces as possible."""

import pytest
import torch
from torch import nn

from dpnlu.training import buffers
from dpnlu.training.buffers import Buffers

SHAPES = [(3, 5), (), (0, 4), (129,), (2, 64), (7,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64, torch.float16]


@pytest.fixture
def parameters():
    return [
        nn.Parameter(torch.zeros(shape, dtype=dtype))
        for shape, dtype in zip(SHAPES, DTYPES, strict=True)
    ]


@pytest.mark.parametrize("block", [1, 130, 300, 2**24])
@pytest.mark.parametrize("make", [Buffers.like, Buffers.in_blocks])
def test_every_entry_is_in_one_place_of_one_block(monkeypatch, parameters, make, block):
    """… so that to fill the blocks is to fill every parameter's tensor, with numbers of its own."""
    monkeypatch.setattr(buffers, "_BLOCK", block)
    found = make(parameters)
    assert {id(one) for one in found.of} == {id(one) for one in parameters}
    start = 1
    for whole in found.blocks:
        assert whole.is_contiguous()
        whole.view(-1).copy_(torch.arange(start, start + whole.numel()))
        start += whole.numel()
    seen = [number for own in found.of.values() for number in own.flatten().tolist()]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(1, start))
    for parameter, own in found.of.items():
        assert own.shape == parameter.shape and own.is_contiguous()
        assert own.dtype is torch.promote_types(parameter.dtype, torch.float32)


def test_blocks_are_few_and_not_larger_than_they_have_to_be(monkeypatch, parameters):
    assert len(Buffers.in_blocks(parameters).blocks) == 2  # of float32 and float64
    monkeypatch.setattr(buffers, "_BLOCK", 130)
    sizes = [whole.numel() for whole in Buffers.in_blocks(parameters).blocks]
    assert max(sizes) <= 512 and len(sizes) > 2


def test_every_tensor_begins_where_kernels_are_fastest(parameters):
    for own in Buffers.in_blocks(parameters).of.values():
        assert own.storage_offset() * own.element_size() % 512 == 0


def test_on_a_processor_every_parameter_has_a_block_of_its_own(parameters):
    found = Buffers.like(parameters)
    assert all(own is whole for own, whole in zip(found.of.values(), found.blocks, strict=True))
    elsewhere = [nn.Parameter(torch.zeros(3, device="meta")) for _ in range(4)]
    assert len(Buffers.like(elsewhere).blocks) == 1
