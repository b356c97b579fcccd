"""Exhaustive scoring: the exact optimum of an objective, where there are few enough secrets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attacks._validate import count
from attacks.inversion.found import Found
from attacks.inversion.objective import Objective

MOST_SECRETS = 10**6
_CHUNK = 16_384


def enumerable(objective: Objective) -> bool:
    """Whether every cloze has at most a million secrets."""
    return all(cloze.combinations <= MOST_SECRETS for cloze in objective.model.clozes)


def enumerate_secrets(
    objective: Objective, *, keep: int = 100, generator: torch.Generator
) -> Found:
    """Score every secret of every cloze, and return the best, equal ones in a random order.

    Args:
        keep: the number of secrets of each cloze that are returned, fewer if a cloze has fewer.
        generator: on the CPU.

    Raises:
        ValueError: a cloze has more than a million secrets.
    """
    kept = min(
        count("keep", keep, least=1), *(cloze.combinations for cloze in objective.model.clozes)
    )
    choices, losses = [], []
    for cloze in range(len(objective.model.clozes)):
        scored = losses_of_all(objective, cloze)
        order = torch.randperm(len(scored), generator=generator).to(scored.device)
        lowest, place = scored[order].sort(stable=True)
        losses.append(lowest[:kept])
        choices.append(_secrets(objective, cloze, order[place[:kept]]))
    best = torch.stack(losses)
    return Found(choices=torch.stack(choices), losses=best, history=best[None, :, 0])


def losses_of_all(objective: Objective, cloze: int) -> Tensor:
    """The loss of every secret of a cloze `(C,)`, in lexicographic order of the candidates.

    Raises:
        ValueError: there are more than a million.
    """
    total = objective.model.clozes[count("cloze", cloze)].combinations
    if total > MOST_SECRETS:
        raise ValueError(
            f"Expected a million secrets at most, got {total}: search by relaxation or beam, or "
            "leave candidates out."
        )
    return torch.cat(list(_losses(objective, cloze, total)))


def _losses(objective: Objective, cloze: int, total: int) -> Iterator[Tensor]:
    device = objective.inputs.sizes.device
    for numbers in torch.split(torch.arange(total, device=device), _CHUNK):
        rows = torch.full_like(numbers, cloze)
        yield objective.whole(rows, _secrets(objective, cloze, numbers))


def _secrets(objective: Objective, cloze: int, numbers: Tensor) -> Tensor:
    """The secrets (C, n) with these numbers in lexicographic order; 0 past the last hole."""
    sizes = objective.inputs.sizes[cloze]
    worth = sizes.flip(0).cumprod(0).flip(0) // sizes
    return numbers[:, None] // worth % sizes
