"""What a search makes small: how badly a filling of a cloze explains the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks._validate import count, one_of
from attacks.dropout import common_dropout, has_dropout
from attacks.inversion.protocol import Inputs, Invertible
from attacks.rounding import check_decimals, rounded
from attacks.signals import Predictions

# So many rows are computed at once where no gradient is needed.
_CHUNK = 2048


class DivergedError(ValueError):
    """A model whose losses are no numbers."""


class Objective:
    """The loss of fillings, of whole candidates or of mixtures of them.

    Guarantee: the loss of a mixture that puts all its weight on one candidate per hole is that of
    the filling with these candidates, up to rounding. So no mixture that was rounded to a filling
    can be better than the best filling.
    """

    def __init__(
        self,
        model: Invertible,
        *,
        target: str = "tags",
        masks: int = 0,
        reference: Invertible | None = None,
        decimals: int | None = None,
        seed: int = 0,
    ) -> None:
        """Choose what is explained, and how.

        Args:
            target: "tags", the mean over the words of -log p of their tags (Parikh et al., 2022);
                "intent"; "joint", their sum; or "labels", the share of labels that the model
                predicts otherwise, which is all that a label-only attacker sees.
            masks: the number of dropout masks whose mean loss is taken, the same for all rows; 0:
                evaluation mode. A model without dropout is always read in evaluation mode.
            reference: a model that never saw the secrets, with the same clozes: its loss is
                subtracted, so that what any model finds likely does not count.
            decimals: to which the attacker sees probabilities, who then sees answers alone: no
                gradient, and no dropout masks. None: all, as whoever has the weights does.
            seed: of the masks.

        Raises:
            ValueError: an unknown target, or one that the model or its clozes have no labels for;
                a reference with other clozes; or decimals out of range.
        """
        one_of("target", target, choices=tuple(TARGETS))
        if reference is not None and reference.clozes != model.clozes:
            raise ValueError(
                "Expected a reference model with the very clozes of the model, got others: a "
                "difference of losses on different texts means nothing."
            )
        self.model, self.target, self.reference = model, target, reference
        sees_masks = has_dropout(model.network) and decimals is None
        self._masks = count("masks", masks) if sees_masks else 0
        self._seed = seed
        self._decimals = None if decimals is None else check_decimals(decimals)
        self._check_labels(model)
        if reference is not None:
            self._check_labels(reference)

    @property
    def is_differentiable(self) -> bool:
        """Whether it has a gradient."""
        return self.target != "labels" and self._decimals is None

    @property
    def has_masks(self) -> bool:
        """Whether the loss is a mean over dropout masks."""
        return self._masks > 0

    def in_evaluation_mode(self) -> Objective:
        """The same without dropout masks."""
        return Objective(
            self.model, target=self.target, reference=self.reference, decimals=self._decimals
        )

    @property
    def inputs(self) -> Inputs:
        return self.model.inputs

    def mixed(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The losses `(B,)` in float64 of mixtures, differentiable in the weights.

        Args:
            rows: (B,) which cloze a row fills.
            weights: (B, n, V) of the candidates of each hole, which sum to one; zero past the last
                candidate. All input channels of a token are mixed by the same weights.
        """
        return self._difference(rows, lambda inputs: _mixtures(inputs, rows, weights))

    @torch.no_grad()
    def whole(self, rows: Tensor, choices: Tensor) -> Tensor:
        """The losses `(B,)` in float64 of whole candidates.

        Args:
            rows: (B,) which cloze a row fills.
            choices: (B, n) indices of candidates; 0 in a hole that the cloze does not have.

        Raises:
            DivergedError: the model returns no numbers.
        """
        pieces = zip(torch.split(rows, _CHUNK), torch.split(choices, _CHUNK), strict=True)
        losses = torch.cat([self._of_whole(some, chosen) for some, chosen in pieces])
        if torch.isnan(losses).any():
            raise DivergedError(
                f"Expected losses that are numbers, got {int(torch.isnan(losses).sum())} NaN of "
                f"{len(losses)}: the model has diverged, and gives nothing away."
            )
        return losses

    def _of_whole(self, rows: Tensor, choices: Tensor) -> Tensor:
        holes = torch.arange(choices.shape[1], device=choices.device)
        return self._difference(
            rows, lambda inputs: inputs.candidates[rows[:, None], holes, choices]
        )

    def _difference(self, rows: Tensor, fillings: Callable[[Inputs], Tensor]) -> Tensor:
        """The model's loss (B,), minus the reference's if there is one.

        Args:
            fillings: inputs of a model -> what stands in the holes (B, n, p, d).
        """
        loss = self._loss(self.model, rows, fillings(self.model.inputs))
        if self.reference is not None:
            loss = loss - self._loss(self.reference, rows, fillings(self.reference.inputs))
        return loss

    def _loss(self, model: Invertible, rows: Tensor, fillings: Tensor) -> Tensor:
        vectors = _filled(model.inputs, rows, fillings)
        with _evaluating(model):
            if self._masks == 0:
                return self._explained(model, vectors, rows)
            # The same masks at every call: what is compared must be comparable.
            masks = torch.Generator().manual_seed(self._seed)
            with common_dropout(model.network, generator=masks):
                drawn = [self._explained(model, vectors, rows) for _ in range(self._masks)]
                return torch.stack(drawn).mean(0)

    def _explained(self, model: Invertible, vectors: Tensor, rows: Tensor) -> Tensor:
        """The target's loss (B,) of input vectors (B, S, d)."""
        said = model.predict(vectors, rows)
        if self._decimals is not None:
            said = rounded(said, decimals=self._decimals)
        return TARGETS[self.target](said).to(rows.device)

    def _check_labels(self, model: Invertible) -> None:
        """Raise unless the model predicts what is to be explained."""
        with torch.no_grad(), _evaluating(model):
            row = torch.zeros(1, dtype=torch.long, device=model.inputs.vectors.device)
            said = model.predict(model.inputs.vectors[:1], row)
        slots = said.tag_logits is not None and said.tags is not None
        intents = said.intent_logits is not None and said.intents is not None
        needed = {"tags": slots, "intent": intents, "joint": slots and intents}
        if not needed.get(self.target, slots or intents):
            missing = "intents in model and clozes" if slots else "slots in model and clozes"
            raise ValueError(
                f"Expected {missing} for the target {self.target!r}, "
                f"got none: choose another target of {', '.join(TARGETS)}."
            )


