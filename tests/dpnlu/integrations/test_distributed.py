"""Several processes train as one does: the same samples, sums, noise and ε, and end together."""

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributed as dist
from torch import nn

from dpnlu.integrations.distributed import privatize_distributed
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.sampling import logical_batches
from dpnlu.training.several_processes import SeveralProcesses, digest_of_tensors
from tests.dpnlu.integrations import rank_tasks
from tests.dpnlu.integrations.rank_tasks import Course
from tests.dpnlu.integrations.ranks import Failed, Ranks
from tests.dpnlu.integrations.subjects import plan, weights

# A run with fresh entropy must not fail by chance.
ACCEPTED, REJECTED = 1e-6, 1e-12
NOISY = plan(noise_multiplier=1.0)

PLANS = {
    "as they come": plan(),
    "often empty": plan(sample_rate=0.1, steps=12),
    "always empty": plan(sample_rate=1e-9),
    "truncated": plan(sampling="truncated_poisson", max_batch_size=3),
    "micro-batches": plan(clipping_unit="microbatch", microbatches=3),
    "one micro-batch": plan(clipping_unit="microbatch", microbatches=1),
    "adaptive": plan(clipping="quantile:0.3:1", max_grad_norm=0.1),
    "per layer": plan(clipping="per_layer:size"),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def _together(pair: Ranks, *arguments: Any, **named: Any) -> list[Course]:
    found = pair.call(rank_tasks.together, *arguments, **named)
    assert all(isinstance(one, Course) for one in found), found
    return found


# ---- as one process --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANS)
def test_weights_are_those_of_one_process(pair: Ranks, kind: str) -> None:
    alone = rank_tasks.alone(PLANS[kind])
    first, second = _together(pair, PLANS[kind])
    for one in (first, second):
        assert torch.allclose(one.weights, alone.weights, rtol=1e-6, atol=1e-6)
        assert one.releases == PLANS[kind].steps
    assert torch.equal(first.weights, second.weights), "to the last bit"
    assert torch.equal(first.gradients, second.gradients)
    if kind != "always empty":
        assert not torch.equal(first.weights, weights(rank_tasks.subjects.model()))


@pytest.mark.parametrize("kind", ["as they come", "often empty", "truncated"])
def test_parts_make_up_the_batches_of_one_process(pair: Ranks, kind: str) -> None:
    """… so that they are the plan's in distribution, and no example is on two ranks."""
    drawn = logical_batches(PLANS[kind], rng=np.random.default_rng(0))
    wanted = [next(drawn).units[0].tolist() for _ in range(PLANS[kind].steps)]
    parts = [
        [part for part in one.parts if part] for one in _together(pair, PLANS[kind], physical=20)
    ]
    assert parts == [[batch[rank::2] for batch in wanted if batch[rank::2]] for rank in range(2)]
    if kind == "often empty":
        assert any(len(batch) == 1 for batch in wanted), "a rank is without examples"


def test_another_engine_trains_alike(pair: Ranks) -> None:
    alone = rank_tasks.alone(plan())
    for one in _together(pair, plan(), engine="per_example"):
        assert torch.allclose(one.weights, alone.weights, rtol=1e-5, atol=1e-6)


def test_epsilon_is_that_of_one_process(pair: Ranks) -> None:
    for one in _together(pair, NOISY, seed=None):
        assert one.epsilon == NOISY.epsilon() and one.releases == NOISY.steps


def test_samples_are_fresh_each_time(pair: Ranks) -> None:
    first, _ = _together(pair, NOISY, seed=None)
    second, _ = _together(pair, NOISY, seed=None)
    assert first.parts != second.parts


# ---- noise -----------------------------------------------------------------------------------

EMPTY = plan(noise_multiplier=2.0, sample_rate=1e-9, steps=3)


@pytest.mark.parametrize("source", ["fresh", "own", "system"])
def test_noise_is_drawn_once_in_all(pair: Ranks, source: str) -> None:
    """… with the plan's standard deviation in total, not √2 times it and not a √2th."""
    found = pair.call(rank_tasks.noise, EMPTY, own=source == "own", system=source == "system")
    assert torch.equal(found[0], found[1])
    std = EMPTY.noise_std_at(0)
    size = found[0].shape[1]
    for draws in (found[0], found[0][:, : size // 2], found[0][:, size // 2 :]):
        flat = draws.flatten().numpy()
        assert stats.kstest(flat, "norm", args=(0, std)).pvalue > ACCEPTED
        for wrong in (std * 2**0.5, std / 2**0.5):
            assert stats.kstest(flat, "norm", args=(0, wrong)).pvalue < REJECTED


@pytest.mark.parametrize("source", ["fresh", "own"])
def test_noise_is_independent_between_ranks_and_steps(pair: Ranks, source: str) -> None:
    """… even where all ranks have the same seed."""
    draws = pair.call(rank_tasks.noise, EMPTY, own=source == "own")[0]
    half = draws.shape[1] // 2
    pieces = [piece for step in draws for piece in (step[:half], step[-half:])]
    for place, one in enumerate(pieces):
        for other in pieces[:place]:
            assert stats.pearsonr(one.numpy(), other.numpy()).pvalue > ACCEPTED


def test_noise_is_added_to_the_sum_of_all_ranks(pair: Ranks) -> None:
    exact, _ = _together(pair, plan(steps=1))
    noisy, _ = _together(pair, plan(steps=1, noise_multiplier=1.0))
    noise = (noisy.gradients - exact.gradients).numpy()
    std = NOISY.noise_std_at(0)
    assert stats.kstest(noise, "norm", args=(0, std)).pvalue > ACCEPTED
    assert stats.kstest(noise, "norm", args=(0, 1.5 * std)).pvalue < 1e-3


def test_sums_of_all_shapes_and_types_are_added_up(pair: Ranks) -> None:
    found = pair.call(rank_tasks.added)
    for one, other, *mine in zip(*found, *rank_tasks.sums_of_ranks(), strict=True):
        assert torch.equal(one, other) and one.dtype == mine[0].dtype
        assert torch.allclose(one, mine[0] + mine[1])


def test_weights_of_all_kinds_are_those_of_rank_0(pair: Ranks) -> None:
    for found in pair.call(rank_tasks.copied):
        for one, wanted in zip(found, rank_tasks.tensors_of(0), strict=True):
            assert torch.equal(one, wanted) and one.dtype == wanted.dtype


# ---- the ledger ------------------------------------------------------------------------------


def test_a_ledger_is_written_once_and_resumed_by_all(pair: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    _together(pair, NOISY, ledger=path, stop=2)
    assert len(Ledger.read(path)) == 2
    for one in _together(pair, NOISY, ledger=path, resume=True):
        assert one.releases == NOISY.steps and one.epsilon == NOISY.epsilon()
    assert len(Ledger.read(path)) == NOISY.steps


def test_a_loop_that_all_break_off_may_be_begun_anew(pair: Ranks) -> None:
    """… though one of them was further on, so that samples had to be shared anew."""
    first, second = pair.call(rank_tasks.in_two_loops, plan(sample_rate=0.9, steps=6))
    assert [one.releases for one in first] == [one.releases for one in second] == [2, 6]
    assert len(second[0].physical) == len(first[0].physical) + 1
    assert torch.equal(first[1].weights, second[1].weights)
    for one, other in zip(first[1].parts, second[1].parts, strict=True):
        assert not set(one) & set(other)


# ---- what is refused -------------------------------------------------------------------------

REFUSED = {
    "plan": "the same plan on all ranks, got another on rank 1",
    "learning rate": "the same optimizer on all ranks, got another on rank 1",
    "parameters": "the same model on all ranks",
    "batch normalisation": "batch normalisation mixes examples",
    "momentum": "the same state of the optimizer on all ranks, got another on rank 1",
    "data": "the same examples at the same places",
    "ledger": "found a ledger",
    "unsampled": "Expected batches of private.loader, of which each rank gets its part",
    "weights": "the same weights on all ranks after release 2",
    "break": "one has ended or did not come|has ended on all ranks|at different places",
    "wrapped": "model.module",
    "sharded": "keep the whole model on every rank",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_on_one_rank_ends_all(pair: Ranks, tmp_path: Path, kind: str) -> None:
    (tmp_path / "there.jsonl").write_text('{"ledger": 2}\n')
    began = time.monotonic()
    found = pair.call(rank_tasks.differently, plan(), kind=kind, folder=tmp_path)
    failed = [one for one in found if isinstance(one, Failed)]
    assert len(failed) == (1 if kind == "break" else 2), found
    for one in failed:
        assert re.search(REFUSED[kind], one.message), one
        assert "\n" not in one.message
    assert time.monotonic() - began < 60
    _together(pair, plan())  # the processes are of use still


@pytest.mark.parametrize(
    ("kind", "message"), [("mean", r"shape \(B,\), got shape \(\)"), ("own", "user's own")]
)
def test_an_error_on_one_rank_reaches_all(pair: Ranks, kind: str, message: str) -> None:
    first, second = pair.call(rank_tasks.with_losses, plan(sample_rate=1.0), kind=kind)
    assert first.kind == "ProcessesError" and "rank 1: " in first.message
    for one in (first, second):
        assert re.search(message, one.message), one


@pytest.fixture
def by_itself(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_trains_as_one_process(by_itself: None, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    found = rank_tasks.together(0, plan(), ledger=path)
    assert torch.allclose(found.weights, rank_tasks.alone(plan()).weights, rtol=1e-6, atol=1e-6)
    assert len(Ledger.read(path)) == plan().steps
    assert len(rank_tasks.copied(0)) == len(rank_tasks.tensors_of(0))
    assert torch.equal(rank_tasks.added(0)[0], rank_tasks.sums_of_ranks()[0][0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("wrapped", "model.module"),
        ("ledger", "found a ledger"),
        ("unsampled", None),  # there is no other rank that could have the same examples
    ],
)
def test_a_group_of_one_is_refused_what_others_are(
    by_itself: None, tmp_path: Path, kind: str, message: str | None
) -> None:
    (tmp_path / "there.jsonl").write_text('{"ledger": 2}\n')
    with pytest.raises((ValueError, UserWarning), match=message):
        rank_tasks.differently(0, plan(), kind=kind, folder=tmp_path)
    if kind == "ledger":
        with pytest.raises(ValueError, match="path of the ledger that is to be resumed"):
            rank_tasks.together(0, plan(), resume=True)
    # What was refused left nothing open.
    assert rank_tasks.together(0, plan()).releases == plan().steps


def test_a_ledger_that_records_nothing_is_not_left_behind(
    by_itself: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(SeveralProcesses, "copy_first", fail)
    with pytest.raises(MemoryError):
        rank_tasks.together(0, plan(), ledger=tmp_path / "ledger.jsonl")
    assert not (tmp_path / "ledger.jsonl").exists()


def test_without_processes_nothing_begins() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="start the script by torchrun"):
        privatize_distributed(model, torch.optim.SGD(model.parameters()), plan())


def test_other_weights_have_another_digest() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5, dtype=torch.float64), torch.ones(3).bfloat16()]
    digests = {digest_of_tensors(tensors)}
    for tensor in tensors:
        tensor.view(-1)[1] *= 1.01
        digests.add(digest_of_tensors(tensors))
    assert len(digests) == 4 and digest_of_tensors(tensors) in digests


# ---- ranks that end --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "where", "recorded"),
    [
        (1, "losses", 2),
        (0, "losses", 2),
        (0, "before the record", 2),
        (0, "after the record", 3),
        (1, "sleep", 2),
    ],
)
def test_a_rank_that_ends_stops_the_others(
    tmp_path: Path, who: int, where: str, recorded: int
) -> None:
    """… with every update that any of them applied in the ledger, and one more at the most."""
    path, full = tmp_path / "ledger.jsonl", plan(noise_multiplier=1.0, sample_rate=1.0)
    with Ranks() as ranks:
        began = time.monotonic()
        ranks.begin(rank_tasks.ending, full, ledger=path, who=who, where=where)
        left = ranks.answer(1 - who)
        assert time.monotonic() - began < 120
    ((message,),) = left.parts
    assert message.startswith("ProcessesError: Expected all ranks to go on"), message
    assert left.applied == 2
    assert rank_tasks.releases(path) == recorded


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_rank_may_be_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """… and the training is resumed to its end by others."""
    chance = random.Random(seed)
    path, noisy = tmp_path / "ledger.jsonl", plan(noise_multiplier=1.0, steps=40)
    who = chance.randrange(2)
    with Ranks() as ranks:
        ranks.call(rank_tasks.ready)
        ranks.begin(rank_tasks.counting, noisy, folder=tmp_path)
        time.sleep(chance.uniform(0.1, 1.5))
        ranks.processes[who].kill()
        left = ranks.answer(1 - who)
    assert isinstance(left, Course) or left.kind == "ProcessesError", left
    recorded = len(Ledger.read(path)) if path.exists() else 0
    applied = [rank_tasks.counted(tmp_path, rank) for rank in range(2)]
    assert max(applied) <= recorded <= max(applied) + 1
    with Ranks() as ranks:
        for one in ranks.call(rank_tasks.together, noisy, ledger=path, resume=path.exists()):
            assert one.releases == 40, one
