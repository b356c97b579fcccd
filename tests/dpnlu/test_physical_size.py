"""The largest physical batch that fits, on memory that is made up, and on what is there."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import dpnlu
from dpnlu.runs.physical_size import largest_size


def _peaks(base: float, each: float, fails_from: float = math.inf):
    """Peaks along a line, and the sizes that were tried."""
    tried = []

    def peak_of(size: int) -> float:
        tried.append(size)
        return base + each * size if size < fails_from else math.inf

    return peak_of, tried


@pytest.mark.parametrize("each", [0.3, 1.0, 7.7])
@pytest.mark.parametrize("limit", [110.0, 500.0, 1234.5])
@pytest.mark.parametrize("most", [1, 2, 37, 1000])
def test_what_fits_is_found_and_nothing_larger_is_tried(each, limit, most):
    peak_of, tried = _peaks(100.0, each)
    found = largest_size(peak_of, limit=limit, most=most)
    assert found == min(most, math.floor((limit - 100) / each + 1e-9))
    # The slope is known from the second try on.
    assert all(100 + each * size <= limit for size in tried if size > 2)
    assert max(tried) <= most and tried == sorted(tried)


def test_a_device_that_refuses_a_size_ends_the_search():
    peak_of, tried = _peaks(100.0, 1.0, fails_from=20)
    assert largest_size(peak_of, limit=1e9, most=1000) == 16
    assert tried == [1, 2, 4, 8, 16, 32, 32]


def test_memory_that_does_not_hold_one_example_is_refused():
    with pytest.raises(ValueError, match="Expected 50 MiB to hold the step of one example"):
        largest_size(_peaks(100.0, 1.0)[0], limit=50, most=8)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 4096), nn.Tanh(), nn.Linear(4096, 2))


def test_a_step_leaves_no_trace(make_plan):
    plan = make_plan(num_examples=90_000, sample_rate=0.4, noise_schedule="list:1,2")
    model = _model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    found = dpnlu.physical_batch_size(
        model,
        plan,
        lambda batch: model(batch).square().sum(1),
        lambda size: torch.randn(size, 64),
        memory_mib=_now() + 400,
    )
    assert 8 <= found <= 36_000 + 5 * 190
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks and not model[0]._forward_hooks


def test_more_memory_holds_more():
    """In a process of its own, without memory that was freed and is still held."""
    code = """
import torch, dpnlu
from dpnlu.runs.resources import current_memory
model = torch.nn.Sequential(torch.nn.Linear(64, 4096), torch.nn.Tanh(), torch.nn.Linear(4096, 2))
def found(more, examples=90_000):
    plan = dpnlu.PrivacyPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.4, steps=2,
                             target_delta=1e-6, num_examples=examples)
    return dpnlu.physical_batch_size(model, plan, lambda batch: model(batch).square().sum(1),
                                     lambda size: torch.randn(size, 64),
                                     memory_mib=current_memory() + more)
found(10_000, examples=8)  # loads what steps need
print(found(80), found(300))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    small, large = map(int, run.stdout.split())
    assert 8 <= small < large


def test_no_more_is_tried_than_a_logical_batch_has(make_plan):
    model, asked = nn.Linear(3, 1), []

    def random_batch(size):
        asked.append(size)
        return torch.randn(size, 3)

    for change in ({}, {"sampling": "truncated_poisson", "max_batch_size": 6}):
        plan = make_plan(num_examples=8, sample_rate=0.5, **change)
        found = dpnlu.physical_batch_size(
            model, plan, lambda batch: model(batch)[:, 0], random_batch, memory_mib=1e6
        )
        assert found == max(asked) == (6 if change else 8)
        asked.clear()


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "user", "examples_per_user": 2},
        {"clipping_unit": "microbatch", "microbatches": 3},
        {"clipping": "quantile:0.5"},
    ],
)
def test_every_kind_of_plan_is_probed_within_what_the_system_has(make_plan, change):
    model = nn.Linear(3, 1)
    found = dpnlu.physical_batch_size(
        model,
        make_plan(**change),
        lambda batch: model(batch)[:, 0],
        lambda size: torch.randn(size, 3),
    )
    assert found == 8


def _now() -> float:
    from dpnlu.runs.resources import current_memory

    return current_memory()
