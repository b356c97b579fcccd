"""Public examples beside private ones: what the optimizer gets, what bounds it, what it costs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpnlu import AdamBC, PublicExamples, physical_batch_size
from dpnlu.engines import ENGINES
from dpnlu.mechanism.ledger import Ledger
from dpnlu.training.agreement import check_public
from dpnlu.training.handle import privatize
from dpnlu.training.handover import Handover
from dpnlu.training.loop import ComputeConfig, Randomness, Recipe, fit
from dpnlu.training.public import PublicGradientError

pytestmark = pytest.mark.usefixtures("unsampled")

BATCH = 6


class Tagger(nn.Module):
    """Word ids (B, T) -> losses (B,); word 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=0)
        self.states = nn.LSTM(4, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.states(self.words(ids))
        return 3 * self.head(self.norm(states)).square().sum((1, 2))


class Given(nn.Module):
    """The gradient of an example is the example."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.weights).sum(1)


class Added(nn.Module):
    """Both parameters have the same gradient, which autograd hands out as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.zeros(3)) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * (self.one + self.other)).sum(1)


@dataclass
class Watched:
    """Losses of a model, and the batches that they were asked for."""

    model: nn.Module
    factor: float = 1.0
    batches: list[Tensor] = field(default_factory=list)

    def __call__(self, batch: Tensor) -> Tensor:
        self.batches.append(batch)
        return self.factor * self.model(batch)


@pytest.fixture
def make(make_plan):
    """A private training with public examples beside; see the arguments."""

    def privatized(model, examples, *, engine=None, ledger=None, optimizer=None, **changes):
        public = {name: changes.pop(name) for name in PUBLIC & set(changes)}
        losses_of = public.pop("losses_of", model)
        given = {"noise_multiplier": 0.0, "num_examples": BATCH, "sample_rate": 1.0}
        return privatize(
            model,
            optimizer or torch.optim.SGD(model.parameters(), lr=changes.pop("lr", 1.0)),
            make_plan(**given | changes),
            engine=engine,
            ledger=ledger,
            noise=torch.Generator().manual_seed(7),
            sampling_rng=np.random.default_rng(1),
            public=PublicExamples(examples=examples, losses_of=losses_of, **public),
        )

    return privatized


PUBLIC = {"losses_of", "weight", "batch_size", "physical_batch_size", "rng", "collate_fn"}


def _texts(count: int, seed: int) -> Tensor:
    return torch.randint(1, 9, (count, 4), generator=torch.Generator().manual_seed(seed))


def _of_norms(*norms: float) -> Tensor:
    return torch.tensor(norms)[:, None] * torch.tensor([0.0, 0.6, 0.8])


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _rows(model: nn.Module, batch: Tensor) -> Tensor:
    """(B, P) gradients, one backward pass for each example."""
    found = [
        torch.autograd.grad(model(one[None]).sum(), list(model.parameters()), allow_unused=True)
        for one in batch
    ]
    return torch.stack([_flat(gradients) for gradients in found])


# ---- what the optimizer gets -----------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
@pytest.mark.parametrize("clipping", ["flat", "public:0.3"])
@pytest.mark.parametrize("physical", [None, 2])
def test_it_is_the_clipped_private_mean_plus_the_weighted_public_mean(
    make, engine, clipping, physical
):
    """By a loop over examples, at the weights of every step, at which the loop also finds the
    bound."""
    torch.manual_seed(0)
    model, private_ones, public_ones = Tagger(), _texts(BATCH, 1), _texts(20, 2)
    watched = Watched(model)
    private = make(
        model,
        public_ones,
        losses_of=watched,
        batch_size=5,
        physical_batch_size=physical,
        weight=0.7,
        rng=np.random.default_rng(0),
        engine=engine,
        clipping=clipping,
        lr=0.05,
        max_grad_norm=2.0,
        steps=3,
    )
    step = private.stepper(model)
    drawn = []
    for batch in private.loader(private_ones, physical_batch_size=4):
        if not step(batch):
            before = Tagger()
            before.load_state_dict(model.state_dict())
            drawn.append(watched.batches[-math.ceil(5 / (physical or 5)) :])
            continue
        beside = torch.cat(drawn[-1])
        norms = _rows(before, beside).norm(dim=1)
        bound = float(norms.quantile(0.3)) if clipping == "public:0.3" else 2.0
        assert len(beside) == 5 and private.max_grad_norm == pytest.approx(bound)
        rows = _rows(before, private_ones)
        clipped = rows * (bound / rows.norm(dim=1)).clamp(max=1)[:, None]
        assert not torch.allclose(rows, clipped), "nothing is clipped"
        expected = clipped.sum(0) / BATCH + 0.7 * _rows(before, beside).mean(0)
        moved = _flat(before.parameters()) - _flat(model.parameters())
        torch.testing.assert_close(moved / 0.05, expected, rtol=1e-8, atol=1e-10)
        released = _flat(private.gradients.values())
        torch.testing.assert_close(released, clipped.sum(0), rtol=1e-8, atol=1e-10)
    assert len(drawn) == 3 and len({tuple(torch.cat(one).flatten().tolist()) for one in drawn}) == 3


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("clipping", ["flat", "public:0.5"])
def test_a_step_without_private_examples_has_the_public_gradient(make, clipping):
    model, public_ones = Given(), _of_norms(1.0, 3.0)
    private = make(model, public_ones, clipping=clipping, sample_rate=1e-9, num_examples=8, steps=2)
    assert list(private.loader(torch.ones(8, 3))) == []
    assert len(private.ledger) == 2
    torch.testing.assert_close(model.weights.detach(), -2 * public_ones.mean(0))


