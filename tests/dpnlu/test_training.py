"""The handle: what is released is clipped, noised as planned, recorded first, divided publicly."""

import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.accounting.accountants import epsilon
from dpnlu.accounting.events import SampledGaussian
from dpnlu.engines import clipped
from dpnlu.engines.independence import Independence
from dpnlu.engines.outcome import ClippedSum
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import SquaredNorms
from dpnlu.mechanism.ledger import Ledger, LedgerError
from dpnlu.training.handle import NonFiniteBatchError, privatize

MICROBATCH = {"clipping_unit": "microbatch", "microbatches": 3}
PER_EXAMPLE = ["book_keeping", "per_example", "opacus"]
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def losses_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) + 1).square().sum(1)


@pytest.fixture
def make(make_plan) -> Callable:
    """(model, handle); the coins and, unless given, the noise are fixed."""

    def privatized(model=None, *, lr=1.0, optimizer=None, coins=0, keep=None, **fields):
        options = {
            name: fields.pop(name) for name in ("engine", "ledger", "verify") if name in fields
        }
        options["noise"] = fields.pop("noise", None) or torch.Generator().manual_seed(3)
        model = model or Small()
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
        rng = np.random.default_rng(coins)
        return model, privatize(model, optimizer, make_plan(**fields), sampling_rng=rng, **options)

    return privatized


@pytest.fixture
def data():
    return list(torch.randn(8, 3))


def _flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# ---- what is released ------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("engine", PER_EXAMPLE)
@pytest.mark.parametrize("size", [None, 1, 3])
def test_what_is_released_is_the_clipped_sum_of_the_sampled_examples(
    make, clipped_sum, engine, size
):
    """… divided by the expected batch size, whatever the realised one and its pieces were."""
    data = list(torch.randn(8, 3) * 10)
    model, private = make(noise_multiplier=0.0, max_grad_norm=0.5, steps=6, engine=engine)
    seen, sizes, steps = [], set(), 0
    for batch in private.loader(data, physical_batch_size=size):
        seen.append(batch)
        before = _flat(model.parameters())
        reference = Small()
        reference.load_state_dict(model.state_dict())
        if not private.step(losses_of(model, batch)):
            assert torch.equal(_flat(model.parameters()), before)
            continue
        whole = torch.cat(seen)
        expected = clipped_sum("per_example", reference, losses_of, whole, max_grad_norm=0.5)
        torch.testing.assert_close(_flat(private.gradients.values()), expected)
        torch.testing.assert_close(_flat(model.parameters()), before - expected / 4.0)
        sizes.add(len(whole))
        seen, steps = [], steps + 1
    assert not seen and steps == len(private.ledger) == 6 and len(sizes) > 1
    private.close()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("engine", [*PER_EXAMPLE, "microbatch"])
