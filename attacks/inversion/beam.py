"""Beam search: holes are filled from left to right, and the best beginnings are kept.

A hole that is still open holds the even mixture of its candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks._validate import count
from attacks.inversion.found import Found, allowed
from attacks.inversion.objective import Objective
from attacks.inversion.refinement import refine

# So many rows are computed at once.
_CHUNK = 1024


def beam(
    objective: Objective, *, width: int = 64, keep: int = 8, generator: torch.Generator
) -> Found:
    """Search by keeping the best beginnings, then refine the best fillings.

    Args:
        width: beginnings that are kept of each cloze.
        keep: fillings of each cloze that are refined.
        generator: on the CPU; of the order in which beginnings of the same loss are kept.
    """
    width = count("width", width, least=1)
    usable = allowed(objective)
    clozes, holes, most = usable.shape
    choices = torch.zeros(clozes, 1, holes, dtype=torch.long, device=usable.device)
    alive = torch.ones(clozes, 1, dtype=torch.bool, device=usable.device)
    losses = torch.zeros(clozes, 1, dtype=torch.float64, device=usable.device)
    history = []
    for hole in range(holes):
        tried = choices[:, :, None, :].expand(-1, -1, most, -1).clone()
        tried[..., hole] = torch.arange(most, device=usable.device)
        possible = (alive[:, :, None] & usable[:, None, hole]).flatten(1)
        tried = tried.flatten(1, 2)
        scored = _losses(objective, tried, possible, decided=hole + 1)
        choices, losses, alive = _best(tried, scored, width, generator)
        history.append(losses.amin(1))
    found = Found(choices=choices, losses=losses, history=torch.stack(history))
    return refine(objective, found, keep=keep)


def _losses(objective: Objective, tried: Tensor, possible: Tensor, *, decided: int) -> Tensor:
    """(K, C, n) beginnings of that length -> losses (K, C); inf where impossible."""
    usable = allowed(objective)
    dtype = objective.inputs.vectors.dtype
    even = usable.to(dtype) / usable.sum(2, keepdim=True)
    rows = torch.arange(len(tried), device=tried.device)[:, None].expand_as(possible)[possible]
    chosen = tried[possible]
    losses = torch.full(possible.shape, torch.inf, dtype=torch.float64, device=tried.device)
    parts = []
    for some, tokens in zip(torch.split(rows, _CHUNK), torch.split(chosen, _CHUNK), strict=True):
        weights = even[some].clone()
        weights[:, :decided] = F.one_hot(tokens[:, :decided], usable.shape[2]).to(dtype)
        if decided == tried.shape[2]:
            parts.append(objective.whole(some, tokens))
        else:
            with torch.no_grad():
                parts.append(objective.mixed(some, weights))
    losses[possible] = torch.cat(parts)
    return losses


def _best(
    tried: Tensor, losses: Tensor, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The beginnings (K, W, n) of the lowest losses (K, W), and which of them there are."""
    order = torch.rand(losses.shape, generator=generator).argsort(1).to(losses.device)
    kept, place = losses.gather(1, order).sort(dim=1, stable=True)
    place = order.gather(1, place[:, :width])
    choices = tried.gather(1, place[:, :, None].expand(-1, -1, tried.shape[2]))
    return choices, kept[:, :width], kept[:, :width].isfinite()
