"""The entry point: fill the holes of clozes with what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from attacks._validate import one_of
from attacks.inversion.beam import beam
from attacks.inversion.coordinate_gradient import coordinate_gradient
from attacks.inversion.enumeration import MOST_SECRETS, enumerable, enumerate_secrets
from attacks.inversion.found import Found, all_rows
from attacks.inversion.objective import Objective
from attacks.inversion.protocol import Cloze
from attacks.inversion.refinement import coordinates, refine, swaps
from attacks.inversion.relaxation import PUBLISHED, relax

Search: TypeAlias = Callable[[Objective, torch.Generator], Found]

# So many fillings of a search in evaluation mode are scored under dropout masks.
_RESCORED = 30
# The controls, and what is the optimum without it.
_UNREFINED = ("published", "relaxation")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What was found for one cloze.

    Attributes:
        cloze: what was asked.
        choices: (n,) the best secret, as indices of candidates.
        loss: of it.
        scores: for each hole (V,) the loss with each candidate there, the others as in the secret.
        history: (steps,) the lowest loss after each step of the search.
        notes: what a reader must know, in sentences.
    """

    cloze: Cloze
    choices: tuple[int, ...]
    loss: float
    scores: tuple[NDArray[np.float64], ...]
    history: NDArray[np.float64]
    notes: tuple[str, ...]

    @property
    def secret(self) -> tuple[str, ...]:
        """Its tokens."""
        return self.cloze.secret(self.choices)

    @property
    def text(self) -> tuple[str, ...]:
        """The tokens of the whole text."""
        return self.cloze.filled(self.choices)


def extract(
    objective: Objective, *, method: str = "refined", generator: torch.Generator
) -> tuple[Extraction, ...]:
    """Recover the secrets of a model's clozes, all of them at once.

    Under dropout masks, which cost as many times more, the search is in evaluation mode; what it
    found best is scored under the masks and, but for the plain relaxations, refined.

    Args:
        objective: the model, the clozes, and what a secret has to explain.
        method: one of `METHODS`.
        generator: on the CPU; of all that is random.

    Returns:
        One extraction per cloze, in order. Enumeration of more than a million secrets is replaced
        by beam search, and the notes say so.

    Raises:
        ValueError: an unknown method, or one that needs a gradient where there is none.
        DivergedError: the model returns no numbers.
    """
    one_of("method", method, choices=tuple(METHODS))
    if not objective.has_masks:
        return read_out(objective, METHODS[method](objective, generator))
    found = METHODS[method](objective.in_evaluation_mode(), generator)
    best = rescored(objective, found, keep=_RESCORED)
    if method not in _UNREFINED:
        best = refine(objective, best, keep=1, sweeps=3)
    return read_out(objective, best)


def rescored(objective: Objective, found: Found, *, keep: int) -> Found:
    """The best fillings of a search, with their losses under another objective."""
    kept = min(keep, found.losses.shape[1])
    order = found.losses.argsort(dim=1, stable=True)[:, :kept]
    choices = found.choices.gather(1, order[:, :, None].expand(-1, -1, found.choices.shape[2]))
    losses = objective.whole(all_rows(objective, kept), choices.flatten(0, 1)).view(-1, kept)
    return Found(
        choices=choices,
        losses=losses,
        history=losses.amin(1)[None],
        notes=found.notes,
    )


def read_out(objective: Objective, found: Found) -> tuple[Extraction, ...]:
    """The best filling of each cloze, with the loss of every other candidate in each hole."""
    choices, losses = found.best()
    holes = range(choices.shape[1])
    scores = [swaps(objective, choices[:, None], hole)[:, 0].cpu().numpy() for hole in holes]
    return tuple(
        Extraction(
            cloze=cloze,
            choices=tuple(choices[k, : len(cloze.holes)].tolist()),
            loss=float(losses[k]),
            scores=tuple(
                scores[hole][k, : len(tokens)] for hole, tokens in enumerate(cloze.candidates)
            ),
            history=found.history[:, k].cpu().numpy(),
            notes=found.notes,
        )
        for k, cloze in enumerate(objective.model.clozes)
    )


def _enumerated(objective: Objective, generator: torch.Generator) -> Found:
    if enumerable(objective):
        return enumerate_secrets(objective, generator=generator)
    most = max(cloze.combinations for cloze in objective.model.clozes)
    found = beam(objective, generator=generator)
    note = (
        f"A cloze has {most:.3g} secrets, more than the {MOST_SECRETS} that are scored one by one: "
        "beam search took the place of enumeration and may miss the best."
    )
    return Found(choices=found.choices, losses=found.losses, history=found.history, notes=(note,))


METHODS: Mapping[str, Search] = {
    "published": lambda objective, rng: relax(objective, descent=PUBLISHED, generator=rng),
    "relaxation": lambda objective, rng: relax(objective, generator=rng),
    "refined": lambda objective, rng: refine(objective, relax(objective, generator=rng)),
    "coordinates": lambda objective, rng: coordinates(objective, generator=rng),
    "coordinate_gradient": lambda objective, rng: coordinate_gradient(objective, generator=rng),
    "beam": lambda objective, rng: beam(objective, generator=rng),
    "enumeration": _enumerated,
}
