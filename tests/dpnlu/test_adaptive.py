"""A bound that follows a quantile: its course, its noise, its record."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpnlu.mechanism.ledger import Ledger, LedgerError
from dpnlu.training.agreement import check_processes
from dpnlu.training.handle import privatize

pytestmark = [
    pytest.mark.usefixtures("unsampled"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
ADAPTIVE = {"clipping": "quantile:0.3:0.5:0.25", "max_grad_norm": 2.0}


class Scaled(nn.Module):
    """The gradient of an example is the example."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.weights).sum(1)


@pytest.fixture
def make(make_plan):
    def privatized(model=None, *, ledger=None, engine=None, **fields):
        model = model or Scaled()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        plan = make_plan(**ADAPTIVE | fields)
        noise = torch.Generator().manual_seed(7)
        rng = np.random.default_rng(1)
        options = {"ledger": ledger, "engine": engine, "noise": noise, "sampling_rng": rng}
        return model, privatize(model, optimizer, plan, **options)

    return privatized


def _of_norms(*norms: float) -> Tensor:
    return torch.tensor(norms)[:, None] * torch.tensor([0.0, 0.6, 0.8])


@pytest.mark.parametrize("engine", ["book_keeping", "per_example", "opacus"])
def test_the_bound_follows_the_share_of_the_unclipped(make, engine):
    """C exp(-rate (b - quantile)), b of the expected batch size, 4: without noise, exactly."""
    if engine == "opacus":
        pytest.importorskip("opacus")
        model = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(model.weight)
        forward = lambda inputs: model(inputs)[:, 0]  # noqa: E731
    else:
        model = Scaled()
        forward = model
    _, private = make(model, noise_multiplier=0.0, engine=engine)
    step, bound = private.stepper(forward), 2.0
    for norms in [(1.0, 1.5, 1.9, 3.0), (50.0, 60.0), (0.1,), (1.0,) * 12]:
        assert private.max_grad_norm == pytest.approx(bound)
        step(_of_norms(*norms))
        clipped = sum(min(norm, bound) for norm in norms)
        assert float(next(iter(private.gradients.values())).norm()) == pytest.approx(clipped)
        unclipped = sum(norm <= bound for norm in norms)
        share = (unclipped - len(norms) / 2) / 4 + 0.5
        bound *= math.exp(-0.5 * (min(max(share, 0), 1) - 0.3))
    assert private.max_grad_norm == pytest.approx(bound)


def test_a_batch_without_examples_counts_half(make):
    _, private = make(noise_multiplier=0.0, sample_rate=1e-9, steps=2)
    assert list(private.loader(torch.ones(8, 3))) == []
    assert private.max_grad_norm == pytest.approx(2 * math.exp(-0.5 * 0.2) ** 2)


def test_fillers_do_not_count(make):
    found = []
    for fixed in (False, True):
        model, private = make(noise_multiplier=0.0, steps=4)
        for batch in private.loader(
            _of_norms(*range(1, 9)), physical_batch_size=3, fixed_size=fixed
        ):
            private.step(model(batch))
        found.append(private.max_grad_norm)
    assert found[0] == pytest.approx(found[1]) != pytest.approx(2.0)


def test_the_noise_of_the_sum_follows_the_bound(make):
    """… and is 1 / sqrt(1 - budget) times that of a rule without a count."""
    model, private = make(Scaled(20_000), noise_multiplier=3.0, steps=4)
    bounds, measured = [], []
    for _ in range(4):
        bounds.append(private.max_grad_norm)
        private.step(0 * model(torch.ones(2, 20_000)))
        measured.append(float(next(iter(private.gradients.values())).std()))
    assert len(set(bounds)) == 4
    assert measured == pytest.approx([3 * b / math.sqrt(0.75) for b in bounds], rel=0.03)


