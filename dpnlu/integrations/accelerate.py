"""Private training in a loop of one's own on top of accelerate.

model, optimizer = accelerator.prepare(model, optimizer)      # never the loader
private = privatize_accelerated(accelerator, model, optimizer, plan, ledger=Path("ledger.jsonl"))
step = private.stepper(per_example_loss)                      # never accelerator.backward
for batch in private.loader(dataset, collate_fn=collate, physical_batch_size=64):
    if step(send_to_device(batch, accelerator.device)):
        scheduler.step()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from dpnlu.integrations.records import check_record, record_of
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import PrivateTraining, privatize


def privatize_accelerated(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    plan: PrivacyPlan,
    *,
    ledger: Path,
    resume: bool = False,
    engine: str | None = None,
    noise: torch.Generator | Literal["system"] | None = None,
    sampling_rng: np.random.Generator | None = None,
    verify: bool = True,
) -> PrivateTraining:
    """Make the training of a prepared model by a prepared optimizer follow `plan`.

    Guarantee: besides that of `privatize`, that `accelerator.load_state` loads no checkpoint whose
    spending the ledger has forgotten: each says which ledger it belongs to, and how long that was.

    Args:
        accelerator: of one process; without gradient accumulation, which the loader does, and
            without fp16, whose scaler skips steps depending on the data.
        ledger: where releases are recorded, outside the folders of checkpoints.
        resume: go on with the ledger that is there; `load_state` comes after this call.

    The other arguments are those of `privatize`.

    Raises:
        ValueError: the accelerator is another one; and as `privatize`.
        LedgerError: there is a ledger and it is not to be resumed, or the other way round.
    """
    _check_accelerator(accelerator)
    kept = Ledger.resume(ledger) if resume else Ledger(plan, path=ledger, sampled_only=True)
    try:
        private = privatize(
            model,
            optimizer,
            plan,
            engine=engine,
            ledger=kept,
            noise=noise,
            sampling_rng=sampling_rng,
            verify=verify,
        )
    except BaseException:
        kept.close()
        if not resume:
            ledger.unlink()  # it records nothing
        raise
    accelerator.register_for_checkpointing(_Record(private))
    return private


class _Record:
    """What accelerate saves into its checkpoints, and loads from them."""

    def __init__(self, private: PrivateTraining) -> None:
        self._private = private

    def state_dict(self) -> dict[str, Any]:
        return record_of(self._private.ledger)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_record(state, self._private.ledger, place="the checkpoint")
        self._private.weights_changed()


def _check_accelerator(accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1:
        raise ValueError(
            f"Expected one process, got {accelerator.num_processes}: each would spend the whole "
            "budget; start one."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "Expected bf16 or float32, got fp16: its GradScaler skips steps depending on the data; "
            'use mixed_precision="bf16".'
        )
    if accelerator.gradient_accumulation_steps > 1:
        raise ValueError(
            "Expected gradient_accumulation_steps=1, got "
            f"{accelerator.gradient_accumulation_steps}: steps would be left out that are spent; "
            "plan larger logical batches instead, which the loader cuts into physical ones."
        )
