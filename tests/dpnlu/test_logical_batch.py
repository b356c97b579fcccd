"""A logical batch begins as noise, each entry once and of the right scale, and ends once: released,
the ledger first, or abandoned without a trace."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from dpnlu.engines.outcome import ClipOutcome, WrittenOut
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.noise import entropy_generators
from dpnlu.training import logical_batch
from dpnlu.training.logical_batch import LogicalBatch, Mechanism, NonFiniteBatchError

# A run with fresh entropy must not fail by chance.
ACCEPTED, REJECTED = 1e-6, 1e-12
SHAPES = [(100, 50), (1000,), (80, 100), (70, 80)]


class Tensors(nn.Module):
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(shape) for shape in shapes)


@pytest.fixture
def make(make_plan) -> Callable[..., Mechanism]:
    """A mechanism whose sums have noise of 0.5; the divisor is 4."""

    def mechanism(model: nn.Module | None = None, **fields) -> Mechanism:
        plan = make_plan(**{"noise_multiplier": 2.0} | fields)
        assert plan.divisor == 4
        model = model or Tensors(*SHAPES)
        parameters = list(model.parameters())
        return Mechanism(
            plan=plan,
            ledger=Ledger(plan),
            model=model,
            parameters=parameters,
            optimizer=torch.optim.SGD(parameters, lr=1.0),
            generators=entropy_generators(),
        )

    return mechanism


@dataclass(frozen=True)
class Failing:
    """Part of a sum is added, and then memory runs out."""

    total: WrittenOut

    def add_to(self, buffers, *, scale) -> None:
        self.total.add_to(buffers, scale=scale)
        raise MemoryError


def _outcome(total, *, norms: int = 1, finite: bool = True) -> ClipOutcome:
    return ClipOutcome(torch.ones(norms), torch.full((norms,), finite), total)


def _ones(mechanism: Mechanism, size: float = 1.0) -> WrittenOut:
    return WrittenOut({p: torch.ones_like(p) for p in mechanism.parameters}, size)


def _released(mechanism: Mechanism, *outcomes: ClipOutcome) -> list[Tensor]:
    batch = LogicalBatch(mechanism)
    for outcome in outcomes:
        batch.add(outcome)
    batch.release(sampled=True)
    return [batch.released[parameter] for parameter in mechanism.parameters]


# ---- noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
def test_every_sum_is_noise_of_the_given_scale(make, backwards: bool) -> None:
    """… whichever parameter the first clipped gradient is added to."""
    mechanism = make()
    zeros = {p: torch.zeros_like(p) for p in mechanism.parameters}
    if backwards:
        zeros = dict(reversed(zeros.items()))
    for sums in _released(mechanism, _outcome(WrittenOut(zeros))):
        draws = sums.flatten().numpy()
        assert stats.kstest(draws, "norm", args=(0, 0.5)).pvalue > ACCEPTED
        if len(draws) > 2000:
            for wrong in (0.5 * 2 / 3, 0.5 * 3 / 2):
                assert stats.kstest(draws, "norm", args=(0, wrong)).pvalue < REJECTED


def test_sums_are_independent(make) -> None:
    mechanism = make()
    flat = [sums.flatten() for _ in range(2) for sums in _released(mechanism)]
    for place, one in enumerate(flat):
        for other in flat[:place]:
            count = min(len(one), len(other))
            found = stats.pearsonr(one[:count].numpy(), other[:count].numpy())
            assert found.pvalue > ACCEPTED


@pytest.mark.parametrize("additions", [0, 1, 3])
def test_noise_is_drawn_once_and_not_before_it_is_needed(make, monkeypatch, additions) -> None:
    """… which is when the first clipped gradients are added or, without any, at the release."""
    drawn: list[list[torch.Size]] = []

    def note(tensors, *, std, generators):
        drawn.append([tensor.shape for tensor in tensors])
        for tensor in tensors:
            tensor.zero_()

    monkeypatch.setattr(logical_batch, "fill_gaussian", note)
    mechanism = make()
    batch = LogicalBatch(mechanism)
    batch.add(_outcome(None, norms=0))
    assert not drawn
    for _ in range(additions):
        batch.add(_outcome(_ones(mechanism)))
        assert len(drawn) == 1
    batch.release(sampled=True)
    assert drawn == [[parameter.shape for parameter in mechanism.parameters]]
    for sums in batch.released.values():
        assert bool((sums == additions / 4).all())


def test_noise_is_reproduced_by_its_generator(make) -> None:
    """… whatever is added on top of it, and in how many pieces."""
    found = []
    for pieces in (1, 2):
        mechanism = make()
        generators = [torch.Generator().manual_seed(5)]
        object.__setattr__(mechanism, "generators", generators)
        outcomes = [_outcome(_ones(mechanism, 1 / pieces))] * pieces
        found.append([_released(mechanism, *outcomes), _released(mechanism)])
    torch.testing.assert_close(found[0], found[1])


def test_sums_of_half_precision_are_float32(make) -> None:
    mechanism = make(nn.Linear(3, 1).bfloat16())
    assert {sums.dtype for sums in _released(mechanism)} == {torch.float32}


# ---- a life ----------------------------------------------------------------------------------


def test_the_ledger_comes_first_and_the_optimizer_finds_what_is_released(make) -> None:
    mechanism = make(noise_multiplier=0.0)
    batch = LogicalBatch(mechanism)
    found = []

    def look(optimizer, *_):
        gradients = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
        found.append((len(mechanism.ledger), gradients))

    mechanism.optimizer.register_step_pre_hook(look)
    batch.add(_outcome(_ones(mechanism)))
    assert batch.is_open and batch.released == {} and len(mechanism.ledger) == 0
    batch.release(sampled=True)
    [(recorded, gradients)] = found
    assert recorded == 1
    assert all(bool((gradient == 0.25).all()) for gradient in gradients)
    assert all(p.grad is None and bool((p == -0.25).all()) for p in mechanism.parameters)
    torch.testing.assert_close(list(batch.released.values()), gradients)


def _released_once(batch: LogicalBatch) -> None:
    batch.release(sampled=True)


@pytest.mark.parametrize("end", [_released_once, LogicalBatch.abandon], ids=["released", "left"])
def test_what_has_ended_is_neither_added_to_nor_released(make, end) -> None:
    mechanism = make()
    batch = LogicalBatch(mechanism)
    batch.add(_outcome(_ones(mechanism)))
    end(batch)
    recorded, weights = len(mechanism.ledger), [p.detach().clone() for p in mechanism.parameters]
    shown = {p: sums.clone() for p, sums in batch.released.items()}
    for again in (lambda: batch.add(_outcome(_ones(mechanism))), lambda: _released_once(batch)):
        with pytest.raises(RuntimeError, match="Expected a logical batch that is open"):
            again()
    assert len(mechanism.ledger) == recorded and not batch.is_open
    torch.testing.assert_close([p.detach() for p in mechanism.parameters], weights)
    torch.testing.assert_close(dict(batch.released), shown)


def test_a_batch_to_which_some_could_not_be_added_is_abandoned(make) -> None:
    mechanism = make()
    batch = LogicalBatch(mechanism)
    with pytest.raises(MemoryError):
        batch.add(_outcome(Failing(_ones(mechanism))))
    assert not batch.is_open and batch.released == {}
    with pytest.raises(RuntimeError, match="one that is abandoned"):
        batch.add(_outcome(_ones(mechanism)))


def test_noise_that_cannot_be_drawn_is_not_left_out(make, monkeypatch) -> None:
    """Sums without noise, or with half of it, are never added to or released."""

    def fails(tensors, **_):
        next(iter(tensors)).zero_()
        raise OSError("no entropy")

    mechanism = make()
    for act in (lambda b: b.add(_outcome(_ones(mechanism))), _released_once):
        batch = LogicalBatch(mechanism)
        with monkeypatch.context() as broken, pytest.raises(OSError, match="no entropy"):
            broken.setattr(logical_batch, "fill_gaussian", fails)
            act(batch)
        with pytest.raises(RuntimeError, match="one that is abandoned"):
            batch.release(sampled=True)
        assert batch.released == {} and len(mechanism.ledger) == 0
    assert not any(parameter.any() for parameter in mechanism.parameters)


def test_a_release_that_is_not_recorded_is_abandoned(make, monkeypatch) -> None:
    mechanism = make()
    batch = LogicalBatch(mechanism)

    def full(event):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="No space"):
        broken.setattr(mechanism.ledger, "append", full)
        batch.release(sampled=True)
    assert batch.released == {} and not any(p.any() for p in mechanism.parameters)
    with pytest.raises(RuntimeError, match="one that is abandoned"):
        batch.release(sampled=True)


def test_an_optimizer_that_fails_has_been_recorded_and_leaves_no_gradient(make) -> None:
    """What it has seen, wholly or in part, is released."""
    mechanism = make()
    batch = LogicalBatch(mechanism)

    def fails(*_):
        raise ArithmeticError

    mechanism.optimizer.register_step_pre_hook(fails)
    with pytest.raises(ArithmeticError):
        batch.release(sampled=True)
    assert len(mechanism.ledger) == 1 and len(batch.released) == len(SHAPES)
    assert all(parameter.grad is None for parameter in mechanism.parameters)


def test_units_that_are_not_finite_are_counted_over_the_whole_batch(make) -> None:
    mechanism = make()
    batch = LogicalBatch(mechanism)
    batch.add(_outcome(None, norms=2, finite=False))
    batch.add(_outcome(None, norms=1, finite=False))
    with pytest.raises(NonFiniteBatchError, match="None of the 3 gradients"):
        batch.release(sampled=True)
    assert len(mechanism.ledger) == 0 and batch.non_finite == 3
    batch = LogicalBatch(mechanism)
    batch.add(_outcome(None, norms=2, finite=False))
    batch.add(_outcome(_ones(mechanism)))
    batch.release(sampled=True)
    assert len(mechanism.ledger) == 1 and batch.non_finite == 2
