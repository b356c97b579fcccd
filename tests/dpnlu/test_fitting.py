"""The training loop: ordinary and private, interrupted and continued."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training import loop as fitting
from dpnlu.training.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from dpnlu.training.loop import ComputeConfig, FitResult, Randomness, Recipe, check_fit, fit

SIZE = 60
TRUE = torch.tensor([1.0, -2.0, 0.5])


def _data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SIZE, 3, generator=generator)
    return [{"x": row, "y": row @ TRUE} for row in inputs]


def _collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {field: torch.stack([one[field] for one in examples]) for field in ("x", "y")}


class _Interrupted(Exception):
    pass


def _plan(noise_multiplier: float = 0.5) -> PrivacyPlan:
    return PrivacyPlan(
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.0,
        sample_rate=0.2,
        steps=20,
        target_delta=1e-3,
        num_examples=SIZE,
    )


def _fit(
    model: nn.Module,
    *,
    plan: PrivacyPlan | None = None,
    recipe: Recipe | None = None,
    physical_batch_size: int = 64,
    stop_after: int | None = None,
    ledger: Ledger | Path | None = None,
    checkpoints: Checkpoints | None = None,
) -> FitResult:
    def told(done: int, total: int) -> None:
        if done == stop_after:
            raise _Interrupted

    return fit(
        model,
        _data(),
        loss=lambda batch: (model(batch["x"])[:, 0] - batch["y"]).square(),
        collate=_collate,
        recipe=recipe or Recipe(epochs=4, batch_size=12, learning_rate=0.05),
        plan=plan,
        compute=ComputeConfig(physical_batch_size=physical_batch_size),
        randomness=Randomness(
            order=np.random.default_rng(1), noise=torch.Generator().manual_seed(2)
        ),
        ledger=ledger,
        checkpoints=checkpoints,
        progress=told,
    )


def _model() -> nn.Linear:
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def test_ordinary_training_learns() -> None:
    model = _model()
    result = _fit(model, recipe=Recipe(epochs=60, batch_size=12, learning_rate=0.05))
    assert result.epsilon is None
    assert result.steps == 300
    torch.testing.assert_close(model.weight[0].detach(), TRUE, atol=0.05, rtol=0)


@pytest.mark.parametrize("plan", [None, _plan()], ids=["ordinary", "private"])
def test_physical_batches_of_any_size_give_the_same_model(plan: PrivacyPlan | None) -> None:
    models = [_model().double() for _ in range(2)]
    for model, size in zip(models, (5, 64), strict=True):
        fit(
            model,
            [{k: v.double() for k, v in one.items()} for one in _data()],
            loss=lambda batch, m=model: (m(batch["x"])[:, 0] - batch["y"]).square(),
            collate=_collate,
            recipe=Recipe(epochs=2, batch_size=12, learning_rate=0.05),
            plan=plan,
            compute=ComputeConfig(physical_batch_size=size),
            randomness=Randomness(
                order=np.random.default_rng(1), noise=torch.Generator().manual_seed(2)
            ),
        )
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-9, atol=1e-12)


def test_private_training_takes_the_planned_steps_and_reports_the_plans_epsilon() -> None:
    plan = _plan()
    result = _fit(_model(), plan=plan)
    assert result.steps == plan.steps
    assert result.epsilon == pytest.approx(plan.epsilon())
    assert result.left_out == 0


def test_the_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=2.0, warmup=0.25)
    rates = [recipe.rate_at(share) for share in (0, 0.125, 0.25, 0.625, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])
    assert Recipe(epochs=1, batch_size=1, learning_rate=2.0).rate_at(0) == 2.0


def test_a_private_training_goes_on_where_it_stopped_and_never_exceeds_its_budget(
    tmp_path: Path,
) -> None:
    plan, checkpoints = _plan(), Checkpoints(path=tmp_path / "c", every=4)
    path = tmp_path / "ledger.jsonl"
    model = _model()
    with pytest.raises(_Interrupted):
        _fit(model, plan=plan, ledger=path, checkpoints=checkpoints, stop_after=10)
    again = _model()
    optimizer = torch.optim.AdamW(again.parameters())
    assert load_checkpoint(checkpoints.path, again, optimizer) == 8
    result = _fit(_model(), plan=plan, ledger=Ledger.resume(path), checkpoints=checkpoints)
    assert result.steps == plan.steps == len(Ledger.read(path))
    assert result.epsilon == pytest.approx(plan.epsilon())


def test_a_checkpoint_without_the_ledger_of_its_releases_is_refused(tmp_path: Path) -> None:
    """What they spent would be forgotten."""
    plan, checkpoints = _plan(), Checkpoints(path=tmp_path / "c", every=4)
    with pytest.raises(_Interrupted):
        _fit(_model(), plan=plan, checkpoints=checkpoints, stop_after=10)
    with pytest.raises(CheckpointError, match="at least, got 0"):
        _fit(_model(), plan=plan, ledger=tmp_path / "new.jsonl", checkpoints=checkpoints)


def test_an_ordinary_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(path=tmp_path / "c", every=4)
    with pytest.raises(_Interrupted):
        _fit(_model(), checkpoints=checkpoints, stop_after=10)
    seen: list[int] = []
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    assert load_checkpoint(checkpoints.path, model, optimizer) == 8
    fit(
        model,
        _data(),
        loss=lambda batch: (model(batch["x"])[:, 0] - batch["y"]).square(),
        collate=_collate,
        recipe=Recipe(epochs=4, batch_size=12, learning_rate=0.05),
        plan=None,
        compute=ComputeConfig(),
        randomness=Randomness(order=np.random.default_rng(1)),
        checkpoints=checkpoints,
        progress=lambda done, total: seen.append(done),
    )
    assert seen == list(range(9, 21))


@pytest.mark.parametrize("plan", [None, _plan()], ids=["ordinary", "private"])
def test_the_first_step_is_saved_then_every_so_many_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: PrivacyPlan | None
) -> None:
    saved: list[int] = []

    def noted(path: Path, *_: object, steps: int, run: str) -> None:
        saved.append(steps)

    monkeypatch.setattr(fitting, "save_checkpoint", noted)
    _fit(_model(), plan=plan, checkpoints=Checkpoints(path=tmp_path / "c", every=7))
    assert saved == [1, 7, 14, 20]


def test_a_training_that_ends_with_empty_batches_is_saved_all_the_same(tmp_path: Path) -> None:
    """Nobody sees such batches, but their noise is in the weights."""
    plan = replace(_plan(), sample_rate=0.001, num_examples=SIZE)
    checkpoints = Checkpoints(path=tmp_path / "c", every=1000)
    model, again = _model(), _model()
    result = _fit(model, plan=plan, checkpoints=checkpoints)
    optimizer = torch.optim.AdamW(again.parameters())
    assert load_checkpoint(checkpoints.path, again, optimizer) == result.steps == plan.steps
    torch.testing.assert_close(again.weight, model.weight, rtol=0, atol=0)


def test_untrained_weights_are_no_result(tmp_path: Path) -> None:
    """The releases were made, and what they taught was never saved."""
    plan, checkpoints = _plan(), Checkpoints(path=tmp_path / "c", every=4)
    ledger = Ledger(plan)
    for step in range(plan.steps):
        ledger.append(plan.event_at(step))
    with pytest.raises(CheckpointError, match="train anew"):
        _fit(_model(), plan=plan, ledger=ledger, checkpoints=checkpoints)


def test_the_learning_rate_falls_to_zero_over_the_steps_that_are_left() -> None:
    """… where something costlier than planned was recorded."""
    plan, ledger = replace(_plan(1.0), steps=60), Ledger(replace(_plan(1.0), steps=60))
    ledger.append(plan.event_at(0, sampled=False))
    totals: set[int] = set()
    model = _model()
    fit(
        model,
        _data(),
        loss=lambda batch: (model(batch["x"])[:, 0] - batch["y"]).square(),
        collate=_collate,
        recipe=Recipe(epochs=4, batch_size=12, learning_rate=0.05),
        plan=plan,
        compute=ComputeConfig(),
        randomness=Randomness(order=np.random.default_rng(1)),
        ledger=ledger,
        progress=lambda done, total: totals.add(total),
    )
    assert totals == {len(ledger)} and 1 < len(ledger) < 60


NUMBERS = [
    {"epochs": 0},
    {"epochs": -1.0},
    {"epochs": float("nan")},
    {"epochs": float("inf")},
    {"batch_size": 0},
    {"batch_size": -8},
    {"learning_rate": 0.0},
    {"learning_rate": -0.1},
    {"learning_rate": float("nan")},
    {"learning_rate": float("inf")},
    {"weight_decay": -1.0},
    {"weight_decay": float("nan")},
    {"warmup": -0.1},
    {"warmup": 1.1},
    {"warmup": float("nan")},
]


@pytest.mark.parametrize("changed", NUMBERS, ids=str)
def test_a_recipe_with_a_number_out_of_range_is_refused(changed: dict[str, float]) -> None:
    good = {"epochs": 1, "batch_size": 8, "learning_rate": 0.1}
    (name,) = changed
    with pytest.raises(ValueError, match=name):
        Recipe(**good | changed)  # type: ignore[arg-type]


def test_a_checkpoint_restores_weights_and_optimizer(tmp_path: Path) -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    save_checkpoint(tmp_path / "c", model, optimizer, steps=3)
    other = _model()
    others = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert load_checkpoint(tmp_path / "c", other, others) == 3
    for one, two in ((model, optimizer), (other, others)):
        two.zero_grad()
        one(torch.ones(2, 3)).sum().backward()
        two.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=0, atol=0)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "c", nn.Linear(5, 1), optimizer, steps=1)
    with pytest.raises(CheckpointError, match="checkpoint of this model"):
        load_checkpoint(tmp_path / "c", model, optimizer)
    (tmp_path / "c").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="checkpoint of this model"):
        load_checkpoint(tmp_path / "c", model, optimizer)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    """Also if the model is of the same kind: its releases are in another ledger."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "c", model, optimizer, steps=1, run="one")
    assert load_checkpoint(tmp_path / "c", model, optimizer, run="one") == 1
    for other in ("two", ""):
        with pytest.raises(CheckpointError, match="another training"):
            load_checkpoint(tmp_path / "c", model, optimizer, run=other)


def test_checking_a_training_leaves_no_trace() -> None:
    model = _model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    check_fit(
        model,
        recipe=Recipe(epochs=1, batch_size=12, learning_rate=0.05),
        plan=_plan(),
        compute=ComputeConfig(),
    )
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model._forward_hooks and not model._forward_pre_hooks
