"""What searches return, and what they start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.inversion.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search of K clozes, R fillings of each.

    Attributes:
        choices: (K, R, n) indices of candidates.
        losses: (K, R) of these.
        history: (steps, K) the lowest loss of each cloze after each step; of mixtures where the
            search is among mixtures.
        notes: what a reader must know, in sentences.
    """

    choices: Tensor
    losses: Tensor
    history: Tensor
    notes: tuple[str, ...] = ()

    def best(self) -> tuple[Tensor, Tensor]:
        """The filling (K, n) of the lowest loss, and that loss (K,); the first of several."""
        losses, place = self.losses.min(dim=1)
        rows = torch.arange(len(place), device=place.device)
        return self.choices[rows, place], losses


def all_rows(objective: Objective, repeats: int) -> Tensor:
    """(K · repeats,): each cloze that many times, one after the other."""
    clozes = torch.arange(len(objective.model.clozes), device=objective.inputs.vectors.device)
    return clozes.repeat_interleave(repeats)


def random_choices(objective: Objective, repeats: int, *, generator: torch.Generator) -> Tensor:
    """(K, repeats, n): fillings drawn uniformly.

    Args:
        generator: on the CPU.
    """
    sizes = objective.inputs.sizes[:, None, :].expand(-1, repeats, -1)
    uniform = torch.rand(sizes.shape, generator=generator, dtype=torch.float64)
    return (uniform.to(sizes.device) * sizes).long()


def allowed(objective: Objective) -> Tensor:
    """(K, n, V) Boolean: whether there is such a candidate."""
    inputs = objective.inputs
    candidates = torch.arange(inputs.candidates.shape[2], device=inputs.sizes.device)
    return candidates < inputs.sizes[:, :, None]