def test_batches_of_a_fixed_size_release_the_same(make, engine):
    """… though their last examples are copies, with gradients of their own."""
    fields = MICROBATCH if engine == "microbatch" else {}
    data = list(torch.randn(8, 3) * 10)
    released = []
    for fixed in (False, True):
        torch.manual_seed(0)
        model, private = make(engine=engine, steps=6, lr=0.1, **fields)
        sizes = set()
        for batch in private.loader(data, physical_batch_size=3, fixed_size=fixed):
            sizes.add(len(batch))
            if private.step(losses_of(model, batch)):
                released.append(_flat(private.gradients.values()))
        assert (sizes == {3}) is fixed
        private.close()
    torch.testing.assert_close(released[:6], released[6:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", PER_EXAMPLE)
def test_an_infinite_example_among_its_own_copies_is_counted_once(make, data, engine):
    data[7] = torch.full((3,), math.inf)
    fields = {"sample_rate": 1.0, "steps": 2, "noise_multiplier": 0.0, "lr": 0.01}
    model, private = make(engine=engine, **fields)
    batches = private.loader(data, physical_batch_size=7, fixed_size=True)
    assert [private.step(losses_of(model, batch)) for batch in batches] == [False, True] * 2
    assert private.non_finite_units == 2
    private.close()


@pytest.mark.parametrize("attempt", range(4))
def test_norms_are_checked_on_an_example_that_counts(make, monkeypatch, attempt):
    """Not on a filler, whose norm is zero whatever the defect."""
    model, private = make(sample_rate=1.0, steps=9)
    right = clipped.norms_of_all

    def wrong(parts, like):
        norms = right(parts, like)
        return SquaredNorms(4 * norms.values, norms.slack)

    monkeypatch.setattr(clipped, "norms_of_all", wrong)
    data = list(torch.randn(8, 3))
    with pytest.raises(UnsupportedLayerError, match="the norm"):
        for batch in private.loader(data, physical_batch_size=11, fixed_size=True):
            private.step(losses_of(model, batch))


def test_fillers_that_are_not_finite_are_left_out_and_not_counted(make, data):
    data = [row * math.inf if place % 2 else row for place, row in enumerate(data)]
    model, private = make(sample_rate=1.0, steps=3, noise_multiplier=0.0, lr=0.01)
    for batch in private.loader(data, physical_batch_size=7, fixed_size=True):
        private.step(losses_of(model, batch))
    assert private.non_finite_units == 3 * 4
    assert bool(torch.isfinite(_flat(model.parameters())).all())


@pytest.mark.usefixtures("double", "unsampled")
def test_microbatches_are_divided_by_their_number(make):
    model, private = make(noise_multiplier=0.0, max_grad_norm=1e9, lr=1.0, **MICROBATCH)
    before, inputs = _flat(model.parameters()), torch.randn(1, 3)
    expected = torch.autograd.grad(losses_of(model, inputs).sum(), list(model.parameters()))
    private.step(losses_of(model, inputs))
    torch.testing.assert_close(_flat(model.parameters()), before - _flat(expected) / 3)


@pytest.mark.usefixtures("double")
def test_microbatches_of_the_loader_are_clipped_means(make):
    """One physical batch at most from each group; the groups follow each other."""
    data = [torch.eye(8)[i] for i in range(8)]
    linear = nn.Linear(8, 1, bias=False)
    fields = {"noise_multiplier": 0.0, "sample_rate": 1.0, "steps": 2, **MICROBATCH}
    model, private = make(linear, lr=0.0, **fields)
    for batch in private.loader(data, physical_batch_size=2):
        done = private.step(1e3 * model(batch).flatten())
        if done:
            shares = private.gradients[model.weight][0]
            sizes = (1 / shares.square()).round().long()
            counts = torch.bincount(sizes, minlength=9)
            assert int(counts.sum()) == 8
            assert all(int(c) % size == 0 for size, c in enumerate(counts) if c)
            assert int(sizes.max()) >= 3, "eight examples in three groups"
    assert private.steps_taken == 2


@pytest.mark.usefixtures("double", "unsampled")
def test_microbatches_of_a_whole_batch_are_drawn_at_random(make):
    fields = {"noise_multiplier": 0.0, "steps": 20, **MICROBATCH}
    model, private = make(nn.Linear(8, 1, bias=False), lr=0.0, **fields)
    seen = set()
    for _ in range(20):
        private.step(1e3 * model(torch.eye(8)).flatten())
        sizes = (1 / private.gradients[model.weight][0].square()).round().long()
        seen.add(tuple(sizes.tolist()))
    assert len(seen) > 5


NOISE_SOURCES = {"seeded": None, "system": "system"}


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("noise", NOISE_SOURCES.values(), ids=NOISE_SOURCES)
@pytest.mark.parametrize("unit", [{}, MICROBATCH], ids=["example", "microbatch"])
def test_the_noise_of_what_is_released_is_noise_multiplier_times_sensitivity(make, noise, unit):
    """… on every coordinate: neither 2/3 nor 3/2 of it. Micro-batches get twice as much."""
    model = nn.Linear(120, 100)
    fields = {"noise_multiplier": 0.8, "max_grad_norm": 0.5, **unit}
    _, private = make(model, noise=noise, lr=0.0, **fields)
    inputs = torch.randn(4, 120)
    private.step(model(inputs).square().mean(1))
    released = {p: total.clone() for p, total in private.gradients.items()}
    private.close()
    _, quiet = make(model, lr=0.0, **fields | {"noise_multiplier": 0.0})
    torch.manual_seed(0)
    quiet.step(model(inputs).square().mean(1))
    if unit:  # the assignment to groups is random, and small against the noise
        draws = _flat(released.values()).numpy()
    else:
        draws = (_flat(released.values()) - _flat(quiet.gradients.values())).numpy()
    std = 0.8 * (2 * 0.5 if unit else 0.5)
    assert stats.kstest(draws, "norm", args=(0, std)).pvalue > 1e-6
    for wrong in (std * 2 / 3, std * 3 / 2):
        assert stats.kstest(draws, "norm", args=(0, wrong)).pvalue < 1e-12


@pytest.mark.usefixtures("double", "unsampled")
@pytest.mark.parametrize("clipping", ["flat", "quantile:0.5"])
def test_what_is_released_with_the_system_s_noise_lies_on_a_grid(make, clipping):
    """… sum and noise together, and the noisy count, too."""
    model, private = make(Small(), noise="system", lr=0.0, clipping=clipping, noise_multiplier=0.7)
    std = private.plan.noise_std_at(0) / private.plan.divisor
    for batch in (torch.randn(5, 3), 100 * torch.randn(5, 3)):
        bound = private.max_grad_norm
        private.step(losses_of(model, batch))
        grid = 2.0 ** math.floor(math.log2(std * bound) - 36)
        places = _flat(private.steps.released.values()) / grid
        assert torch.equal(places, places.round()) and bool((places % 2).any())
    count_std = private.plan.count_std_at(0) if clipping != "flat" else 1.0
    count = private.steps.mechanism.noisy_number(1.5, std=count_std)
    assert (count / 2.0 ** (math.floor(math.log2(count_std)) - 36)).is_integer()


@pytest.mark.parametrize("noise", ["sytem", "", 3])
def test_noise_from_nowhere_is_refused(make_plan, noise):
    """… and not taken for the default."""
    model = Small()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="`noise` to be None, 'system' or"):
        privatize(model, optimizer, make_plan(), noise=noise)


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("noise", [None, "system"])
def test_a_resumed_training_draws_other_noise_than_what_was_lost(make_plan, noise, tmp_path):
    """From the same weights, on the same examples: with the same noise twice, the difference of
    two updates would tell what the sums are."""
    path, released = tmp_path / "ledger.jsonl", []
    for _ in range(2):
        ledger = Ledger.resume(path) if path.exists() else path
        model = nn.Linear(60, 50)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        private = privatize(model, optimizer, make_plan(), noise=noise, ledger=ledger)
        private.step(0 * model(torch.ones(2, 60)).sum(1))
        released.append(_flat(private.gradients.values()))
        private.close()
    assert stats.pearsonr(released[0].numpy(), released[1].numpy()).pvalue > 1e-6
    difference = (released[0] - released[1]).numpy() / 2**0.5
    assert stats.kstest(difference, "norm", args=(0, 1.0)).pvalue > 1e-6
    assert stats.kstest(difference, "norm", args=(0, 1.5)).pvalue < 1e-12


@pytest.mark.usefixtures("unsampled")
def test_the_noise_follows_the_schedule_of_the_releases_made(make, make_plan, tmp_path):
    """A resumed training goes on where the ledger ends, not with the first epoch's noise."""
    fields = {"noise_schedule": "exponential:0.1", "sample_rate": 0.5, "steps": 6}
    model, path = nn.Linear(100, 100, bias=False), tmp_path / "ledger.jsonl"
    measured = []
    for _ in range(2):
        ledger = Ledger.resume(path) if path.exists() else path
        _, private = make(model, lr=0.0, ledger=ledger, **fields)
        for _ in range(3):
            private.step(0 * model(torch.randn(2, 100)).sum(1))
            measured.append(float(_flat(private.gradients.values()).std()))
        private.close()
    assert measured == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=0.05)


@pytest.mark.usefixtures("unsampled")
def test_noise_is_drawn_once_per_step_and_anew_for_each(make, data):
    """However many physical batches make up the logical one."""
    model, private = make(nn.Linear(3, 4000), sample_rate=1.0, steps=2, lr=0.0)
    released = []
    for batch in private.loader(data, physical_batch_size=1):
        if private.step(0 * model(batch).sum(1)):
            released.append(_flat(private.gradients.values()))
    assert [float(noise.std()) for noise in released] == pytest.approx([1, 1], rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack(released))[0, 1])) < 0.05