def test_gradients_that_are_one_tensor_are_added_up_once(make):
    model = Added()
    private = make(model, _of_norms(1.0, 2.0, 3.0), physical_batch_size=1, max_grad_norm=1e-9)
    private.stepper(model)(_of_norms(1.0))
    for parameter in model.parameters():
        torch.testing.assert_close(-parameter.detach(), _of_norms(2.0)[0])


def test_an_optimizer_that_somebody_else_steps_gets_both(make):
    model = Given()
    optimizer = Handover(torch.optim.SGD(model.parameters(), lr=1.0))
    private = make(model, _of_norms(3.0), optimizer=optimizer, max_grad_norm=1.0)
    private.stepper(model)(_of_norms(5.0))
    optimizer.hand_over()
    torch.testing.assert_close(model.weights.grad, _of_norms(3 + 1 / BATCH)[0])
    torch.testing.assert_close(private.gradients[model.weights], _of_norms(1.0)[0])


def test_adam_without_the_noise_takes_the_noise_of_the_bound(make):
    model = Given()
    optimizer = AdamBC(model.parameters(), lr=0.0)
    private = make(
        model, _of_norms(3.0), optimizer=optimizer, clipping="public:0.5", noise_multiplier=2.0
    )
    private.stepper(model)(_of_norms(5.0))
    assert optimizer.noise_std == pytest.approx(2.0 * 3.0 / BATCH)


def test_micro_batches_and_users_have_public_examples_beside(make):
    """… which are not clipped, as whatever is."""
    model = Given()
    given = {"clipping_unit": "microbatch", "microbatches": 2}
    private = make(model, _of_norms(3.0), max_grad_norm=1e-9, **given)
    private.stepper(model)(_of_norms(5.0))
    torch.testing.assert_close(model.weights.detach(), -_of_norms(3.0)[0])
    model, given = Given(), {"unit": "user", "examples_per_user": 2, "steps": 1}
    private = make(model, _of_norms(3.0), max_grad_norm=1e-9, num_examples=2, **given)
    step = private.stepper(model)
    for batch in private.loader(_of_norms(5.0, 6.0, 7.0), users=["a", "b", "a"]):
        step(batch)
    torch.testing.assert_close(model.weights.detach(), -_of_norms(3.0)[0])


# ---- what bounds it --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
@pytest.mark.parametrize("clipping", ["flat", "public:0.2", "public:0.9"])
def test_removing_a_private_example_moves_the_sum_by_the_bound_in_force_at_most(
    make, engine, clipping
):
    """At every scale of its gradient; and by no less, where that is larger than the bound."""
    public_ones, rest = _of_norms(0.02, 0.3, 4.0), _of_norms(0.1, 7.0)
    for norm in (1e-3, 0.3, 2.0, 1e6):
        sums = []
        for batch in (torch.cat((_of_norms(norm), rest)), rest):
            model = Given()
            private = make(model, public_ones, engine=engine, clipping=clipping, max_grad_norm=0.5)
            private.stepper(model)(batch)
            sums.append(private.gradients[model.weights])
        bound = private.max_grad_norm
        moved = float((sums[0] - sums[1]).norm())
        assert moved <= bound * (1 + 1e-5)
        assert moved == pytest.approx(min(norm, bound), rel=1e-3)
    quantiles = {"flat": 0.5, "public:0.2": 0.132, "public:0.9": 3.26}
    assert bound == pytest.approx(quantiles[clipping])


