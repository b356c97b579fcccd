"""Coordinate descent over whole candidates: every swap of one token, scored exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks._validate import count
from attacks.inversion.found import Found, all_rows, allowed, random_choices
from attacks.inversion.objective import Objective


def coordinates(
    objective: Objective, *, restarts: int = 20, sweeps: int = 20, generator: torch.Generator
) -> Found:
    """Search by coordinate descent from random fillings.

    Args:
        restarts: random fillings per cloze.
        sweeps: see `refine`.
        generator: on the CPU; of the fillings.
    """
    restarts = count("restarts", restarts, least=1)
    choices = random_choices(objective, restarts, generator=generator)
    losses = objective.whole(all_rows(objective, restarts), choices.flatten(0, 1))
    start = Found(
        choices=choices, losses=losses.view(choices.shape[:2]), history=losses.new_zeros(0)
    )
    return refine(objective, start, keep=restarts, sweeps=sweeps)


def refine(objective: Objective, start: Found, *, keep: int = 10, sweeps: int = 20) -> Found:
    """Improve fillings one hole after the other, until no swap of one token is better.

    Guarantee: the loss of no filling rises.

    Args:
        keep: the number of fillings of each cloze that are improved: those of the lowest loss.
        sweeps: over all holes, at most.
    """
    kept = min(count("keep", keep, least=1), start.losses.shape[1])
    sweeps = count("sweeps", sweeps, least=1)
    losses, order = start.losses.topk(kept, dim=1, largest=False)
    holes = start.choices.shape[2]
    choices = start.choices.gather(1, order[:, :, None].expand(-1, -1, holes)).clone()
    # A beam may be wider than there are secrets; what is no filling gives way to the best one.
    missing = ~losses.isfinite()
    choices = torch.where(missing[:, :, None], choices[:, :1], choices)
    losses = torch.where(missing, losses[:, :1], losses)
    history = []
    for _ in range(sweeps):
        before = choices
        for hole in range(holes):
            swapped = swaps(objective, choices, hole)
            now, best = swapped.min(dim=2)
            # Only what is truly better: ties must not drift to the first candidate.
            better = now < losses
            losses = torch.where(better, now, losses)
            changed = choices.clone()
            changed[:, :, hole] = torch.where(better, best, choices[:, :, hole])
            choices = changed
        history.append(losses.amin(1))
        if torch.equal(before, choices):
            break
    steps = torch.stack(history)
    if start.history.numel():
        steps = torch.cat((start.history, steps))
    return Found(choices=choices, losses=losses, history=steps, notes=start.notes)


def swaps(objective: Objective, choices: Tensor, hole: int) -> Tensor:
    """The losses `(K, R, V)` of fillings `(K, R, n)` with each candidate in one hole; inf where
    there is no such candidate."""
    clozes, fillings, _ = choices.shape
    most = objective.inputs.candidates.shape[2]
    tried = choices[:, :, None, :].expand(-1, -1, most, -1).clone()
    tried[..., hole] = torch.arange(most, device=choices.device)
    usable = allowed(objective)[:, None, hole].expand(-1, fillings, -1)
    rows = torch.arange(clozes, device=choices.device)[:, None, None].expand_as(usable)
    losses = torch.full(usable.shape, torch.inf, dtype=torch.float64, device=choices.device)
    losses[usable] = objective.whole(rows[usable], tried[usable])
    return losses