@pytest.mark.usefixtures("unsampled")
def test_fresh_entropy_unless_a_generator_is_given(make_plan):
    released = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Small()
        private = privatize(model, torch.optim.SGD(model.parameters(), lr=0.0), make_plan())
        private.step(losses_of(model, torch.ones(2, 3)))
        released.append(_flat(private.gradients.values()))
    assert not torch.allclose(released[0], released[1])


@pytest.mark.usefixtures("unsampled")
def test_the_mechanism_is_the_same_for_any_optimizer_and_leaves_no_gradient(make):
    for optimizer in (torch.optim.AdamW, torch.optim.Adagrad):
        model = Small()
        made = optimizer(model.parameters(), lr=0.1)
        seen = []
        made.register_step_pre_hook(
            lambda o, *_, seen=seen: seen.append(
                [p.grad.clone() for p in o.param_groups[0]["params"]]
            )
        )
        before = _flat(model.parameters())
        _, private = make(model, optimizer=made)
        private.step(losses_of(model, torch.randn(3, 3)))
        torch.testing.assert_close(_flat(seen[0]) * 4, _flat(private.gradients.values()))
        assert not torch.equal(_flat(model.parameters()), before)
        assert all(p.grad is None for p in model.parameters())


def test_half_precision_parameters_are_trained_by_full_precision_sums(make, data):
    model, private = make(Small().bfloat16(), steps=2, sample_rate=1.0)
    for batch in private.loader(data):
        private.step(losses_of(model, batch.bfloat16()))
    assert all(total.dtype == torch.float32 for total in private.gradients.values())
    assert model[0].weight.dtype == torch.bfloat16


# ---- sampling and empty batches --------------------------------------------------------------


def test_every_example_is_seen_with_the_sample_rate(make):
    steps = 800
    model, private = make(steps=steps, sample_rate=0.3, lr=0.0, noise_multiplier=0.0)
    counts = torch.zeros(8)
    for ids in private.loader(list(range(8)), physical_batch_size=2):
        counts += torch.bincount(ids, minlength=8)
        private.step(losses_of(model, torch.zeros(len(ids), 3)))
    scores = (counts - steps * 0.3) / math.sqrt(steps * 0.3 * 0.7)
    assert stats.chi2.sf(float(scores.square().sum()), 8) > 1e-3
    assert private.steps_taken == steps


def test_an_empty_logical_batch_is_a_step_of_noise_alone_and_accounted(make, data):
    """The bodies of such steps are never seen, but each is in the ledger and moves the weights."""
    model, private = make(sample_rate=1e-9, steps=3)
    before = _flat(model.parameters())
    assert list(private.loader(data)) == []
    assert private.steps_taken == len(private.ledger) == 3 and private.remaining_steps == 0
    assert private.epsilon() == pytest.approx(private.plan.epsilon())
    noise = _flat(private.gradients.values())
    assert 0.5 < float(noise.std()) < 2
    assert not torch.equal(_flat(model.parameters()), before)


def test_full_and_empty_logical_batches_take_turns(make, data):
    """With rare examples: as many steps as planned, in the order in which they were drawn."""
    model, private = make(sample_rate=0.05, steps=60, lr=0.0, noise_multiplier=0.0)
    seen = 0
    for batch in private.loader(data, physical_batch_size=1):
        seen += private.step(losses_of(model, batch))
    assert 0 < seen < 60 and private.steps_taken == len(private.ledger) == 60


@pytest.mark.slow
def test_loading_in_other_processes_changes_nothing(make, data):
    trained = []
    for workers in (0, 2):
        torch.manual_seed(1)
        model, private = make(sample_rate=0.2, steps=20, lr=0.1)
        for batch in private.loader(data, physical_batch_size=1, num_workers=workers):
            private.step(losses_of(model, batch))
        assert private.steps_taken == 20
        trained.append(_flat(model.parameters()))
    torch.testing.assert_close(trained[0], trained[1])


@pytest.mark.usefixtures("double")
def test_the_loader_says_how_many_examples_there_are(make, data):
    """Though the first thing that the model is given is not the batch: five positions, which no
    batch of two or three could be taken for."""

    class Located(Small):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3))

        def forward(self, positions: Tensor, inputs: Tensor) -> Tensor:
            return super().forward(inputs[:, None] * self.table[positions]).sum(1)

    model, data = Located(), [row.double() for row in data]
    released = []
    for engine in ("book_keeping", "per_example"):
        fields = {"engine": engine, "steps": 3, "sample_rate": 0.6, "noise_multiplier": 0.0}
        _, private = make(model, lr=0.0, **fields)
        for batch in private.loader(data, physical_batch_size=3):
            private.step((model(torch.arange(5), batch) + 1).square().sum(1))
        released.append(_flat(private.gradients.values()))
        private.close()
    torch.testing.assert_close(released[0], released[1])


def test_batches_are_collated_as_asked(make, data):
    _, private = make(sample_rate=1.0, steps=1)
    batch = next(iter(private.loader(data, collate_fn=lambda rows: {"x": torch.stack(rows) * 2})))
    torch.testing.assert_close(batch["x"], torch.stack(data) * 2)


# ---- steps and the ledger --------------------------------------------------------------------


def test_steps_never_exceed_the_plan(make, data):
    model, private = make(steps=3, sample_rate=1.0)
    loader = private.loader(data)
    assert len(loader) == 3
    for batch in loader:
        private.step(losses_of(model, batch))
    assert private.remaining_steps == len(loader) == 0
    assert list(private.loader(data)) == []
    before = _flat(model.parameters())
    with pytest.warns(UserWarning, match="outside"), pytest.raises(RuntimeError, match="All 3 pl"):
        private.step(losses_of(model, torch.randn(2, 3)))
    assert torch.equal(_flat(model.parameters()), before) and len(private.ledger) == 3


def test_epsilon_is_spent_step_by_step(make, data):
    model, private = make(steps=4, sample_rate=1.0)
    spent = [private.epsilon()]
    for batch in private.loader(data):
        private.step(losses_of(model, batch))
        spent.append(private.epsilon())
    assert spent == pytest.approx([private.plan.epsilon(steps=k) for k in range(5)])
    assert private.epsilon(accountant="rdp") == pytest.approx(
        private.plan.epsilon(accountant="rdp")
    )