@pytest.mark.parametrize("norm", [0.05, 1.0, 40.0])
def test_the_noise_follows_the_bound_that_public_examples_tell(make, norm):
    """Its scale is noise multiplier x bound, whatever the plan began with: neither 2/3 nor 3/2."""
    model, size = Given(20_000), 20_000
    watched = Watched(model)
    private = make(
        model,
        torch.ones(4, size) / math.sqrt(size),
        losses_of=watched,
        clipping="public:0.5",
        noise_multiplier=1.5,
        max_grad_norm=0.7,
        steps=3,
    )
    step = private.stepper(model)
    for factor in (norm, 2 * norm, norm / 3):
        watched.factor = factor
        step(torch.zeros(2, size))
        assert private.max_grad_norm == pytest.approx(factor, rel=1e-3)
        draws = private.gradients[model.weights].numpy()
        assert stats.kstest(draws, "norm", args=(0, 1.5 * factor)).pvalue > 1e-6
        for wrong in (factor, 1.5**2 * factor):
            assert stats.kstest(draws, "norm", args=(0, wrong)).pvalue < 1e-12


def test_private_examples_do_not_move_the_bound(make):
    """At the same weights it is the same, to the last digit, whatever is private, and how much."""
    found = []
    for private_ones in (_texts(BATCH, 1), _texts(1, 3), _texts(2 * BATCH, 4)):
        torch.manual_seed(0)
        model = Tagger()
        rng = np.random.default_rng(3)
        private = make(
            model, _texts(9, 2), clipping="public:0.5", batch_size=4, rng=rng, lr=0.0, steps=4
        )
        step = private.stepper(lambda ids, model=model: 100 * model(ids))
        bounds = []
        for _ in range(4):
            step(private_ones)
            bounds.append(private.max_grad_norm)
        found.append(bounds)
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 4


def test_public_examples_are_computed_before_the_first_private_one(make):
    model, order = Given(), []

    def told(name):
        def losses_of(batch: Tensor) -> Tensor:
            order.append(name)
            return model(batch)

        return losses_of

    private = make(model, _of_norms(1.0), losses_of=told("public"), clipping="public:0.5", steps=2)
    step = private.stepper(told("private"))
    for batch in private.loader(_of_norms(*range(BATCH)), physical_batch_size=2):
        order.append("announced")
        step(batch)
    assert order[:2] == ["public", "announced"] and order.count("public") == 2
    second = order.index("public", 1)
    assert order[second - 1] == "private" and order[second + 1] == "announced"
    assert order[:second].count("announced") == 3


def test_the_bound_of_a_logical_batch_that_is_open_stays(make):
    """Even if weights are said to have changed: its noise is that of the bound it began with."""
    model = Given()
    watched = Watched(model)
    private = make(model, _of_norms(1.0), losses_of=watched, clipping="public:0.5", steps=1)
    step, bounds = private.stepper(model), []
    for batch in private.loader(_of_norms(*[9.0] * BATCH), physical_batch_size=2):
        step(batch)
        bounds.append(private.max_grad_norm)
        watched.factor = 50.0
        private.weights_changed()
    assert bounds == pytest.approx([1.0] * 3)
    assert float(private.gradients[model.weights].norm()) == pytest.approx(BATCH)


def test_a_bound_of_zero_is_none(make):
    model = Given()
    private = make(model, torch.zeros(2, 3), clipping="public:0.5", max_grad_norm=2.0)
    private.stepper(model)(_of_norms(1.0))
    assert private.max_grad_norm == pytest.approx(2e-6)


# ---- what it costs ---------------------------------------------------------------------------


