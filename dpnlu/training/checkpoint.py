"""Unfinished training on disk, to go on with after an interruption. Nothing is pickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dpnlu.mechanism.durable import replacing

_MODEL, _OPTIMIZER = "model.", "optimizer."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is missing, or belongs to another model or training."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often training is saved on the way.

    Attributes:
        path: the file; each checkpoint replaces the one before.
        every: steps between checkpoints, >= 1.
        run: what tells this training from others; a checkpoint of another one is refused.
    """

    path: Path
    every: int
    run: str = ""

    def are_due(self, done: int, *, saved: int) -> bool:
        """Whether to save after so many steps if that was last done after `saved`, 0 for never.

        The first step's work is saved, so that whatever happens to the others, something is there.
        """
        return not saved or done // self.every > saved // self.every


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, *, steps: int, run: str = ""
) -> None:
    """Write weights, optimizer state and the number of steps; the file is there whole or not.

    No state of a random generator is kept: what follows draws fresh noise. Noise drawn twice for
    two different updates would cancel out in their difference.
    """
    state = optimizer.state_dict()["state"]
    tensors = {_MODEL + name: value.contiguous() for name, value in model.state_dict().items()}
    tensors |= {
        f"{_OPTIMIZER}{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"steps": json.dumps(steps), "run": run})


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, *, run: str = "") -> int:
    """Restore weights and optimizer state.

    Returns:
        The number of steps that had been taken.

    Raises:
        CheckpointError: the file is damaged, or belongs to another model or training.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
            steps = int(json.loads(metadata["steps"]))
        if metadata.get("run", "") != run:
            raise ValueError("it was saved by another training.")
        model.load_state_dict(
            {name.removeprefix(_MODEL): t for name, t in tensors.items() if name.startswith(_MODEL)}
        )
        optimizer.load_state_dict(_optimizer_state(optimizer, tensors))
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"Expected a checkpoint of this model at {path}: {error}") from None
    return steps


def _optimizer_state(optimizer: Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_OPTIMIZER):
            index, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