def test_the_entry_is_on_disk_before_the_optimizer_acts(make, data, tmp_path):
    path, found = tmp_path / "ledger.jsonl", []
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: found.append(len(Ledger.read(path))))
    _, private = make(model, optimizer=optimizer, ledger=path, steps=3, sample_rate=1.0)
    with private:
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
    assert found == [1, 2, 3]


def test_a_killed_run_has_recorded_the_step_it_died_in(tmp_path):
    path = tmp_path / "ledger.jsonl"
    code = textwrap.dedent("""
        import os, sys, torch
        from pathlib import Path
        from dpnlu.mechanism.plan import PrivacyPlan
        from dpnlu.training.handle import privatize
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = PrivacyPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, steps=5,
                           target_delta=1e-5, num_examples=4)
        private = privatize(model, optimizer, plan, ledger=Path(sys.argv[1]))
        def killed(*_):
            if private.steps_taken == 2:
                os._exit(9)
        optimizer.register_step_pre_hook(killed)
        for batch in private.loader(list(torch.randn(4, 3))):
            private.step(model(batch).square().sum(1))
    """)
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert run.returncode == 9 and len(Ledger.read(path)) == 3


@pytest.mark.usefixtures("unsampled")
def test_a_ledger_that_cannot_be_written_leaves_the_weights_untouched(make, monkeypatch, tmp_path):
    model, private = make(ledger=tmp_path / "ledger.jsonl")
    before = _flat(model.parameters())

    def fails(release):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(private.ledger, "append", fails)
        with pytest.raises(OSError, match="No space"):
            private.step(losses_of(model, torch.randn(2, 3)))
    assert torch.equal(_flat(model.parameters()), before) and private.steps_taken == 0
    assert all(p.grad is None for p in model.parameters())
    private.step(losses_of(model, torch.randn(2, 3)))
    assert private.steps_taken == len(private.ledger) == 1
    private.close()


def test_resuming_from_a_ledger_leaves_fewer_steps(make, data, tmp_path):
    path = tmp_path / "ledger.jsonl"
    model, private = make(ledger=path, steps=5, sample_rate=1.0)
    for batch in private.loader(data):
        if private.steps_taken == 2:
            break
        private.step(losses_of(model, batch))
    private.close()
    with pytest.raises(LedgerError, match="resume it"):
        make(ledger=path, steps=5, sample_rate=1.0)
    _, resumed = make(model, ledger=Ledger.resume(path), steps=5, sample_rate=1.0)
    assert (resumed.remaining_steps, resumed.steps_taken) == (3, 0)
    assert resumed.epsilon() == pytest.approx(private.plan.epsilon(steps=2))
    for batch in resumed.loader(data):
        resumed.step(losses_of(model, batch))
    assert len(resumed.ledger) == 5 and resumed.epsilon() == pytest.approx(resumed.plan.epsilon())
    resumed.close()
    assert len(Ledger.read(path)) == 5


def test_a_ledger_of_another_plan_is_refused(make, make_plan):
    """It would decide δ, or tell of another mechanism than the model's."""
    model = Small()
    stranger = Ledger(make_plan(target_delta=1e-2, num_examples=9))
    with pytest.raises(ValueError, match="with other target_delta, num_examples: go on"):
        make(model, ledger=stranger)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("unsampled")
def test_a_ledger_may_be_continued_for_more_steps(make, make_plan):
    ledger = Ledger(make_plan(steps=1))
    ledger.append(ledger.plan.event_at(0))
    model, private = make(steps=2, ledger=ledger)
    private.step(losses_of(model, torch.randn(2, 3)))
    assert len(ledger) == 2 and private.remaining_steps == 0
    assert private.epsilon() > private.plan.epsilon(steps=1)


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("how", ["a step outside the loader", "a torn line"])
def test_the_loader_takes_only_steps_with_which_epsilon_stays_within_the_plan(
    make, data, tmp_path, how
):
    """A costlier release than planned was recorded: the rest is spent on fewer steps."""
    path, fields = tmp_path / "ledger.jsonl", {"steps": 30, "sample_rate": 0.2}
    model, private = make(ledger=path, **fields)
    with private:
        if how == "a torn line":
            private.ledger.append(private.plan.event_at(0))
        else:
            private.step(losses_of(model, torch.randn(2, 3)))
    if how == "a torn line":
        path.write_bytes(path.read_bytes()[:-3])
    _, private = make(model, ledger=Ledger.resume(path), **fields)
    with private:
        left = private.remaining_steps
        assert 0 < left < 29
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
        assert private.steps_taken == left and private.remaining_steps == 0
    assert private.epsilon() <= private.plan.epsilon()