def _mixtures(inputs: Inputs, rows: Tensor, weights: Tensor) -> Tensor:
    """(B,) rows, (B, n, V) weights -> mixtures of candidates (B, n, p, d)."""
    return torch.einsum("bnv,bnvpd->bnpd", weights, inputs.candidates[rows])


def _filled(inputs: Inputs, rows: Tensor, fillings: Tensor) -> Tensor:
    """The input vectors (B, S, d) of clozes (B,) with (B, n, p, d) in their holes."""
    vectors = inputs.vectors[rows]
    # One more place, for what belongs to no hole.
    room = torch.cat((vectors, vectors[:, :1]), dim=1)
    places, flat = inputs.places[rows].flatten(1), fillings.flatten(1, 2)
    return room.scatter(1, places[:, :, None].expand_as(flat), flat)[:, :-1]


def _tags_loss(said: Predictions) -> Tensor:
    assert said.tag_logits is not None and said.tags is not None
    tags = said.tags.clamp(min=-1)
    by_word = F.cross_entropy(said.tag_logits.double().mT, tags, ignore_index=-1, reduction="none")
    return by_word.sum(1) / (tags >= 0).sum(1).clamp(min=1)


def _intent_loss(said: Predictions) -> Tensor:
    assert said.intent_logits is not None and said.intents is not None
    return F.cross_entropy(said.intent_logits.double(), said.intents, reduction="none")


def _joint_loss(said: Predictions) -> Tensor:
    return _tags_loss(said) + _intent_loss(said)


def _wrong_labels(said: Predictions) -> Tensor:
    wrong, labels = [], []
    if said.tag_logits is not None and said.tags is not None:
        known = said.tags >= 0
        wrong.append(((said.tag_logits.argmax(2) != said.tags) & known).sum(1))
        labels.append(known.sum(1))
    if said.intent_logits is not None and said.intents is not None:
        wrong.append((said.intent_logits.argmax(1) != said.intents).long())
        labels.append(torch.ones_like(said.intents))
    return torch.stack(wrong).sum(0).double() / torch.stack(labels).sum(0)


@contextmanager
def _evaluating(model: Invertible) -> Iterator[None]:
    was_training = model.network.training
    model.network.eval()
    try:
        yield
    finally:
        model.network.train(was_training)


TARGETS: Mapping[str, Callable[[Predictions], Tensor]] = {
    "tags": _tags_loss,
    "intent": _intent_loss,
    "joint": _joint_loss,
    "labels": _wrong_labels,
}
