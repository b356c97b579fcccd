"""Our own training loop: with a plan it is private, without one ordinary, else the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpnlu.engines import ENGINES
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from dpnlu.training.cutting import WhoseExamples
from dpnlu.training.device import resolved_device, synchronize
from dpnlu.training.handle import privatize
from dpnlu.training.public import PublicExamples
from dpnlu.training.stopping import EarlyStopping

# Called after each step with the number of steps taken and of all steps.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, apart from privacy. Choosing it by looking at private data is not accounted.

    Attributes:
        epochs: expected number of times each example, or user, is visited.
        batch_size: examples, or users, per step: expected ones if private, exact ones otherwise.
        learning_rate: of AdamW, at its highest.
        weight_decay: of AdamW.
        warmup: share of the steps over which the learning rate rises from 0, before it falls to 0.
        patience: epochs of ordinary training without a lower validation loss after which it ends,
            with the weights of the lowest; None: it goes to the end.

    Raises:
        ValueError: a number is out of range.
    """

    epochs: float
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"Expected `{name}` to be finite and > 0, got {getattr(self, name)}."
                )
        if not (0 <= self.weight_decay < math.inf and 0 <= self.warmup <= 1):
            raise ValueError(
                "Expected `weight_decay` to be finite and >= 0 and `warmup` in [0, 1], got "
                f"{self.weight_decay} and {self.warmup}."
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"Expected `patience` >= 1 or None, got {self.patience}.")

    def rate_at(self, progress: float) -> float:
        """The learning rate at this share, in [0, 1], of all steps."""
        rise = progress / self.warmup if progress < self.warmup else 1.0
        fall = (1 - progress) / (1 - self.warmup) if progress > self.warmup else 1.0
        return self.learning_rate * rise * fall


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How to compute. Nothing here changes ε or the expected result.

    Attributes:
        engine: see `privatize`; None: what suits the plan.
        physical_batch_size: examples computed at once.
        device: where model and batches go: "cpu", "cuda", "cuda:N" or "mps"; "auto" becomes what
            there is, see `resolved_device`.
    """

    engine: str | None = None
    physical_batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.engine is not None and self.engine not in ENGINES:
            raise ValueError(
                f"Expected `engine` to be one of {', '.join(ENGINES)}, got {self.engine!r}."
            )
        if self.physical_batch_size < 1:
            raise ValueError(
                f"Expected `physical_batch_size` >= 1, got {self.physical_batch_size}."
            )
        object.__setattr__(self, "device", resolved_device(self.device))


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What training took.

    Attributes:
        steps: optimizer steps.
        seconds: wall time of the loop, loading included.
        epsilon: what the ledger says was spent; None for ordinary training.
        left_out: clipping units left out for not being finite.
    """

    steps: int
    seconds: float
    epsilon: float | None
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Randomness:
    """Where chance comes from.

    Attributes:
        order: coins of Poisson sampling, or the order of ordinary batches.
        noise: as in `privatize`; a generator is on the device of the model.
    """

    order: np.random.Generator
    noise: torch.Generator | Literal["system"] | None = None


def fit(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    loss: Callable[[Any], Tensor],
    collate: Callable[[list[Any]], Any],
    recipe: Recipe,
    plan: PrivacyPlan | None,
    compute: ComputeConfig,
    randomness: Randomness,
    users: WhoseExamples | None = None,
    ledger: Ledger | Path | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
    validation_loss: Callable[[], float] | None = None,
    public: PublicExamples | None = None,
) -> FitResult:
    """Train `model` on `examples`; it goes to the device of `compute`, and stays there.

    Args:
        loss: a collated batch -> (B,) per-example losses.
        plan: what private training must keep to; its batch size and steps take precedence over
            the recipe's. None: ordinary training.
        users: with a plan for users, whose the examples are; see `PrivateTraining.loader`.
        ledger: see `privatize`. One with releases is continued: the steps still planned are taken.
        checkpoints: where to save training on the way, and to continue from if a file is there.
        progress: told of every step.
        validation_loss: of the model as it is, which it may put into evaluation mode; needed where
            the recipe has patience.
        public: learnt from beside the private examples; see `privatize`.

    Raises:
        UnsupportedLayerError, ValueError: as `privatize` and `PrivateTraining.step`.
        CheckpointError: the checkpoint does not belong to this training, or to this ledger.
    """
    _check_private(public, plan)
    model.to(compute.device).train()
    optimizer = _optimizer(model, recipe)
    # The weights of the lowest validation loss are in no checkpoint: such a training begins anew.
    kept = None if recipe.patience is not None else checkpoints
    state = _State(model, optimizer, recipe, kept, progress)
    state.restore()
    started = time.perf_counter()
    stopping = _stopping(model, recipe, plan, validation_loss)
    if plan is None:
        steps = _fit_ordinarily(state, examples, loss, collate, compute, randomness, stopping)
        synchronize(compute.device)
        return FitResult(steps=steps, seconds=time.perf_counter() - started, epsilon=None)
    return _fit_privately(
        state, examples, loss, collate, plan, compute, randomness, users, ledger, public, started
    )


def check_fit(
    model: nn.Module,
    *,
    recipe: Recipe,
    plan: PrivacyPlan | None,
    compute: ComputeConfig,
    public: PublicExamples | None = None,
) -> None:
    """Whether `fit` could begin; nothing is trained and nothing written.

    Raises:
        UnsupportedLayerError, ValueError: as `privatize`.
    """
    _check_private(public, plan)
    optimizer = _optimizer(model.to(compute.device), recipe)
    if plan is not None:
        privatize(model, optimizer, plan, engine=compute.engine, public=public).close()