@pytest.mark.parametrize("change", ["rm", "truncate"])
def test_a_ledger_that_vanishes_stops_training_before_the_next_update(make, data, tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    model, private = make(ledger=path, steps=5, sample_rate=1.0)
    with private, pytest.raises(LedgerError, match="as this training left it"):
        for batch in private.loader(data):
            if private.steps_taken == 2:
                before = _flat(model.parameters())
                path.unlink() if change == "rm" else os.truncate(path, 0)
            private.step(losses_of(model, batch))
    assert private.steps_taken == 2 and torch.equal(_flat(model.parameters()), before)


@pytest.mark.usefixtures("unsampled")
def test_a_ledger_that_was_only_read_cannot_be_trained_with(make, make_plan, tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(make_plan(), path=path).close()
    model, private = make(ledger=Ledger.read(path))
    before = _flat(model.parameters())
    with pytest.raises(LedgerError, match="opened for reading"):
        private.step(losses_of(model, torch.randn(2, 3)))
    assert torch.equal(_flat(model.parameters()), before)


# ---- broken off, repeated, left out ----------------------------------------------------------


def test_a_loop_that_is_broken_off_releases_nothing_of_the_unfinished_batch(make, data):
    model, private = make(sample_rate=1.0, steps=3, noise_multiplier=0.0, max_grad_norm=0.5)
    before = _flat(model.parameters())
    for batch in private.loader(data, physical_batch_size=3):
        assert private.step(losses_of(model, batch)) is False
        break
    assert len(private.ledger) == 0 and torch.equal(_flat(model.parameters()), before)
    for batch in private.loader(data, physical_batch_size=8):
        reference = Small()
        reference.load_state_dict(model.state_dict())
        private.step(losses_of(model, batch))
        break
    assert len(private.ledger) == 1
    parameters = list(reference.parameters())
    rows = [torch.autograd.grad(losses_of(reference, x[None]).sum(), parameters) for x in batch]
    expected = sum(_flat(row) * min(1.0, 0.5 / float(_flat(row).norm())) for row in rows)
    torch.testing.assert_close(_flat(private.gradients.values()), expected)


@pytest.mark.parametrize("stepped", [True, False])
def test_a_new_loop_begins_anew_though_the_old_one_was_not_closed(make, data, stepped):
    model, private = make(sample_rate=1.0, steps=1, noise_multiplier=0.0, lr=0.0)
    old = iter(private.loader([row * 1e3 for row in data], physical_batch_size=4))
    batch = next(old)
    if stepped:
        private.step(losses_of(model, batch))
    _, again = make(model, sample_rate=1.0, steps=1, noise_multiplier=0.0, lr=0.0)
    for handle in (private, again):
        for whole in handle.loader(data):
            handle.step(losses_of(model, whole))
    torch.testing.assert_close(_flat(private.gradients.values()), _flat(again.gradients.values()))
    old.close()


def test_after_a_loop_was_broken_off_a_step_counts_as_unsampled(make, data):
    model, private = make(sample_rate=0.5, steps=3)
    for _ in private.loader(data):
        break
    with pytest.warns(UserWarning, match="no sampling took place"):
        private.step(losses_of(model, torch.randn(2, 3)))
    event = replace(private.plan.event_at(0), sample_rate=1.0)
    assert private.epsilon() == pytest.approx(epsilon([event], delta=1e-5))


def test_a_batch_without_a_step_is_an_error(make, data):
    _, private = make(sample_rate=1.0, steps=3)
    loader = iter(private.loader(data, physical_batch_size=4))
    next(loader)
    with pytest.raises(RuntimeError, match="once for every batch"):
        next(loader)
    assert len(private.ledger) == 0
    with pytest.raises(RuntimeError, match="once for every batch"):
        list(private.loader(data))


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
def test_a_batch_cannot_be_stepped_twice(make, engine):
    """Its examples would be in the sum twice, and move it by twice the bound."""
    data = list(100 * torch.randn(8, 3))
    model, private = make(sample_rate=1.0, steps=3, noise_multiplier=0.0, engine=engine, lr=0.0)
    for batch in private.loader(data, physical_batch_size=4):
        losses = losses_of(model, batch)
        private.step(losses)
        with pytest.raises(RuntimeError, match="loader"):
            private.step(losses)
        break
    assert len(private.ledger) == 0


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
def test_a_step_that_failed_cannot_be_repeated(make, data, monkeypatch, engine):
    """Part of it may be in the sum already, say when memory ran out: it would be there twice."""
    model, private = make(sample_rate=1.0, steps=3, noise_multiplier=0.0, lr=0.0, engine=engine)
    really = private._engine.clip

    @dataclass(frozen=True)
    class Failing:
        total: ClippedSum

        def add_to(self, buffers, *, scale):
            self.total.add_to(buffers, scale=scale)
            raise MemoryError

    def fails(losses, **options):
        outcome = really(losses, **options)
        return replace(outcome, total=Failing(outcome.total))

    loop = iter(private.loader([100 * row for row in data], physical_batch_size=4))
    batch = next(loop)
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(private._engine, "clip", fails)
        private.step(losses_of(model, batch))
    with pytest.raises(RuntimeError, match="in which no step failed"):
        next(loop)
    for batch in private.loader([100 * row for row in data]):
        private.step(losses_of(model, batch))
        break
    assert float(_flat(private.gradients.values()).norm()) <= 8 + 1e-3
    assert len(private.ledger) == 1


@pytest.fixture
def released_of_all(make) -> Callable[..., Tensor]:
    """What a training that nothing disturbs releases of the whole data as one logical batch."""

    def release(model, data, **fields) -> Tensor:
        _, private = make(model, sample_rate=1.0, noise_multiplier=0.0, lr=0.0, **fields)
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
            break
        private.close()
        return _flat(private.gradients.values())

    return release


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
@pytest.mark.parametrize("call", [1, 2], ids=["before the step", "in its check"])
def test_a_step_inside_another_counts_nobody_twice(make, released_of_all, engine, call):
    """The function that computes the losses makes a step itself; in the check it is called again,
    while the batch is being added."""
    data, model = list(100 * torch.randn(8, 3)), Small()
    expected = released_of_all(model, data)
    _, private = make(model, sample_rate=1.0, noise_multiplier=0.0, engine=engine, lr=0.0)
    refused = []

    def losses(batch):
        refused.append("")
        if len(refused) == call:
            try:
                private.step(losses_of(model, batch))
            except (RuntimeError, ValueError) as error:
                refused[-1] = str(error)
                raise
        return losses_of(model, batch)

    step = private.stepper(losses)
    try:
        for batch in private.loader(data, physical_batch_size=4):
            if step(batch):
                break
    except (RuntimeError, ValueError) as error:
        assert call == 1 and re.search("one inside another|this batch alone", str(error))
        assert len(private.ledger) == 0
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
            break
    else:
        assert call == 2 and "one inside another" in refused[1]
    assert len(private.ledger) == 1
    torch.testing.assert_close(_flat(private.gradients.values()), expected)


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
def test_an_interrupt_in_a_check_abandons_what_was_added(
    make, released_of_all, monkeypatch, engine
):
    """By then the clipped gradients are in the sum: a second try would add them twice."""
    data, model = list(100 * torch.randn(8, 3)), Small()
    expected = released_of_all(model, data)
    _, private = make(model, sample_rate=1.0, noise_multiplier=0.0, engine=engine, lr=0.0)
    step = private.stepper(lambda batch: losses_of(model, batch))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    loop = iter(private.loader(data, physical_batch_size=4))
    batch = next(loop)
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(Independence, "check", interrupt)
        step(batch)
    with pytest.raises(RuntimeError, match="in which no step failed"):
        next(loop)
    for batch in private.loader(data):
        step(batch)
        break
    assert len(private.ledger) == 1
    torch.testing.assert_close(_flat(private.gradients.values()), expected)


@pytest.mark.parametrize("stage", ["append", "step"])
def test_a_loop_goes_on_after_a_release_that_failed(make, released_of_all, monkeypatch, stage):
    """With the next logical batch: nothing of the failed one is in it."""
    data, model = list(100 * torch.randn(8, 3)), Small()
    expected = released_of_all(model, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fields = {"sample_rate": 1.0, "noise_multiplier": 0.0, "optimizer": optimizer}
    _, private = make(model, **fields)
    loop = iter(private.loader(data, physical_batch_size=4))
    assert not private.step(losses_of(model, next(loop)))

    def fails(*_):
        raise OSError(28, "No space left on device")

    batch = next(loop)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
        broken.setattr(private.ledger if stage == "append" else optimizer, stage, fails)
        private.step(losses_of(model, batch))
    recorded = 0 if stage == "append" else 1
    assert len(private.ledger) == recorded and bool(private.gradients) == (stage == "step")
    assert [private.step(losses_of(model, next(loop))) for _ in range(2)] == [False, True]
    assert len(private.ledger) == recorded + 1 and private.steps_taken == 1
    torch.testing.assert_close(_flat(private.gradients.values()), expected)


def test_a_loop_that_was_replaced_is_over(make, data):
    """Its examples would be added to a logical batch that they were not drawn for."""
    model, private = make(sample_rate=1.0, steps=2, noise_multiplier=0.0, lr=0.0)
    old = iter(private.loader(data, physical_batch_size=4))
    private.step(losses_of(model, next(old)))
    new = iter(private.loader(data, physical_batch_size=4))
    private.step(losses_of(model, next(new)))
    with pytest.raises(RuntimeError, match="begun last"):
        next(old)
    assert private.step(losses_of(model, next(new))), "the end of the old loop changes nothing"


@pytest.mark.usefixtures("double")
def test_a_micro_batch_that_was_broken_off_is_forgotten(make):
    """Else the next loop would add to it, and an example could be in two micro-batches: 4C."""
    data = [1e3 * torch.eye(8)[i] for i in range(8)]
    fields = {"clipping_unit": "microbatch", "microbatches": 1, "noise_multiplier": 0.0}
    model, private = make(nn.Linear(8, 1, bias=False), lr=0.0, sample_rate=1.0, steps=1, **fields)
    for batch in private.loader(data, physical_batch_size=6):
        private.step(model(batch).flatten())
        break
    for batch in private.loader(data):
        private.step(model(batch).flatten())
    expected = torch.full((8,), 1 / math.sqrt(8))
    torch.testing.assert_close(private.gradients[model.weight][0], expected)


def test_a_step_outside_the_loader_warns_once_and_is_accounted_without_amplification(make):
    model, private = make(sample_rate=0.01, steps=4)
    with pytest.warns(UserWarning, match="no sampling took place"):
        assert private.step(losses_of(model, torch.randn(3, 3))) is True
    private.step(losses_of(model, torch.randn(3, 3)))
    events = replace(private.plan.event_at(0), sample_rate=1.0, steps=2)
    assert private.epsilon() == pytest.approx(epsilon([events], delta=1e-5))
    assert private.epsilon() > 2 * private.plan.epsilon(steps=2)


@pytest.mark.usefixtures("unsampled")
def test_a_step_outside_the_loader_is_not_amplified_by_truncation_either(make):
    """Nobody drew these examples, nor truncated their batch: the cost is that of a Gaussian."""
    fields = {"sampling": "truncated_poisson", "max_batch_size": 20, "num_examples": 1000}
    model, private = make(sample_rate=0.01, **fields)
    private.step(losses_of(model, torch.randn(3, 3)))
    gaussian = SampledGaussian(noise_multiplier=1.0, sample_rate=1.0, steps=1)
    assert private.epsilon() >= epsilon([gaussian], delta=1e-5) - 1e-3


@pytest.mark.usefixtures("unsampled")
def test_an_empty_batch_outside_the_loader_is_a_step_too(make):
    for engine in ("book_keeping", "per_example"):
        model, private = make(engine=engine)
        private.step(losses_of(model, torch.randn(0, 3)))
        assert private.steps_taken == 1


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
def test_steps_outside_the_loader_may_be_of_any_size(make, engine):
    """The first of them is checked, by running the model again on some of its examples."""
    model, private = make(engine=engine, noise_multiplier=0.0, lr=0.0)
    alike = Small()  # whose forward passes nobody records
    alike.load_state_dict(model.state_dict())
    for size in (3, 5, 1, 4):
        batch, clipped = torch.randn(size, 3), torch.zeros(())
        private.step(losses_of(model, batch))
        for loss in losses_of(alike, batch):
            own = _flat(torch.autograd.grad(loss, list(alike.parameters()), retain_graph=True))
            clipped = clipped + own * min(1.0, 1.0 / float(own.norm()))
        found = _flat(private.gradients[parameter] for parameter in model.parameters())
        torch.testing.assert_close(found, clipped, rtol=1e-4, atol=1e-5)


# ---- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            lambda losses: losses.mean(),
            ValueError,
            r"shape \(B,\), got shape \(\).*reduction='none'",
        ),
        (lambda losses: losses[:, None], ValueError, "one loss per example"),
        (lambda losses: losses[:-1], ValueError, "Expected 8 losses, one for each example"),
        (lambda losses: losses.repeat(2), ValueError, "tokens to one number first"),
        (lambda losses: losses.detach(), ValueError, "without a gradient"),
        (lambda losses: losses.tolist(), TypeError, "tensor"),
    ],
)
def test_losses_that_are_no_vector_of_the_batch_are_refused(make, data, change, error, says):
    model, private = make(sample_rate=1.0)
    for batch in private.loader(data):
        with pytest.raises(error, match=says):
            private.step(change(losses_of(model, batch)))
        assert private.step(losses_of(model, batch)), "the batch can still be stepped"
        break
    assert len(private.ledger) == 1


