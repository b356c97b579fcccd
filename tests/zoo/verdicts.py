"""How an engine does with a subject of the zoo, judged by the loop over examples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpnlu.engines import ENGINES, Engine, PerExample
from dpnlu.plan import PrivacyPlan
from dpnlu.tape import UnsupportedLayerError
from dpnlu.validation import check_trainable
from tests.zoo.subjects import Subject, Texts, move_parameters

# From the worst on.
VERDICTS = ("wrong", "fails", "refused", "exact")

# As many examples as positions, layers, heads, labels; and as many as divide these.
SHAPES = tuple(itertools.product((4, 2, 3, 1), (4, 5, 7)))

# Clips every example, each by a factor of its own.
_PLAN = PrivacyPlan(
    noise_multiplier=1.0,
    max_grad_norm=1e-3,
    sample_rate=0.5,
    steps=1,
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
    """An engine and its model, judged batch by batch; after an error a new engine goes on."""

    def __init__(self, subject: Subject, name: str) -> None:
        self._subject, self._name = subject, name
        self._is_training = self._is_moved = False
        self._engine: Engine | None = None
        self._start()

    def __call__(self, batch: Texts) -> Outcome:
        expected = self._clipped(PerExample(self._twin, _PLAN), self._twin, batch)
        if self._is_moved:
            assert bool((expected.norms > 0).all()), "an example without a gradient proves nothing"
        try:
            if self._engine is None:
                check_trainable(self._model, torch.optim.SGD(self._model.parameters()))
                self._engine = ENGINES[self._name](self._model, _PLAN)
            found = self._clipped(self._engine, self._model, batch)
        except UnsupportedLayerError as error:
            message, names = str(error), self._names()
            self._start()
            names_one = not names.isdisjoint(word.strip(".,;:") for word in message.split())
            is_right = names_one or "(the model itself)" in message
            return Outcome("refused" if is_right else "fails", message)
        except Exception as error:  # whatever it is
            self._start()
            return Outcome("fails", f"{type(error).__name__}: {error}")
        if any(parameter.grad is not None for parameter in self._model.parameters()):
            return Outcome("wrong", "gradients arrive in .grad, where nothing clips them")
        difference = _error(found, expected)
        if difference <= self._subject.tolerance:
            return Outcome("exact", error=difference)
        return Outcome("wrong", "another sum or norm than the loop's", difference)

    def train(self, is_training: bool) -> None:
        self._is_training = is_training
        for model in (self._model, self._twin):
            model.train(is_training)

    def move_parameters(self) -> None:
        """As training would: in place, and the engine is told."""
        self._is_moved = True
        for model in (self._model, self._twin):
            move_parameters(model)
        if self._engine is not None:
            self._engine.weights_changed()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

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

    def _clipped(self, engine: Engine, model: nn.Module, batch: Texts) -> _Clipped:
        into = {p: torch.zeros_like(p) for p in model.parameters() if p.requires_grad}
        engine.expect(len(batch))
        losses = self._subject.losses(model, batch)
        clipped = engine.add_clipped(losses, into=into, scale=1.0, closes_unit=True)
        assert clipped is not None
        return _Clipped(list(into.values()), clipped.norms)


@dataclass(frozen=True)
class _Clipped:
    """Parameter by parameter, the sum of clipped gradients; and the norms (B,)."""

    sums: list[Tensor]
    norms: Tensor


def _error(found: _Clipped, expected: _Clipped) -> float:
    """The largest relative error: of a norm, or of the sum for one parameter, against the length of
    that sum or a hundredth of the whole sum's, if that is more: gradients that vanish in theory are
    rounding alone."""
    whole = torch.stack([right.norm() for right in expected.sums]).norm()
    floor = (whole / 100).clamp(min=torch.finfo(whole.dtype).tiny)  # a new model may have none
    longest = expected.norms.max().clamp(min=torch.finfo(whole.dtype).tiny)
    errors = [
        ((found.norms - expected.norms) / expected.norms.clamp(min=longest / 100)).abs().max()
    ]
    for left, right in zip(found.sums, expected.sums, strict=True):
        errors.append((left - right).norm() / right.norm().clamp(min=floor))
    worst = torch.stack(errors).max()
    return float(worst.nan_to_num(nan=torch.inf))


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
