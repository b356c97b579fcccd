"""How an engine does with a subject of the zoo, judged by the loop over examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpnlu.engines import ENGINES, Engine, PerExample
from dpnlu.plan import PrivacyPlan
from dpnlu.tape import UnsupportedLayerError
from dpnlu.validation import check_trainable
from tests.zoo.subjects import Subject, Texts

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
    """Have an engine clip batches of all shapes: the outcome of each, by its description."""
    grid = [Texts.random(*s, is_padded=padded) for padded in (False, True) for s in SHAPES]
    few = [Texts.random(*s, is_padded=True) for s in ((1, 5), (4, 4), (3, 7))]
    found = {}
    for mode, batches in (("", grid), (", training", few), (", as it comes", few)):
        model = subject.model(as_it_comes=mode == ", as it comes")
        model.train(mode == ", training" or subject.trains_only)
        for batch, outcome in zip(batches, _outcomes(subject, model, batches, name), strict=True):
            found[f"{batch}{mode}"] = outcome
    return found


def _outcomes(
    subject: Subject, model: nn.Module, batches: Iterable[Texts], name: str
) -> list[Outcome]:
    """One engine does them all, as in training; after an error a new one goes on."""
    found: list[Outcome] = []
    engine = None
    for batch in batches:
        expected = _clipped(PerExample(model, _PLAN), subject, model, batch)
        model.zero_grad()
        try:
            engine = engine or _engine(name, model)
            outcome = _judged(_clipped(engine, subject, model, batch), expected, subject.tolerance)
            if any(parameter.grad is not None for parameter in model.parameters()):
                outcome = Outcome("wrong", "gradients arrive in .grad, where nothing clips them")
        except UnsupportedLayerError as error:
            outcome = Outcome("refused", str(error))
        except Exception as error:  # the verdict on whatever it is
            outcome = Outcome("fails", f"{type(error).__name__}: {error}")
        if engine is not None and outcome.verdict in ("refused", "fails"):
            engine.close()
            engine = None
        found.append(outcome)
    if engine is not None:
        engine.close()
    return found


def _engine(name: str, model: nn.Module) -> Engine:
    check_trainable(model, torch.optim.SGD(model.parameters()))
    return ENGINES[name](model, _PLAN)


@dataclass(frozen=True)
class _Clipped:
    """Parameter by parameter, the sum of clipped gradients; and the norms (B,)."""

    sums: list[Tensor]
    norms: Tensor


def _clipped(engine: Engine, subject: Subject, model: nn.Module, batch: Texts) -> _Clipped:
    into = {p: torch.zeros_like(p) for p in model.parameters() if p.requires_grad}
    engine.expect(len(batch))
    losses = subject.losses(model, batch)
    clipped = engine.add_clipped(losses, into=into, scale=1.0, closes_unit=True)
    assert clipped is not None
    return _Clipped(list(into.values()), clipped.norms)


def _judged(found: _Clipped, expected: _Clipped, tolerance: float) -> Outcome:
    error = _error(found, expected)
    return Outcome("exact" if error <= tolerance else "wrong", error=error)


def _error(found: _Clipped, expected: _Clipped) -> float:
    """The largest relative error: of a norm, or of the sum for one parameter, against the length of
    that sum or a hundredth of the whole sum's, if that is more: gradients that vanish in theory are
    rounding alone."""
    assert bool((expected.norms > 0).all()), "an example without a gradient proves nothing"
    errors = [((found.norms - expected.norms) / expected.norms).abs().max()]
    whole = torch.stack([right.norm() for right in expected.sums]).norm()
    for left, right in zip(found.sums, expected.sums, strict=True):
        errors.append((left - right).norm() / torch.maximum(right.norm(), whole / 100))
    worst = torch.stack(errors).max()
    return float(worst.nan_to_num(nan=torch.inf))


def dependence(subject: Subject, batch: Texts) -> float:
    """How much an example depends on the others of its batch: the largest relative change of a
    loss, or of one example's gradient, between the batch and the example alone."""
    model = subject.model().train(subject.trains_only)
    parameters = [p for p in model.parameters() if p.requires_grad]
    together, changes = subject.losses(model, batch), []
    for example, loss in enumerate(together):
        alone = subject.losses(model, batch.alone(example))[0]
        changes.append((loss - alone).abs() / alone.abs())
        among = _gradient(loss, parameters)
        by_itself = _gradient(alone, parameters)
        changes.append((among - by_itself).norm() / by_itself.norm())
    return float(torch.stack(changes).max())


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])