@pytest.mark.usefixtures("double")
def test_a_mean_over_all_tokens_would_break_the_bound_and_is_refused(make, clipped_sum):
    """63 sentences of one token and one of 40: in a mean over tokens each one's weight depends on
    the others' lengths, so that removing one example moves the sum by more than 15 C. A mean over
    each example's own tokens does not."""
    lengths = torch.tensor([1] * 63 + [40])
    model, inputs = nn.Linear(3, 2), torch.full((64, 40, 3), 0.5)
    labels = torch.zeros(64, 40, dtype=torch.long)
    mask = torch.arange(40) < lengths[:, None]

    def token_losses(model, inputs, labels):
        return F.cross_entropy(model(inputs).mT, labels, reduction="none")

    def shares_of_token_mean(model, inputs, labels, mask):
        """The usual recipe: undo the mean by multiplying with the number of examples."""
        sums = (token_losses(model, inputs, labels) * mask).sum(1)
        return sums * len(inputs) / mask.sum()

    def means(model, inputs, labels, mask):
        return (token_losses(model, inputs, labels) * mask).sum(1) / mask.sum(1)

    def moved(losses):
        batch = (inputs, labels, mask)
        sums = [
            clipped_sum("per_example", model, losses, tuple(v[:count] for v in batch))
            for count in (64, 63)
        ]
        return float((sums[0] - sums[1]).norm())

    assert moved(shares_of_token_mean) > 15
    assert moved(means) <= 1 + 1e-9
    _, private = make(model)
    scalar = (token_losses(model, inputs, labels) * mask).sum() / mask.sum()
    with pytest.raises(ValueError, match="mean over each example's own tokens"):
        private.step(scalar)
    assert len(private.ledger) == 0


