"""Early stopping: when the validation loss no longer falls, and with the weights of its lowest."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.checkpoint import Checkpoints
from dpnlu.training.loop import ComputeConfig, FitResult, Randomness, Recipe, fit
from dpnlu.training.stopping import EarlyStopping

SIZE, BATCH = 20, 5


def _examples() -> list[dict[str, Tensor]]:
    inputs = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "y": row.sum()} for row in inputs]


def _collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {field: torch.stack([one[field] for one in examples]) for field in ("x", "y")}


def _fit(model: nn.Module, losses: Iterator[float] | None, **changes: object) -> FitResult:
    fields = {"epochs": 10, "batch_size": BATCH, "learning_rate": 0.01, "patience": 2}
    plan, checkpoints = changes.pop("plan", None), changes.pop("checkpoints", None)
    return fit(
        model,
        _examples(),
        loss=lambda batch: (model(batch["x"])[:, 0] - batch["y"]) ** 2,
        collate=_collate,
        recipe=Recipe(**fields | changes),
        plan=plan,
        checkpoints=checkpoints,
        compute=ComputeConfig(),
        randomness=Randomness(order=np.random.default_rng(0)),
        validation_loss=None if losses is None else lambda: next(losses),
    )


@pytest.mark.parametrize(
    ("losses", "epochs", "best"),
    [
        ([3.0, 2.0, 2.5, 2.0, 1.0], 4, 2),  # as low as before is not lower
        ([3.0, 4.0, 2.0, 2.5, 2.6], 5, 3),
        ([math.nan, 2.0, math.nan, math.nan], 4, 2),
        ([math.nan, math.inf], 2, None),
        ([*range(10, 0, -1)], 10, 10),
    ],
)
def test_it_ends_after_as_many_epochs_in_vain_and_goes_back_to_the_best(
    losses: list[float], epochs: int, best: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    weights: list[Tensor] = []

    def told() -> Iterator[float]:
        for loss in losses:
            weights.append(model.weight.detach().clone())
            yield float(loss)

    result = _fit(model, told())
    assert result.steps == epochs * SIZE // BATCH
    assert len(weights) == epochs
    torch.testing.assert_close(model.weight.detach(), weights[(best or epochs) - 1])


def test_an_interrupted_training_begins_anew(tmp_path: Path) -> None:
    """The weights of the lowest loss, which may be of an epoch before it was interrupted, are in no
    checkpoint."""
    losses = [1.0, 2.0, 3.0]
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    initial = copy.deepcopy(model.state_dict())
    _fit(model, iter(losses))
    expected = model.weight.detach().clone()

    def interrupted() -> Iterator[float]:
        yield losses[0]
        raise KeyboardInterrupt

    kept = Checkpoints(path=tmp_path / "checkpoint.pt", every=1)
    model.load_state_dict(initial)
    with pytest.raises(KeyboardInterrupt):
        _fit(model, interrupted(), checkpoints=kept)
    model.load_state_dict(initial)
    assert _fit(model, iter(losses), checkpoints=kept).steps == len(losses) * SIZE // BATCH
    torch.testing.assert_close(model.weight.detach(), expected)


def test_training_goes_on_in_training_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    modes = []

    def loss() -> float:
        modes.append(model.training)
        model.eval()
        return 1.0 / len(modes)

    state = iter(lambda: loss(), None)
    _fit(model, state, epochs=3)
    assert modes == [True] * 3


def test_without_patience_nothing_is_asked() -> None:
    def never() -> Iterator[float]:
        raise AssertionError("validation was read")
        yield 0.0

    result = _fit(nn.Linear(3, 1), never(), patience=None)
    assert result.steps == 10 * SIZE // BATCH


def test_it_is_refused_where_epsilon_would_not_cover_it() -> None:
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.25,
        steps=4,
        target_delta=1e-3,
        num_examples=SIZE,
    )
    with pytest.raises(ValueError, match="ordinary training with validation examples"):
        _fit(nn.Linear(3, 1), iter([1.0] * 9), plan=plan)
    with pytest.raises(ValueError, match="ordinary training with validation examples"):
        _fit(nn.Linear(3, 1), None)
    with pytest.raises(ValueError, match="`patience` >= 1"):
        Recipe(epochs=1, batch_size=1, learning_rate=1, patience=0)


def test_the_best_weights_are_copies() -> None:
    model = nn.Linear(2, 1)
    stopping = EarlyStopping(model, lambda: 1.0, 5)
    assert not stopping.ends_here()
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(9.0)
    stopping.restore()
    assert torch.equal(model.weight, before)
