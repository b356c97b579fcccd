"""Sums begin as noise: each entry once, of the right scale, whenever it is looked at."""

import pytest
import torch
from scipy import stats
from torch import nn

from dpnlu.mechanism.noise import entropy_generators
from dpnlu.training import logical_batch as sums
from dpnlu.training.logical_batch import NoisySums

# A run with fresh entropy must not fail by chance.
ACCEPTED, REJECTED = 1e-6, 1e-12


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    shapes = [(100, 50), (1000,), (80, 100), (70, 80)]
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def _noisy(parameters: list[nn.Parameter], std: float = 0.5) -> NoisySums:
    return NoisySums(parameters, std=std, generators=entropy_generators())


@pytest.mark.parametrize("backwards", [False, True])
def test_every_sum_is_noise_of_the_given_scale(
    parameters: list[nn.Parameter], backwards: bool
) -> None:
    noisy = _noisy(parameters)
    for parameter in reversed(parameters) if backwards else parameters:
        draws = noisy[parameter].flatten().numpy()
        assert noisy[parameter].shape == parameter.shape
        assert stats.kstest(draws, "norm", args=(0, 0.5)).pvalue > ACCEPTED
        if len(draws) > 2000:
            for wrong in (0.5 * 2 / 3, 0.5 * 3 / 2):
                assert stats.kstest(draws, "norm", args=(0, wrong)).pvalue < REJECTED


def test_sums_are_independent(parameters: list[nn.Parameter]) -> None:
    noisy = _noisy(parameters)
    flat = [noisy[parameter].flatten() for parameter in (parameters[3], *parameters[:3])]
    for place, one in enumerate(flat):
        for other in flat[:place]:
            count = min(len(one), len(other))
            found = stats.pearsonr(one[:count].numpy(), other[:count].numpy())
            assert found.pvalue > ACCEPTED


def test_noise_is_drawn_once_and_not_before_a_look(
    parameters: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[torch.Size]] = []

    def note(tensors, **_):
        drawn.append([tensor.shape for tensor in tensors])

    monkeypatch.setattr(sums, "fill_gaussian", note)
    noisy = _noisy(parameters)
    assert list(noisy) == parameters and len(noisy) == 4
    assert not drawn
    for parameter in (parameters[2], *parameters):
        noisy[parameter]
    assert drawn == [[parameter.shape for parameter in parameters]]


def test_what_was_added_stays(parameters: list[nn.Parameter]) -> None:
    noisy = _noisy(parameters, std=0.0)
    noisy[parameters[2]].add_(3.0)
    assert [float(total.sum()) for total in noisy.values()] == [0.0, 0.0, 24_000.0, 0.0]


def test_sums_of_half_precision_are_float32() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    assert _noisy([parameter])[parameter].dtype == torch.float32