@pytest.mark.usefixtures("unsampled")
def test_gradients_of_somebody_else_are_refused(make):
    model, private = make()
    losses_of(model, torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="call neither backward"):
        private.step(losses_of(model, torch.randn(2, 3)))
    assert len(private.ledger) == 0
    model.zero_grad()
    assert private.step(losses_of(model, torch.randn(2, 3)))


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("engine", PER_EXAMPLE)
@pytest.mark.parametrize("change", ["unfrozen", "frozen", "added", "exchanged"])
def test_parameters_that_are_changed_meanwhile_are_refused(make, engine, change):
    """What is unfrozen would not be trained, or be acted on unclipped; what is added likewise."""
    model = Small()
    model[0].requires_grad_(change != "unfrozen")
    model, private = make(model, engine=engine)
    if engine == "opacus" and change == "exchanged":
        pytest.skip("Opacus' hooks stumble over such a parameter before this library sees it")
    if change == "added":
        model.add_module("more", nn.Linear(2, 2))
    elif change == "exchanged":
        model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))
    else:
        model[0].requires_grad_(change == "unfrozen")
    before = _flat(model.parameters())
    with pytest.raises(ValueError, match=r"same trainable parameters.*call privatize anew"):
        private.step(losses_of(model, torch.randn(2, 3)))
    assert torch.equal(_flat(model.parameters()), before) and len(private.ledger) == 0


# ---- what is not finite ----------------------------------------------------------------------


def test_examples_that_are_not_finite_are_left_out_and_counted(make, data):
    data[2] = torch.full((3,), math.nan)
    model, private = make(sample_rate=1.0, steps=3, noise_multiplier=0.0, lr=0.01)
    for batch in private.loader(data, physical_batch_size=3):
        private.step(losses_of(model, batch))
    assert private.non_finite_units == 3 and private.steps_taken == 3
    assert bool(torch.isfinite(_flat(model.parameters())).all())
    assert float(_flat(private.gradients.values()).norm()) > 0


@pytest.mark.parametrize("size", [None, 3])
def test_a_batch_without_any_finite_gradient_stops_training_and_is_not_released(make, data, size):
    data = [row * math.inf for row in data]
    model, private = make(sample_rate=1.0, steps=3)
    before = _flat(model.parameters())
    with pytest.raises(NonFiniteBatchError, match="None of the 8 gradients"):
        for batch in private.loader(data, physical_batch_size=size):
            private.step(losses_of(model, batch))
    assert len(private.ledger) == private.steps_taken == 0
    assert torch.equal(_flat(model.parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    assert private.gradients == {}


@pytest.mark.usefixtures("unsampled")
def test_a_single_example_that_is_not_finite_is_a_step_of_noise(make):
    """To stop there would say that it was the only one."""
    model, private = make(noise_multiplier=0.0)
    before = _flat(model.parameters())
    assert private.step(losses_of(model, torch.full((1, 3), math.inf)))
    assert torch.equal(_flat(model.parameters()), before)
    assert private.non_finite_units == len(private.ledger) == 1


@pytest.mark.parametrize("earlier", [0, 2])
def test_a_batch_that_was_broken_off_shows_nothing(make, data, earlier):
    """Its noisy sum was not released, and no ledger holds it."""
    model, private = make(sample_rate=1.0, steps=4)
    for done, batch in enumerate(private.loader(data, physical_batch_size=4)):
        private.step(losses_of(model, batch))
        if done == 2 * earlier:
            break
    assert len(private.ledger) == earlier
    assert private.gradients == {}


def test_a_release_that_the_ledger_refuses_shows_nothing(make, data, monkeypatch):
    model, private = make(sample_rate=1.0, steps=4)
    before = _flat(model.parameters())

    def full(event):
        raise LedgerError("Expected room for a line.")

    monkeypatch.setattr(private.ledger, "append", full)
    with pytest.raises(LedgerError):
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
    assert private.gradients == {}
    assert torch.equal(_flat(model.parameters()), before)


# ---- refusals and set-up ---------------------------------------------------------------------


def test_unsuitable_engines_are_refused(make):
    with pytest.raises(
        ValueError, match="one of book_keeping, per_example, microbatch, opacus, got"
    ):
        make(engine="ghost")
    with pytest.raises(ValueError, match="PrivacyPlan\\(clipping_unit='microbatch'"):
        make(engine="microbatch")
    with pytest.raises(ValueError, match="clipping unit, 'microbatch', got 'book_keeping'"):
        make(engine="book_keeping", **MICROBATCH)


def test_unsuitable_models_and_optimizers_are_refused(make):
    with pytest.raises(UnsupportedLayerError, match="Module 1 "):
        make(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    with pytest.raises(ValueError, match="the model's own parameters"):
        make(Small(), optimizer=torch.optim.SGD(Small().parameters(), lr=0.1))


def _compiled(model: nn.Module, *, in_place: bool) -> nn.Module:
    if not in_place:
        return torch.compile(model, backend="eager")
    model.compile(backend="eager")
    return model


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models_are_refused_where_operations_must_be_seen(make, in_place):
    inputs = torch.randn(4, 3)
    with pytest.raises(UnsupportedLayerError, match=r"Module .* is compiled.*engine='per_example'"):
        make(nn.Sequential(_compiled(Small(), in_place=in_place)))
    expected, plain = make(engine="per_example", noise_multiplier=0.0)
    model = Small()
    model.load_state_dict(expected.state_dict())
    model, private = make(
        _compiled(model, in_place=in_place), engine="per_example", noise_multiplier=0.0
    )
    private.step(losses_of(model, inputs))
    plain.step(losses_of(expected, inputs))
    torch.testing.assert_close(_flat(model.parameters()), _flat(expected.parameters()))


@pytest.mark.usefixtures("unsampled")
@pytest.mark.parametrize("engine", PER_EXAMPLE)
def test_a_forward_pass_beside_training_changes_nothing_or_is_refused(make, engine):
    """Opacus would release zeros from then on."""
    inputs = torch.randn(4, 3)
    (model, private), (other, plain) = (make(noise_multiplier=0.0, engine=engine) for _ in "12")
    other.load_state_dict(model.state_dict())
    losses = losses_of(model, inputs)
    model(inputs)
    if engine == "opacus":
        with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
            private.step(losses)
        losses = losses_of(model, inputs)
    private.step(losses)
    plain.step(losses_of(other, inputs))
    torch.testing.assert_close(_flat(model.parameters()), _flat(other.parameters()))


def test_a_refusal_leaves_nothing_behind(make, tmp_path):
    """No ledger file that would have to be resumed, no hooks."""
    model, path = Small(), tmp_path / "ledger.jsonl"
    with pytest.raises(ValueError):
        make(model, optimizer=torch.optim.SGD(Small().parameters(), lr=0.1), ledger=path)
    tagger = nn.LSTM(3, 2)
    with pytest.raises(UnsupportedLayerError):
        make(tagger, engine="opacus", ledger=path)
    assert not path.exists()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), tagger))