def test_public_examples_cost_nothing_and_the_ledger_counts_private_releases(
    make, make_plan, tmp_path
):
    path, model = tmp_path / "ledger.jsonl", Given()
    given = {"noise_multiplier": 1.0, "num_examples": 8, "sample_rate": 0.5, "steps": 5}
    private = make(
        model, _of_norms(1.0, 4.0), clipping="public:0.5", batch_size=1, ledger=path, **given
    )
    step, bounds = private.stepper(model), []
    for batch in private.loader(_of_norms(*range(8))):
        step(batch)
        bounds.append(private.max_grad_norm)
    private.close()
    ledger = Ledger.read(path)
    assert len(ledger) == 5 and ledger.bound == bounds[-1]
    plain = make_plan(**given)
    assert [ledger._releases[n] for n in range(5)] == [plain.event_at(n) for n in range(5)]
    assert ledger.epsilon() == private.epsilon() == plain.epsilon()


# ---- what fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "public:0.5"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_public_gradients_that_are_not_finite_end_training_before_a_release(make, clipping, bad):
    model = Given()
    private = make(model, _of_norms(1.0, bad), clipping=clipping)
    with pytest.raises(PublicGradientError, match="finite gradients of public examples"):
        private.stepper(model)(_of_norms(1.0))
    assert not len(private.ledger) and not model.weights.any()


