"""How an engine does with a subject of the zoo, judged by the loop over examples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpnlu.engines.per_example import PerExample
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import PrivateTraining, privatize
from tests.zoo.subjects import Subject, Texts, move_parameters

# From the worst on.
VERDICTS = ("wrong", "fails", "refused", "exact")

# As many examples as positions, layers, heads, labels; and as many as divide these.
SHAPES = tuple(itertools.product((4, 2, 3, 1), (4, 5, 7)))

# Clips every example, each by a factor of its own, so that a wrong norm is a wrong sum.
_PLAN = PrivacyPlan(
    noise_multiplier=0.0,
    max_grad_norm=1e-3,
    sample_rate=0.5,
    steps=10**6,
    target_delta=1e-5,
    num_examples=8,
)


@dataclass(frozen=True)
class Outcome:
    """What became of one batch.

    Attributes:
        verdict: one of `VERDICTS`.
        reason: the message of a refusal, the error of a failure.
        error: the largest relative error, 0 where nothing was released.
    """

    verdict: str
    reason: str = ""
    error: float = 0.0


def examine(subject: Subject, name: str = "book_keeping") -> dict[str, Outcome]:
    """Have an engine clip batches of all shapes: the outcome of each, by its description.

    One engine meets them all, as in training: first as the model comes, often with zeros that hide
    a part of it; then with every parameter moved, in evaluation mode; a few in training mode.
    """
    batches = [Texts.random(*s, is_padded=padded) for padded in (False, True) for s in SHAPES]
    few = [Texts.random(*s, is_padded=True) for s in ((1, 5), (4, 4), (3, 7))]
    judge = _Judge(subject, name)
    judge.train(subject.trains_only)
    found = {f"{batch}, as it comes": judge(batch) for batch in batches[: len(SHAPES)]}
    judge.move_parameters()
    found |= {str(batch): judge(batch) for batch in batches}
    judge.train(True)
    found |= {f"{batch}, training": judge(batch) for batch in few}
    judge.close()
    return found


class _Judge:
    """A training and its model, judged batch by batch; after an error a new one goes on."""

    def __init__(self, subject: Subject, name: str) -> None:
        self._subject, self._name = subject, name
        self._is_training = self._is_moved = False
        self._private: PrivateTraining | None = None
        self._start()

    def __call__(self, batch: Texts) -> Outcome:
        expected = self._by_loop(batch)
        try:
            if self._private is None:
                optimizer = torch.optim.SGD(self._model.parameters(), lr=0.0)
                self._private = privatize(self._model, optimizer, _PLAN, engine=self._name)
            found = self._released(self._private, batch)
        except UnsupportedLayerError as error:
            message, names = str(error), self._names()
            self._start()
            names_one = not names.isdisjoint(word.strip(".,;:") for word in message.split())
            is_right = names_one or "(the model itself)" in message
            return Outcome("refused" if is_right else "fails", message)
        except Exception as error:  # whatever it is
            self._start()
            return Outcome("fails", f"{type(error).__name__}: {error}")
        difference = _error(found, expected)
        if difference <= self._subject.tolerance:
            return Outcome("exact", error=difference)
        return Outcome("wrong", "another sum than the loop's", difference)

    def train(self, is_training: bool) -> None:
        self._is_training = is_training
        for model in (self._model, self._twin):
            model.train(is_training)

    def move_parameters(self) -> None:
        """As training would: in place, and at the end of a step."""
        self._is_moved = True
        for model in (self._model, self._twin):
            move_parameters(model)
        if self._private is not None:
            self._private.weights_changed()

    def close(self) -> None:
        if self._private is not None:
            self._private.close()
        self._private = None

    def _names(self) -> set[str]:
        """Of modules and parameters; a refusal must name one."""
        modules = {name for name, _ in self._model.named_modules() if name}
        return modules | {name for name, _ in self._model.named_parameters()}

    def _start(self) -> None:
        """With new models, as an error may have left the old ones in different states."""
        self.close()
        self._model, self._twin = self._subject.model(), self._subject.model()
        self.train(self._is_training)
        if self._is_moved:
            self.move_parameters()

    def _by_loop(self, batch: Texts) -> list[Tensor]:
        """The sum of clipped gradients, parameter by parameter."""
        into = {p: torch.zeros_like(p) for p in self._twin.parameters() if p.requires_grad}
        losses = self._subject.losses(self._twin, batch)
        outcome = PerExample(self._twin, _PLAN).clip(losses)
        assert outcome.total is not None
        outcome.total.add_to(into, scale=1.0)
        if self._is_moved:
            assert bool((outcome.norms > 0).all()), "an example without a gradient proves nothing"
        return list(into.values())

    def _released(self, private: PrivateTraining, batch: Texts) -> list[Tensor]:
        """The same, released without noise as a logical batch."""
        step = private.stepper(lambda texts: self._subject.losses(self._model, texts))
        step(batch)
        return list(private.gradients.values())


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of the sum for one parameter, against the length of that sum or a
    hundredth of the whole sum's, if that is more: gradients that vanish in theory are rounding
    alone."""
    whole = torch.stack([right.norm() for right in expected]).norm()
    floor = (whole / 100).clamp(min=torch.finfo(whole.dtype).tiny)  # a new model may have none
    errors = [
        (left - right).norm() / right.norm().clamp(min=floor)
        for left, right in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max().nan_to_num(nan=torch.inf))


def dependence(subject: Subject, batch: Texts, *, training: bool) -> float:
    """How much an example depends on the others of its batch: the largest relative change of a
    loss, or of one example's gradient, with other neighbours and, in evaluation mode, with none.
    (In training mode a smaller batch draws other random numbers.)"""
    losses, gradients = _by_example(subject, batch, training)
    changes = []
    for example in range(len(batch)):
        others = [(batch.among_others(example), example)]
        if not training:
            others.append((batch.alone(example), 0))
        for texts, place in others:
            new_losses, new_gradients = _by_example(subject, texts, training)
            changes.append(_change(losses[example], new_losses[place]))
            changes.append(_change(gradients[example], new_gradients[place]))
    return max(changes)


def _change(before: Tensor, after: Tensor) -> float:
    return float((before - after).norm() / before.norm())


def _by_example(
    subject: Subject, batch: Texts, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The losses, and the gradient of each; by a new model, so that chance repeats itself."""
    model = subject.model().train(training or subject.trains_only)
    move_parameters(model)
    losses = list(subject.losses(model, batch))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return losses, [_gradient(loss, parameters) for loss in losses]


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
    )