def test_a_data_set_of_another_size_is_refused(make, data):
    _, private = make()
    with pytest.raises(
        ValueError, match="Expected the 8 examples of the plan, got a data set of 7"
    ):
        private.loader(data[:7])
    with pytest.raises(ValueError, match="for batches of a fixed size, got None"):
        private.loader(data, fixed_size=True)
    with pytest.raises(ValueError, match="`physical_batch_size` >= 1, got 0"):
        private.loader(data, physical_batch_size=0)


def test_examples_that_mix_are_noticed_before_anything_is_released(make, data):
    class Mixing(Small):
        def forward(self, inputs):
            hidden = self[0](inputs)
            return self[2](hidden - hidden.mean(0))

    model, private = make(Mixing(), sample_rate=1.0)
    before = _flat(model.parameters())
    with pytest.raises(UnsupportedLayerError, match="that example alone"):
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
    assert len(private.ledger) == 0 and torch.equal(_flat(model.parameters()), before)


@pytest.mark.parametrize("way", ["stepper", "step"])
def test_time_major_recurrent_layers_are_noticed(make, way):
    """batch_first forgotten: as many positions as examples, so that all shapes agree."""
    recurrent = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    _, private = make(recurrent, sample_rate=1.0)

    def losses(batch):
        hidden, _ = recurrent["lstm"](batch)
        return recurrent["head"](hidden).square().sum((1, 2))

    step = private.stepper(losses) if way == "stepper" else lambda b: private.step(losses(b))
    with pytest.raises(UnsupportedLayerError, match="examples mix"):
        for batch in private.loader(list(torch.randn(8, 8, 3))):
            step(batch)
    assert len(private.ledger) == 0


# ---- after and beside ------------------------------------------------------------------------


@pytest.mark.usefixtures("unsampled")
def test_a_closed_training_takes_no_step(make, tmp_path):
    """It would be missing in the ledger's file."""
    path = tmp_path / "ledger.jsonl"
    model, private = make(engine="per_example", ledger=path)
    private.close()
    before = _flat(model.parameters())
    with pytest.raises(RuntimeError, match="call privatize anew"):
        private.step(losses_of(model, torch.randn(2, 3)))
    assert torch.equal(_flat(model.parameters()), before)
    assert len(private.ledger) == len(Ledger.read(path)) == 0


@pytest.mark.parametrize("engine", PER_EXAMPLE)
def test_closing_leaves_no_trace_and_epsilon_keeps_answering(make, data, tmp_path, engine):
    model = Small()
    keys, modules = list(model.state_dict()), [set(vars(m)) for m in model.modules()]
    fields = {"engine": engine, "ledger": tmp_path / "ledger.jsonl", "steps": 2}
    _, private = make(model, sample_rate=1.0, **fields)
    with private:
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
    assert private.epsilon() == pytest.approx(private.plan.epsilon())
    assert list(model.state_dict()) == keys
    assert [set(vars(module)) for module in model.modules()] == modules
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    losses_of(model, torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_two_trainings_in_one_process_do_not_disturb_each_other(make, data):
    alone = []
    for coins in (1, 2):
        torch.manual_seed(coins)
        model, private = make(Small(), coins=coins, steps=4, lr=0.1)
        for batch in private.loader(data):
            private.step(losses_of(model, batch))
        alone.append(_flat(model.parameters()))
    pairs = []
    for coins in (1, 2):
        torch.manual_seed(coins)
        pairs.append(make(Small(), coins=coins, steps=4, lr=0.1))
    loaders = [iter(private.loader(data)) for _, private in pairs]
    running = [0, 1]
    while running:
        for index in list(running):
            model, private = pairs[index]
            try:
                private.step(losses_of(model, next(loaders[index])))
            except StopIteration:
                running.remove(index)
    together = [_flat(model.parameters()) for model, _ in pairs]
    torch.testing.assert_close(together, alone)


def test_training_learns(make):
    """Not only private: on easy data, with little noise, the loss falls."""
    inputs = torch.randn(200, 3)
    labels = (inputs[:, 0] > 0).long()
    fields = {"num_examples": 200, "sample_rate": 0.25, "steps": 60, "noise_multiplier": 0.5}
    model, private = make(lr=2.0, **fields)
    for batch, targets in private.loader(list(zip(inputs, labels, strict=True))):
        private.step(F.cross_entropy(model(batch), targets, reduction="none"))
    accuracy = float((model(inputs).argmax(1) == labels).float().mean())
    assert accuracy > 0.9