def test_the_count_has_the_noise_of_its_budget(make):
    """Of 2 σ_b = z / sqrt(budget), by which z⁻² = z_Δ⁻² + (2 σ_b)⁻²."""
    z, steps = 0.4, 500
    model, private = make(noise_multiplier=z, steps=steps, num_examples=20, sample_rate=0.5)
    shares, before = [], 2.0
    for _ in range(steps):
        private.step(0 * model(torch.ones(2, 3)))
        shares.append(0.3 - math.log(private.max_grad_norm / before) / 0.5)
        before = private.max_grad_norm
        private.steps.mechanism.clipper.bound = before = 2.0
    noise = (np.array(shares) - 0.5) * 10 - 1
    std = 0.5 * z / math.sqrt(0.25)
    assert abs(noise.mean()) < 5 * std / math.sqrt(steps)
    assert noise.std() == pytest.approx(std, rel=0.15)
    z_sum = private.plan.noise_std_at(0) / private.plan.sensitivity
    assert (z_sum**-2 + (2 * std) ** -2) ** -0.5 == pytest.approx(z)


def test_the_ledger_holds_what_epsilon_needs_and_the_bound(make, make_plan, tmp_path):
    """ε is that of the plan, whose noise multiplier is that of sum and count together; a resumed
    training goes on with the bound that was released."""
    path = tmp_path / "ledger.jsonl"
    model, private = make(ledger=path, steps=6)
    bounds = []
    for _ in range(3):
        private.step(model(_of_norms(1.0, 5.0)))
        bounds.append(private.max_grad_norm)
    private.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [line["bound"] for line in lines] == bounds
    assert [line["noise_multiplier"] for line in lines] == [1.0] * 3
    events = [make_plan().event_at(step, sampled=False) for step in range(3)]
    assert [Ledger.read(path)._releases[step] for step in range(3)] == events
    _, again = make(model, ledger=Ledger.resume(path), steps=6)
    assert again.max_grad_norm == bounds[-1] != 2.0
    again.close()


def test_a_torn_line_leaves_the_bound_before_it(make, tmp_path):
    path = tmp_path / "ledger.jsonl"
    model, private = make(ledger=path, steps=6)
    private.step(model(_of_norms(1.0, 5.0)))
    bound = private.max_grad_norm
    private.step(model(_of_norms(1.0, 5.0)))
    private.close()
    path.write_bytes(path.read_bytes()[:-9])
    with Ledger.resume(path) as ledger:
        assert len(ledger) == 2 and ledger.bound == bound
    copied = Ledger.copied(Ledger.read(path).content())
    assert copied.bound == bound and len(copied) == 2


@pytest.mark.parametrize("bound", ["0", "-1", "NaN", '"1"'])
def test_a_bound_that_is_none_is_refused(make, tmp_path, bound):
    path = tmp_path / "ledger.jsonl"
    model, private = make(ledger=path)
    private.step(model(_of_norms(1.0, 5.0)))
    private.close()
    path.write_text(
        path.read_text().replace(f'"bound": {private.max_grad_norm}', f'"bound": {bound}')
    )
    with pytest.raises(LedgerError, match="line 2"):
        Ledger.read(path)


def test_epsilon_does_not_depend_on_the_rule(make_plan):
    listed = {"clipping": "groups", "clipping_groups": (("weights",),)}
    plans = [
        make_plan(),
        make_plan(**ADAPTIVE),
        make_plan(clipping="per_layer"),
        make_plan(**listed),
    ]
    assert len({plan.epsilon() for plan in plans}) == 1


@pytest.mark.parametrize(("microbatches", "count"), [(1, 2), (3, 2), (4, 3)])
def test_micro_batches_that_do_not_fit_the_processes_are_told(make_plan, microbatches, count):
    plan = make_plan(clipping_unit="microbatch", microbatches=microbatches)
    with pytest.warns(UserWarning, match=f"each of {count} processes, got {microbatches}"):
        check_processes(count, plan)
    check_processes(1, plan)
    check_processes(microbatches, plan)
