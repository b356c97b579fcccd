"""A private Lightning trainer takes the plain loop's steps, shows nothing, and forgets nothing."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import dpnlu
from dpnlu.integrations.losses import sequence_losses
from dpnlu.integrations.records import ResumeError
from dpnlu.mechanism.ledger import Ledger, LedgerError
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import flat, plan, weights

pytest.importorskip("lightning", reason="needs the extra `lightning`")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)

from dpnlu.integrations.lightning import privatize_trainer

NOISY = plan(noise_multiplier=1.0)
# What Lightning says of small data and few processors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Subject(LightningModule):
    """A module as people write it, but for losses that are not reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.model = subjects.model()
        self.rates: list[float] = []

    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        words = {name: value for name, value in batch.items() if name != "labels"}
        return sequence_losses(self.model(**words).logits, batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        losses = self._losses(batch)
        self.log("train_loss", losses.mean())
        return losses

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._losses(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def _loader(count: int = 12, **changes: Any) -> DataLoader[Any]:
    fields = {"batch_size": 6, "collate_fn": subjects.collate, "shuffle": True}
    return DataLoader(subjects.examples(count), **fields | changes)  # type: ignore[arg-type]


def _trainer(folder: Path, **changes: Any) -> Trainer:
    fields: dict[str, Any] = {
        "max_steps": 5,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**fields | changes)


def _private(folder: Path, *, named: dict[str, Any] | None = None, **chosen: Any) -> Any:
    """A private trainer whose samples are always the same."""
    if "target_epsilon" not in chosen:
        chosen.setdefault("plan", plan())
    chosen.setdefault("physical_batch_size", 3)
    chosen.setdefault("verify", False)
    chosen.setdefault("sampling_rng", np.random.default_rng(0))
    return privatize_trainer(_trainer(folder, **named or {}), **chosen)


@pytest.fixture
def plain() -> Iterator[Tensor]:
    """Weights after the five steps of a plain private loop."""
    module = Subject().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    rng = np.random.default_rng(0)
    with dpnlu.privatize(module, optimizer, plan(), sampling_rng=rng) as private:
        step = private.stepper(module._losses)
        # Samples are drawn pass by pass there, but in the same order.
        for batch in private.loader(
            subjects.examples(12), collate_fn=subjects.collate, physical_batch_size=3
        ):
            step(batch)
    yield weights(module)


# ---- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_five_steps_are_those_of_the_plain_loop(
    tmp_path: Path, plain: Tensor, verify: bool
) -> None:
    module, trainer = Subject(), _private(tmp_path, verify=verify)
    trainer.fit(module, _loader())
    assert torch.allclose(weights(module), plain, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(plain, weights(Subject()), atol=1e-3)
    assert trainer.global_step == trainer.private.steps_taken == 5
    assert type(module) is Subject and all(p.grad is None for p in module.parameters())


def test_epochs_are_planned_as_the_trainer_counts_them(tmp_path: Path) -> None:
    trainer = _private(
        tmp_path, target_epsilon=4.0, target_delta=1e-3, named={"max_steps": -1, "max_epochs": 3}
    )
    trainer.fit(Subject(), _loader())
    assert trainer.private.plan.steps == trainer.global_step == 6
    assert trainer.private.plan.expected_batch_size == 6
    assert 3.5 < trainer.private.epsilon() <= 4.0
    assert trainer.callback_metrics["epsilon"] == pytest.approx(trainer.private.epsilon())


MECHANISMS = subjects.mechanisms("model.")


@pytest.mark.parametrize(
    ("name", "epsilon"), [*((name, math.inf) for name in MECHANISMS), ("schedule", 4), ("both", 4)]
)
def test_every_rule_and_schedule_trains_as_in_the_plain_loop(
    tmp_path: Path, name: str, epsilon: float
) -> None:
    """… without noise, or with the same one; and the plan is the one of the target."""
    asked = subjects.budget(epsilon, **MECHANISMS[name])
    expected, module = subjects.planned_for(asked), Subject()
    optimizer = module.configure_optimizers()
    found = subjects.plainly_trained(module, module._losses, optimizer, expected)
    module = Subject()
    trainer = _private(tmp_path, noise=subjects.seeded(), **asked)
    trainer.fit(module, _loader())
    assert trainer.private.plan == expected and expected.sensitivity == 0.5
    assert torch.allclose(weights(module), found, rtol=1e-5, atol=1e-6)


class Corrected(Subject):
    def configure_optimizers(self) -> Any:
        return dpnlu.AdamBC(self.parameters(), lr=0.05)


def test_adam_with_the_noise_corrected_steps_as_in_the_plain_loop(tmp_path: Path) -> None:
    module, asked = Corrected(), subjects.budget(4.0, noise_schedule="list:1,0.25")
    optimizer, expected = module.configure_optimizers(), subjects.planned_for(asked)
    found = subjects.plainly_trained(module, module._losses, optimizer, expected)
    module = Corrected()
    _private(tmp_path, noise=subjects.seeded(), **asked).fit(module, _loader())
    assert torch.allclose(weights(module), found, rtol=1e-5, atol=1e-6)


class Scheduled(Subject):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


def test_schedulers_count_steps(tmp_path: Path) -> None:
    module = Scheduled()
    _private(tmp_path).fit(module, _loader())
    assert module.rates == [0.5 / 2**step for step in range(5)]


def test_a_dictionary_with_losses_will_do(tmp_path: Path, plain: Tensor) -> None:
    class Named(Subject):
        def training_step(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
            return {"loss": self._losses(batch)}

    module = Named()
    _private(tmp_path).fit(module, _loader())
    assert torch.allclose(weights(module), plain, rtol=1e-5, atol=1e-7)


def test_hooks_that_move_batches_see_physical_ones(tmp_path: Path, plain: Tensor) -> None:
    sizes = []

    class Moving(Subject):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            sizes.append(len(batch["labels"]))
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            sizes.append(len(batch["labels"]))
            return batch

    module = Moving()
    _private(tmp_path).fit(module, _loader())
    assert set(sizes) <= {1, 2, 3} and len(sizes) >= 10
    assert torch.allclose(weights(module), plain, rtol=1e-5, atol=1e-7)


def test_one_example_moves_a_step_by_no_more_than_the_bound(tmp_path: Path) -> None:
    """… however long it is, and the others as they were."""
    found = []
    for count in (12, 11):
        whole = plan(sample_rate=1.0, steps=1, num_examples=count, max_grad_norm=0.3)
        trainer = _private(tmp_path / str(count), plan=whole, named={"max_steps": 1})
        trainer.fit(
            Subject(), DataLoader(subjects.examples(12)[:count], 6, collate_fn=subjects.collate)
        )  # type: ignore[arg-type]
        found.append(flat(trainer.private.gradients))
    moved = float((found[0] - found[1]).norm())
    assert 0.05 < moved <= 0.3 * (1 + 1e-5)


def test_noise_is_as_planned(tmp_path: Path) -> None:
    noisy = plan(noise_multiplier=2.0, sample_rate=1e-9, steps=5)
    draws = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            draws.append(flat(trainer.private.gradients))

    _private(tmp_path, plan=noisy, named={"callbacks": [Watch()]}).fit(Subject(), _loader())
    flat_draws = torch.cat(draws)
    wanted, count = noisy.noise_std_at(0), len(flat_draws)
    assert len(draws) == 5
    assert float(flat_draws.std()) == pytest.approx(wanted, rel=6 / math.sqrt(2 * count))


# ---- what is seen ----------------------------------------------------------------------------


@pytest.mark.parametrize("log_private", [False, True])
def test_what_the_module_logs_in_training_is_seen_only_if_asked_for(
    tmp_path: Path, log_private: bool
) -> None:
    trainer = _private(tmp_path, log_private=log_private, verify=True)
    trainer.fit(Subject(), _loader(), _loader(shuffle=False))
    assert ("train_loss" in trainer.callback_metrics) == log_private
    assert {"epsilon", "val_loss"} <= trainer.callback_metrics.keys()


# ---- interruptions ---------------------------------------------------------------------------


class Interrupted(Exception):
    """In the place of a process that ends."""


class Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


def _saving(folder: Path, **changes: Any) -> dict[str, Any]:
    saving = ModelCheckpoint(folder / "saved", "last", every_n_train_steps=2, save_top_k=1)
    return {"callbacks": [saving, *changes.get("also", [])], "enable_checkpointing": True}


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A folder with the checkpoint of the second step; the third is lost."""
    named = _saving(tmp_path, also=[Interrupt(3)])
    trainer = _private(tmp_path, plan=NOISY, named=named)
    with pytest.raises(Interrupted):
        trainer.fit(Subject(), _loader())
    assert trainer.private.training is None
    return tmp_path


CHECKPOINT, LEDGER = "saved/last.ckpt", "_private/ledger.jsonl"


def test_what_was_lost_stays_spent(interrupted: Path) -> None:
    module = Subject()
    trainer = _private(interrupted, plan=NOISY, resume=True)
    trainer.fit(module, _loader(), ckpt_path=interrupted / CHECKPOINT)
    assert trainer.private.steps_taken == 2 and trainer.global_step == 4
    assert len(Ledger.read(interrupted / LEDGER)) == 5
    assert trainer.private.epsilon() == NOISY.epsilon()


def test_without_a_checkpoint_what_is_left_is_done(interrupted: Path) -> None:
    trainer = _private(interrupted, plan=NOISY, resume=True)
    trainer.fit(Subject(), _loader())
    assert trainer.private.steps_taken == 2
    assert len(Ledger.read(interrupted / LEDGER)) == 5


def test_a_ledger_is_not_begun_twice(interrupted: Path) -> None:
    with pytest.raises(LedgerError, match="found a ledger"):
        _private(interrupted, plan=NOISY).fit(Subject(), _loader())


def test_a_shorter_ledger_is_refused(interrupted: Path) -> None:
    path = interrupted / LEDGER
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    trainer = _private(interrupted, plan=NOISY, resume=True)
    with pytest.raises(ResumeError, match="with the 2 releases"):
        trainer.fit(Subject(), _loader(), ckpt_path=interrupted / CHECKPOINT)


def test_another_ledger_is_refused(interrupted: Path, tmp_path: Path) -> None:
    trainer = _private(tmp_path / "other", plan=NOISY)
    with pytest.raises(ResumeError, match="that of another"):
        trainer.fit(Subject(), _loader(), ckpt_path=interrupted / CHECKPOINT)


def test_a_checkpoint_without_privacy_is_refused(tmp_path: Path) -> None:
    class Averaged(Subject):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return self._losses(batch).mean()

    ordinary = _trainer(tmp_path, **_saving(tmp_path))
    ordinary.fit(Averaged(), _loader())
    trainer = _private(tmp_path, plan=NOISY)
    with pytest.raises(ResumeError, match="of a private training"):
        trainer.fit(Subject(), _loader(), ckpt_path=tmp_path / CHECKPOINT)


def test_a_rule_is_kept_and_no_other_is_resumed(tmp_path: Path) -> None:
    """… and the bound goes on from where it was."""
    asked = subjects.budget(4.0, clipping="quantile:0.3:2", noise_schedule="list:1,0.5")
    first = _private(tmp_path, named=_saving(tmp_path, also=[Interrupt(3)]), **asked)
    with pytest.raises(Interrupted):
        first.fit(Subject(), _loader())
    bound = first.private.ledger.bound
    for other in ({"clipping": "flat"}, {"noise_schedule": "constant"}):
        with pytest.raises(LedgerError, match="plan of this training"):
            trainer = _private(tmp_path, resume=True, **asked | other)
            trainer.fit(Subject(), _loader(), ckpt_path=tmp_path / CHECKPOINT)
    bounds = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            bounds.append(trainer.private.training.max_grad_norm)

    trainer = _private(tmp_path, resume=True, named={"callbacks": [Watch()]}, **asked)
    trainer.fit(Subject(), _loader(), ckpt_path=tmp_path / CHECKPOINT)
    assert trainer.private.plan == first.private.plan
    assert bounds[0] == bound != 0.5 and len(set(bounds)) == 2
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=False)["dpnlu"]["plan"]
    assert saved["clipping"] == "quantile:0.3:2" and saved["noise_schedule"] == "list:1,0.5"


def test_other_data_are_refused(interrupted: Path) -> None:
    trainer = _private(interrupted, plan=NOISY, resume=True)
    data = list(reversed(subjects.examples(12)))
    loader: Any = DataLoader(data, 6, collate_fn=subjects.collate)  # type: ignore[arg-type]
    with pytest.raises(ResumeError, match="got others, or in another order"):
        trainer.fit(Subject(), loader, ckpt_path=interrupted / CHECKPOINT)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"clipping": "best"}, "`clipping` to be one of"),
        ({"clipping": "groups"}, "`clipping_groups` exactly together with"),
        ({"clipping_groups": [["model"]]}, "`clipping_groups` exactly together with"),
        ({"noise_schedule": "falling"}, "Expected"),
        ({"plan": plan(), "clipping": "automatic"}, "with this `clipping`, got one with another"),
        ({"plan": plan(), "noise_schedule": "step:0.5:1"}, "with this `noise_schedule`"),
        ({"plan": plan(), "max_grad_norm": 2.0}, "with this `max_grad_norm`"),
    ],
)
def test_a_mechanism_that_is_none_is_refused_at_once(
    tmp_path: Path, chosen: dict[str, Any], message: str
) -> None:
    target = {} if "plan" in chosen else {"target_epsilon": 3.0}
    with pytest.raises(ValueError, match=message) as raised:
        privatize_trainer(_trainer(tmp_path), **target | chosen)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 2, "strategy": "ddp"}, "on one device"),
        ({"strategy": "ddp"}, "on one device"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=1"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "accumulate_grad_batches=1"),
        ({"gradient_clip_val": 1.0}, "no gradient_clip_val"),
        ({"precision": "16-true"}, "use bf16-mixed"),
        ({"limit_train_batches": 0.5}, "whole passes"),
        ({"limit_train_batches": 1}, "whole passes"),
        ({"overfit_batches": 1}, "whole passes"),
        ({"fast_dev_run": True}, "whole passes"),
    ],
)
def test_a_trainer_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        _private(tmp_path, named=changes)
    assert "\n" not in str(raised.value)


def test_a_trainer_is_made_private_once_and_by_one_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one that is already"):
        privatize_trainer(_private(tmp_path), target_epsilon=1.0)
    with pytest.raises(ValueError, match="got both"):
        privatize_trainer(_trainer(tmp_path), target_epsilon=1.0, plan=plan())
    with pytest.raises(ValueError, match="got neither"):
        privatize_trainer(_trainer(tmp_path))
    with pytest.raises(ValueError, match="the trainer's 4 steps, got one for 5"):
        _private(tmp_path, named={"max_steps": 4}).fit(Subject(), _loader())
    endless = {"max_steps": -1, "max_epochs": -1}
    with pytest.raises(ValueError, match="without an end"):
        _private(tmp_path, target_epsilon=1.0, named=endless).fit(Subject(), _loader())
    with pytest.raises(ValueError, match="at most the 12 training examples, got 20"):
        _private(tmp_path, target_epsilon=1.0).fit(Subject(), _loader(batch_size=20))


class Mean(Subject):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self._losses(batch).mean()


class Manual(Subject):
    automatic_optimization = False


class Backward(Subject):
    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()


class Fetching(Subject):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return self._losses(next(dataloader_iter)[0])


class Two(Subject):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.5) for _ in range(2)]


class Searching(Subject):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Plateau(Subject):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"},
        }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Mean, r"one loss per example, shape \(B,\)"),
        (Manual, "with automatic optimization"),
        (Backward, "the backward of Lightning"),
        (Fetching, "one that takes dataloader_iter"),
        (Two, "one optimizer, got 2|manual optimization"),
        (Searching, "LBFGS"),
        (Plateau, "ReduceLROnPlateau"),
    ],
)
def test_a_module_is_refused(tmp_path: Path, kind: type[Subject], message: str) -> None:
    module = kind()
    before = weights(module).clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        _private(tmp_path).fit(module, _loader())
    assert type(module) is kind and torch.equal(weights(module), before)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(subjects.examples(12))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (None, "one loader"),
        ([_loader(), _loader()], "one loader"),
        (DataLoader(Stream(), batch_size=6), "cannot be drawn from a stream"),
        (subjects.examples(12), "one loader"),
        (DataLoader(subjects.examples(12), batch_size=None), "with a batch_size"),  # type: ignore[arg-type]
        (_loader(13), "Expected the 12 examples of the plan"),
    ],
)
def test_a_loader_is_refused(tmp_path: Path, loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _private(tmp_path).fit(Subject(), loader)


@pytest.mark.parametrize(
    "callback", [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")]
)
def test_choosing_by_scores_is_warned_of(tmp_path: Path, callback: Callback) -> None:
    with pytest.warns(UserWarning, match="up to K times as much"):
        _private(tmp_path, named={"callbacks": [callback], "enable_checkpointing": True})


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LightningModule, "_on_before_batch_transfer"),
        (LightningModule, "_apply_batch_transfer_handler"),
        (LightningModule, "optimizer_zero_grad"),
        (LightningModule, "backward"),
        (LightningModule, "log"),
        (LightningModule, "on_save_checkpoint"),
        (LightningModule, "on_load_checkpoint"),
        (LightningModule, "on_train_epoch_end"),
        (Trainer, "fit"),
    ],
)
def test_what_is_replaced_is_there(owner: type, name: str) -> None:
    """… so that a version of Lightning that has moved it fails by name."""
    assert callable(getattr(owner, name))