def test_training_goes_on_after_public_examples_that_could_not_be_computed(make):
    model, calls = Given(), []

    def losses_of(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        if len(calls) == 1:
            raise OSError("no such file")
        return model(batch)

    private = make(model, _of_norms(3.0), losses_of=losses_of, max_grad_norm=1e-9)
    step = private.stepper(model)
    with pytest.raises(OSError, match="no such file"):
        step(_of_norms(5.0))
    step(_of_norms(5.0))
    torch.testing.assert_close(model.weights.detach(), -_of_norms(3.0)[0])


def test_losses_that_were_computed_before_those_of_public_examples_are_refused(make):
    model = Given()
    private = make(model, _of_norms(3.0), steps=1)
    with pytest.raises(RuntimeError, match=r"hand the function .* to private\.stepper"):
        private.step(model(_of_norms(5.0)))
    for batch in private.loader(_of_norms(*range(BATCH))):
        private.step(model(batch))
    assert len(private.ledger) == 1


def test_losses_of_weights_that_have_changed_since_are_refused(make):
    """The stepper computes what public examples say of them, before its own losses."""
    model = Given()
    watched = Watched(model)
    private = make(model, _of_norms(3.0), losses_of=watched, steps=2, max_grad_norm=1e-9)
    step = private.stepper(model)
    for batch in private.loader(_of_norms(*range(BATCH))):
        watched.factor = 2.0
        private.weights_changed()
        step(batch)
        break
    torch.testing.assert_close(model.weights.detach(), -2 * _of_norms(3.0)[0])
    with pytest.raises(RuntimeError, match="computed before those of the public"):
        for batch in private.loader(_of_norms(*range(BATCH))):
            losses = model(batch)
            private.weights_changed()
            private.step(losses)
    assert len(private.ledger) == 1


def test_a_loader_of_logical_batches_has_them_beside(make):
    model = Given()
    private = make(model, _of_norms(3.0), clipping="public:0.5", steps=2, lr=1.0)
    step = private.stepper(model)
    for _ in range(2):
        for drawn in private.logical_loader(_of_norms(*[9.0] * BATCH), physical_batch_size=4):
            for batch in drawn:
                step(batch)
    torch.testing.assert_close(model.weights.detach(), -2 * _of_norms(3.0 + 3.0)[0])


class Checkpointed(nn.Module):
    """Word ids (B, T) -> losses (B,); activations are computed again in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        states = checkpoint(self.inner, self.words(ids), use_reentrant=False)
        return (states @ self.words.weight.T).square().sum((1, 2))


@pytest.mark.usefixtures("double")
def test_activations_may_be_computed_again_and_weights_be_used_twice(make):
    model, before = Checkpointed(), Checkpointed()
    before.load_state_dict(model.state_dict())
    private_ones, public_ones = _texts(BATCH, 1), _texts(5, 2)
    private = make(model, public_ones, clipping="public:0.4", lr=0.1)
    private.stepper(model)(private_ones)
    rows, beside = _rows(before, private_ones), _rows(before, public_ones)
    bound = float(beside.norm(dim=1).quantile(0.4))
    clipped = rows * (bound / rows.norm(dim=1)).clamp(max=1)[:, None]
    moved = _flat(before.parameters()) - _flat(model.parameters())
    expected = clipped.sum(0) / BATCH + beside.mean(0)
    torch.testing.assert_close(moved / 0.1, expected, rtol=1e-8, atol=1e-10)


def test_the_physical_batch_size_of_such_a_plan_is_found(make_plan):
    model = Given()
    plan = make_plan(clipping="public:0.5")
    found = physical_batch_size(model, plan, model, lambda size: torch.ones(size, 3))
    assert found >= 1


def test_public_examples_are_refused_where_they_are_none():
    losses_of = Given()
    with pytest.raises(ValueError, match="public examples to learn from"):
        PublicExamples(examples=[], losses_of=losses_of)
    for bad in (
        {"batch_size": 0},
        {"physical_batch_size": 0},
        {"weight": -1.0},
        {"weight": math.nan},
        {"weight": math.inf},
    ):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(bad))}`"):
            PublicExamples(examples=[1], losses_of=losses_of, **bad)


USERS = {"unit": "user", "examples_per_user": 2}
MICROBATCHES = {"clipping_unit": "microbatch", "microbatches": 2}


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"processes": 2}, "one process"),
        ({}, {"engine": "opacus"}, "counts forward passes"),
        (USERS | {"clipping": "public:0.5"}, {}, "clips a user"),
        (MICROBATCHES | {"clipping": "public:0.5"}, {}, "clips a microbatch"),
        ({}, {"weight": 0.0}, "weight > 0"),
    ],
)
def test_what_does_not_go_together_with_public_examples_is_refused(
    make_plan, changes, given, message
):
    public = PublicExamples(examples=[1], losses_of=Given(), weight=given.pop("weight", 1.0))
    given = {"engine": "book_keeping", "processes": 1} | given
    with pytest.raises(ValueError, match=message) as refused:
        check_public(public, make_plan(**changes), **given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "microbatch"])
def test_a_bound_from_public_examples_is_refused_without_any(make_plan, engine):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"Expected public examples for clipping='public:0\.5'"):
        privatize(model, optimizer, make_plan(clipping="public:0.5"), engine=engine)


def test_public_examples_may_tell_the_bound_alone(make):
    model = Given()
    private = make(model, _of_norms(3.0), weight=0.0, clipping="public:0.5")
    private.stepper(model)(_of_norms(5.0))
    torch.testing.assert_close(model.weights.detach(), -_of_norms(3 / BATCH)[0])


# ---- in programs and loops -------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_steps_have_them_beside(make, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def losses_of(batch: Tensor, model: nn.Module = model) -> Tensor:
            return 5 * (model(batch) - 1).square().sum(1)

        private = make(
            model, _of_norms(1.0, 2.0), losses_of=losses_of, clipping="public:0.5", lr=0.1, steps=3
        )
        step = private.compile(losses_of) if compiled else private.stepper(losses_of)
        loader = private.loader(
            _of_norms(*range(BATCH)), physical_batch_size=BATCH, fixed_size=True
        )
        for batch in loader:
            step(batch)
        found.append(torch.cat((_flat(model.parameters()), torch.tensor([private.max_grad_norm]))))
        private.close()
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


class InDictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Given()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["inputs"])


def _collated(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"inputs": torch.stack(rows)}


@pytest.fixture
def fitted(make_plan) -> Iterator[Any]:
    def fit_beside(plan):
        model = InDictionaries()
        public = PublicExamples(examples=_of_norms(3.0), losses_of=model, collate_fn=_collated)
        result = fit(
            model,
            _of_norms(*range(8)),
            loss=model,
            collate=_collated,
            recipe=Recipe(epochs=1, batch_size=4, learning_rate=0.1),
            plan=plan,
            compute=ComputeConfig(),
            randomness=Randomness(order=np.random.default_rng(0)),
            public=public,
        )
        return model, result

    return fit_beside


def test_the_training_loop_takes_them(fitted, make_plan):
    """Adam goes along the public gradient, and where that is zero after the noise."""
    plan = make_plan(noise_multiplier=1e-3, max_grad_norm=1e-6)
    model, result = fitted(plan)
    assert result.steps == 10 and result.epsilon == plan.epsilon()
    first, *others = model.inner.weights.tolist()
    total = 0.1 * sum(1 - done / 10 for done in range(10))
    assert others == pytest.approx([-total] * 2, rel=0.01)
    assert abs(first) < 0.9 * total


def test_the_training_loop_refuses_them_in_ordinary_training(fitted):
    with pytest.raises(ValueError, match="a finite ε, with public examples beside"):
        fitted(None)
