"""The relaxation: gradient descent over mixtures of candidates (Parikh, Dupuy and Gupta, 2022).

Each hole is filled with the mixture softmax(Z / T) of its candidates' input vectors; Z descends the
loss, and the largest entry of each row of Z is the guess. All restarts of all clozes are rows of
one batch, which a row leaves once its guess has been the same for long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks._validate import count, number
from attacks.inversion.found import Found, all_rows, allowed
from attacks.inversion.objective import Objective

_BETAS, _TINY = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How the relaxation descends.

    Attributes:
        restarts: starting points per cloze.
        steps: at most; Adam's.
        learning_rate: of Adam.
        patience: steps with the same guess after which a row stops.
        temperature: of the softmax at the first step; larger is smoother.
        last_temperature: at the last step, reached geometrically.
        gumbel: add Gumbel noise to Z at every step, so that mixtures are nearly whole candidates.

    Raises:
        ValueError: a number is out of range.
    """

    restarts: int = 50
    steps: int = 200
    learning_rate: float = 0.2
    patience: int = 20
    temperature: float = 1.0
    last_temperature: float = 1.0
    gumbel: bool = False

    def __post_init__(self) -> None:
        for name in ("restarts", "steps", "patience"):
            count(name, getattr(self, name), least=1)
        for name in ("learning_rate", "temperature", "last_temperature"):
            value = number(name, getattr(self, name))
            if not 0 < value < math.inf:
                raise ValueError(
                    f"Expected `{name}` as a finite number above 0, got {value}: 1 is a "
                    "temperature, 0.02 the published learning rate."
                )


# As in the replication of the paper; one start.
PUBLISHED = Descent(restarts=1, steps=1000, learning_rate=0.02, patience=100)


def relax(
    objective: Objective, *, descent: Descent | None = None, generator: torch.Generator
) -> Found:
    """Search by gradient descent over mixtures.

    Args:
        descent: None: the defaults, which are faster than what was published, not weaker.
        generator: on the CPU; of starting points and Gumbel noise.

    Returns:
        The guess of each restart with its loss, as a whole filling.

    Raises:
        ValueError: an objective without gradient.
    """
    if not objective.is_differentiable:
        raise ValueError(
            "Expected an objective with a gradient, got labels alone: use coordinates, beam or "
            "enumeration."
        )
    descent = Descent() if descent is None else descent
    choices, history = _descend(objective, descent, generator)
    rows = all_rows(objective, descent.restarts)
    losses = objective.whole(rows, choices)
    by_cloze = (len(objective.model.clozes), descent.restarts)
    return Found(choices=choices.view(*by_cloze, -1), losses=losses.view(by_cloze), history=history)


def _descend(
    objective: Objective, descent: Descent, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The guesses (K · R, n), and the lowest losses of mixtures (steps, K)."""
    rows = all_rows(objective, descent.restarts)
    usable = allowed(objective)[rows]
    logits = _glorot(usable, generator).to(objective.inputs.vectors.dtype)
    guesses = _guesses(logits, usable)
    moments = torch.zeros_like(logits), torch.zeros_like(logits)
    unchanged = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    active = torch.arange(len(rows), device=rows.device)
    lowest = torch.full((len(objective.model.clozes),), torch.inf, device=rows.device).double()
    history = []
    for step in range(1, descent.steps + 1):
        losses, gradient = _gradient(
            objective, rows[active], logits[active], usable[active], descent, step, generator
        )
        lowest = lowest.scatter_reduce(0, rows[active], losses, "amin")
        history.append(lowest)
        logits[active] -= _adam(moments, active, gradient, step, descent.learning_rate)
        now = _guesses(logits[active], usable[active])
        same = (now == guesses[active]).all(1)
        unchanged[active] = torch.where(same, unchanged[active] + 1, 0)
        guesses[active] = now
        active = active[unchanged[active] < descent.patience]
        if len(active) == 0:
            break
    return guesses, torch.stack(history)


def _gradient(
    objective: Objective,
    rows: Tensor,
    logits: Tensor,
    usable: Tensor,
    descent: Descent,
    step: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The losses (B,) of mixtures, and their gradient in the logits (B, n, V)."""
    logits = logits.detach().requires_grad_()
    raised = logits
    if descent.gumbel:
        raised = logits + _gumbel(logits, generator)
    warm = raised / _temperature(descent, step)
    weights = warm.masked_fill(~usable, -torch.inf).softmax(2)
    with torch.enable_grad():
        losses = objective.mixed(rows, weights)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return losses.detach(), gradient


def _temperature(descent: Descent, step: int) -> float:
    done = (step - 1) / max(1, descent.steps - 1)
    return float(descent.temperature ** (1 - done) * descent.last_temperature**done)


def _adam(
    moments: tuple[Tensor, Tensor], active: Tensor, gradient: Tensor, step: int, rate: float
) -> Tensor:
    """The step that Adam takes from the active rows; every row is a run of its own."""
    first, second = moments
    first[active] = _BETAS[0] * first[active] + (1 - _BETAS[0]) * gradient
    second[active] = _BETAS[1] * second[active] + (1 - _BETAS[1]) * gradient**2
    mean = first[active] / (1 - _BETAS[0] ** step)
    spread = second[active] / (1 - _BETAS[1] ** step)
    return rate * mean / (spread.sqrt() + _TINY)


def _glorot(usable: Tensor, generator: torch.Generator) -> Tensor:
    """(B, n, V) logits, uniform as Glorot and Bengio (2010) draw a matrix (n, V)."""
    limit = math.sqrt(6 / (usable.shape[1] + usable.shape[2]))
    uniform = torch.rand(usable.shape, generator=generator, dtype=torch.float64)
    return ((2 * uniform - 1) * limit).to(usable.device)


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return -(-uniform.clamp(min=1e-12, max=1 - 1e-12).log()).log().to(like)


def _guesses(logits: Tensor, usable: Tensor) -> Tensor:
    """(B, n): the candidate of the largest logit."""
    return logits.masked_fill(~usable, -torch.inf).argmax(2)
