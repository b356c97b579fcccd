"""Greedy coordinate gradient: token swaps that the gradient proposes, scored exactly.

After Zou et al. (2023), who search prompts by it: in each step the gradient in the one-hot weights
says which swaps promise most, some of these are tried, and the best replaces the filling if it is
better.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks._validate import count
from attacks.inversion.found import Found, all_rows, allowed, random_choices
from attacks.inversion.objective import Objective


def coordinate_gradient(
    objective: Objective,
    *,
    restarts: int = 20,
    steps: int = 100,
    patience: int = 10,
    promising: int = 8,
    proposals: int = 16,
    generator: torch.Generator,
) -> Found:
    """Search by swaps that the gradient proposes, from random fillings.

    Args:
        restarts: random fillings per cloze.
        steps: swaps per filling, at most.
        patience: steps without a better filling, of any cloze, after which the search ends.
        promising: swaps of each hole that proposals are drawn from.
        proposals: swaps that are tried in a step.
        generator: on the CPU; of fillings and proposals.

    Raises:
        ValueError: an objective without gradient, or a number out of range.
    """
    if not objective.is_differentiable:
        raise ValueError(
            "Expected an objective with a gradient, got labels alone: use coordinates, beam or "
            "enumeration."
        )
    restarts, steps = count("restarts", restarts, least=1), count("steps", steps, least=1)
    rows = all_rows(objective, restarts)
    choices = random_choices(objective, restarts, generator=generator).flatten(0, 1)
    losses = objective.whole(rows, choices)
    usable = allowed(objective)[rows]
    history: list[Tensor] = []
    vain = 0
    while len(history) < steps and vain < patience:
        gradient = _gradient(objective, rows, choices).masked_fill(~usable, torch.inf)
        tried = _proposals(choices, gradient, promising, proposals, generator)
        scored = objective.whole(rows.repeat_interleave(proposals), tried.flatten(0, 1))
        now, best = scored.view(len(rows), proposals).min(1)
        better = now < losses
        swapped = tried[torch.arange(len(rows), device=rows.device), best]
        choices = torch.where(better[:, None], swapped, choices)
        losses = torch.where(better, now, losses)
        history.append(losses.view(-1, restarts).amin(1))
        vain = 0 if bool(better.any()) else vain + 1
    return Found(
        choices=choices.view(-1, restarts, choices.shape[1]),
        losses=losses.view(-1, restarts),
        history=torch.stack(history),
    )


def _gradient(objective: Objective, rows: Tensor, choices: Tensor) -> Tensor:
    """The gradient (B, n, V) of the loss in the one-hot weights of fillings (B, n)."""
    inputs = objective.inputs
    one_hot = F.one_hot(choices, inputs.candidates.shape[2]).to(inputs.vectors.dtype)
    with torch.enable_grad():
        weights = one_hot.requires_grad_()
        (gradient,) = torch.autograd.grad(objective.mixed(rows, weights).sum(), weights)
    return gradient


def _proposals(
    choices: Tensor, gradient: Tensor, promising: int, proposals: int, generator: torch.Generator
) -> Tensor:
    """(B, P, n): the fillings (B, n) with one token swapped."""
    batch, _, most = gradient.shape
    # What stands there is no swap.
    others = gradient.scatter(2, choices[:, :, None], torch.inf)
    slope, swap = others.topk(min(promising, most), dim=2, largest=False)
    noise = torch.rand(batch, proposals, swap[0].numel(), generator=generator).to(slope.device)
    possible = slope.isfinite().flatten(1)[:, None, :]
    # With replacement between proposals, hence a draw for each of them.
    drawn = noise.masked_fill(~possible, -1.0).argmax(2)
    hole, token = drawn // swap.shape[2], swap.flatten(1).gather(1, drawn)
    tried = choices[:, None, :].expand(-1, proposals, -1).clone()
    return tried.scatter(2, hole[:, :, None], token[:, :, None])