def _check_private(public: PublicExamples | None, plan: PrivacyPlan | None) -> None:
    if public is not None and plan is None:
        raise ValueError(
            "Expected a privacy plan, that is a finite ε, with public examples beside the private, "
            "got ordinary training: train on all of them alike."
        )


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


@dataclass
class _State:
    """What goes with the steps: the learning rate, checkpoints, progress.

    Attributes:
        saved: after how many steps the last checkpoint was saved; 0: there is none.
    """

    model: nn.Module
    optimizer: Optimizer
    recipe: Recipe
    checkpoints: Checkpoints | None
    progress: Progress | None
    saved: int = 0

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.checkpoints is not None and self.checkpoints.path.exists():
            self.saved = load_checkpoint(
                self.checkpoints.path, self.model, self.optimizer, run=self.checkpoints.run
            )

    def check_restored(self, made: int, total: int) -> None:
        """Whether the weights belong to a ledger with `made` of `total` releases."""
        if self.saved > made:
            raise CheckpointError(
                f"Expected a ledger with the {self.saved} releases of the checkpoint at least, got "
                f"{made}: what they spent would be forgotten; resume their ledger."
            )
        if self.checkpoints is not None and made == total and not self.saved:
            raise CheckpointError(
                f"Expected a checkpoint at {self.checkpoints.path}, found none: no release "
                f"is left after the {made} of the ledger, and what was learnt from them is lost; "
                "train anew, in another folder."
            )

    def begin(self, done: int, total: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(done / total)

    def finish(self, done: int, total: int) -> None:
        if self.checkpoints is not None and self.checkpoints.are_due(done, saved=self.saved):
            self.save(done)
        if self.progress is not None:
            self.progress(done, total)

    def save(self, done: int) -> None:
        if self.checkpoints is not None and done > self.saved:
            path, run = self.checkpoints.path, self.checkpoints.run
            save_checkpoint(path, self.model, self.optimizer, steps=done, run=run)
            self.saved = done


def _stopping(
    model: nn.Module,
    recipe: Recipe,
    plan: PrivacyPlan | None,
    validation_loss: Callable[[], float] | None,
) -> EarlyStopping | None:
    if recipe.patience is None:
        return None
    if plan is not None or validation_loss is None:
        raise ValueError(
            f"Expected patience in ordinary training with validation examples alone, got "
            f"{recipe.patience}: leave it out, or use data with a validation split."
        )
    return EarlyStopping(model, validation_loss, recipe.patience)


def _fit_privately(
    state: _State,
    examples: Sequence[Any],
    loss: Callable[[Any], Tensor],
    collate: Callable[[list[Any]], Any],
    plan: PrivacyPlan,
    compute: ComputeConfig,
    randomness: Randomness,
    users: WhoseExamples | None,
    ledger: Ledger | Path | None,
    public: PublicExamples | None,
    started: float,
) -> FitResult:
    with privatize(
        state.model,
        state.optimizer,
        plan,
        engine=compute.engine,
        ledger=ledger,
        noise=randomness.noise,
        sampling_rng=randomness.order,
        public=public and replace(public, losses_of=_on_device(public.losses_of, compute)),
    ) as private:
        made, total = len(private.ledger), len(private.ledger) + private.remaining_steps
        state.check_restored(made, total)
        step = private.stepper(_on_device(loss, compute))
        for batch in private.loader(
            examples,
            collate_fn=collate,
            users=users,
            physical_batch_size=compute.physical_batch_size,
        ):
            state.begin(len(private.ledger), total)
            if step(batch):
                state.finish(len(private.ledger), total)
        state.save(len(private.ledger))  # the last steps may have been empty
        synchronize(compute.device)
        seconds = time.perf_counter() - started
        return FitResult(
            steps=len(private.ledger),
            seconds=seconds,
            epsilon=private.epsilon(),
            left_out=private.non_finite_units,
        )


def _fit_ordinarily(
    state: _State,
    examples: Sequence[Any],
    loss: Callable[[Any], Tensor],
    collate: Callable[[list[Any]], Any],
    compute: ComputeConfig,
    randomness: Randomness,
    stopping: EarlyStopping | None,
) -> int:
    """Shuffled batches, the gradient accumulated over physical batches; returns the steps taken."""
    per_epoch = len(examples) / state.recipe.batch_size
    total = done = max(1, round(state.recipe.epochs * per_epoch))
    ids_of_step = _shuffled(len(examples), state.recipe.batch_size, randomness)
    for step in range(state.saved, total):
        ids = next(ids_of_step)
        state.begin(step, total)
        for start in range(0, len(ids), compute.physical_batch_size):
            chosen = ids[start : start + compute.physical_batch_size]
            batch = _moved(collate([examples[index] for index in chosen]), compute.device)
            (loss(batch).sum() / len(ids)).backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.finish(step + 1, total)
        if stopping is None or (step + 1) % max(1, int(per_epoch)):
            continue
        if stopping.ends_here():
            done = step + 1
            break
        state.model.train()
    if stopping is not None:
        stopping.restore()
    state.save(done)
    return done


def _shuffled(size: int, batch: int, randomness: Randomness) -> Iterator[list[int]]:
    """Endless batches of ids; every example once, then all of them anew."""
    batch = min(batch, size)
    while True:
        order = randomness.order.permutation(size)
        for start in range(0, size - batch + 1, batch):
            yield order[start : start + batch].tolist()


def _on_device(loss: Callable[[Any], Tensor], compute: ComputeConfig) -> Callable[[Any], Tensor]:
    """The loss of batches that are moved to where the model is."""
    return lambda batch: loss(_moved(batch, compute.device))


def _moved(batch: Any, device: str) -> Any:
    """A batch, a dictionary of tensors, on the device."""
    return {field: values.to(device) for field, values in batch.items()}
