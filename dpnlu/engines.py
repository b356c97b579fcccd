"""Engines: losses (B,) in, clipped gradient sums out.

All engines keep the same contract and differ in how they find an example's gradient:

- `BookKeeping`: one backward pass, norms and sums from the tape's records. The default.
- `PerExample`: one backward pass per example. The oracle: slow, right for whatever autograd can do.
- `Microbatch`: one ordinary backward pass per micro-batch, whose mean is clipped (eDP-SGD).
- `Opacus`: per-example gradients by Opacus' hooks. The reference.

Guarantee, of all of them: with norms computed to working precision, each clipping unit adds at most
`max_grad_norm` in L2 norm to what `add_clipped` accumulates per unit of `scale`. A unit whose
gradient is not finite adds exactly nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpnlu.clipped import Clipped, Parts, add_clipped, full_precision, gradient_norms
from dpnlu.clipping import CLIPPING_RULES
from dpnlu.course import Course
from dpnlu.gradients import Dense, combine
from dpnlu.plan import PrivacyPlan
from dpnlu.rules import OPERATIONS
from dpnlu.tape import Tape, UnsupportedLayerError
from dpnlu.validation import check_visible
from dpnlu.verification import Evidence, draw_shares, gather


class Engine(Protocol):
    """Finds, clips and adds up gradients.

    Attributes:
        takes_whole_batches: the losses must be those of all examples that were computed.
    """

    takes_whole_batches: bool

    def expect(self, batch_size: int | None) -> None:
        """Announce the size of the coming physical batch; None: it is not known beforehand."""

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None,
    ) -> Clipped | None:
        """Add scale * (sum of clipped gradients) to the buffers of `into`.

        Args:
            losses: (B,) losses, each depending on its own example only.
            closes_unit: whether the clipping unit is complete with these examples; None: they are
                a whole logical batch, and the engine forms the units.

        Returns:
            None while the unit is not complete.
        """

    def weights_changed(self) -> None:
        """The optimizer has stepped: what was derived from the weights is out of date."""

    def close(self) -> None:
        """Leave the model as it was."""


class BookKeeping:
    """Per-example clipping in one backward pass (Bu et al. 2023), without weight gradients.

    Whenever the forward pass takes a course not seen before, and always if it picks rows out of
    the batch by their values, the gradients are compared with plain automatic differentiation
    before anything is released.

    Attributes:
        model: whose forward passes are recorded.
        names: of its parameters.
        verifies: whether gradients are compared.
    """

    takes_whole_batches = True

    def __init__(self, model: nn.Module, plan: PrivacyPlan, *, verify: bool = True) -> None:
        check_visible(model)
        self.model = model
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.verifies = verify
        self._plan = plan
        self._tape = Tape(model, OPERATIONS)
        self._checked: set[Course] = set()

    def expect(self, batch_size: int | None) -> None:
        self._tape.expect(batch_size)

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped:
        try:
            if self.verifies:
                self._check(losses, list(into))
            parts = self.gradients(losses, list(into))
        finally:
            self._tape.clear()
        norms = gradient_norms(parts, losses)
        return self.add_found(parts, norms, losses, into=into, scale=scale)

    def gradients(
        self, losses: Tensor, parameters: list[nn.Parameter], *, retain_graph: bool = False
    ) -> Parts:
        """What the tape says of each parameter, of the forward pass that led to the losses."""
        with full_precision(losses.device):
            found = self._tape.trace.gradients(losses, retain_graph=retain_graph)
            return {parameter: combine(found.get(parameter, [])) for parameter in parameters}

    def add_found(
        self,
        parts: Parts,
        norms: Tensor,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
    ) -> Clipped:
        """`add_clipped`, of gradients and norms that were found before."""
        return add_clipped(parts, norms, losses, self._plan, into=into, scale=scale)

    def weights_changed(self) -> None:
        self._tape.forget_weights()

    def close(self) -> None:
        self._tape.close()

    # ---- for programs that are traced --------------------------------------------------------

    @contextmanager
    def tracing(self, batch_size: int) -> Iterator[None]:
        """For one forward pass whose tensors have no values, and what is made of its losses."""
        self._tape.forget_weights()
        self._tape.expect(batch_size, runs_once=True)
        try:
            yield
        finally:
            self._tape.forget_weights()
            self._tape.expect(batch_size)

    def course(self, losses: Tensor) -> Course:
        """The course of the forward pass that led to the losses."""
        return self._tape.trace.course(losses)

    def evidence(
        self, losses: Tensor, parameters: list[nn.Parameter], shares: Tensor, *, turn: int
    ) -> Evidence:
        """Compare with plain automatic differentiation; see `verification.gather`."""
        parts = self.gradients(losses, parameters, retain_graph=True)
        with full_precision(losses.device):
            return gather(parts, losses, shares, turn=turn)

    def _check(self, losses: Tensor, parameters: list[nn.Parameter]) -> None:
        """Check the batch, unless one of the same course was checked.

        A batch of one example proves nothing, nor does one with infinities; then a later batch is
        checked.

        Raises:
            UnsupportedLayerError: examples mix, or dimension 0 is not the batch.
        """
        if len(losses) < 2:
            return
        course = self.course(losses)
        if course in self._checked and not course.chooses_rows:
            return
        shares = draw_shares(losses)
        evidence = self.evidence(losses, parameters, shares, turn=len(self._checked))
        if evidence.proves([self.names[parameter] for parameter in parameters]):
            self._checked.add(course)


class PerExample:
    """One backward pass per example: slow, and right by construction.

    Examples that are not finite may spread through the computations that a batch shares. As it
    cannot tell whom they spoilt, this engine stops at a batch of several where that happened.
    """

    takes_whole_batches = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self._plan = plan

    def expect(self, batch_size: int | None) -> None:
        pass

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped:
        parameters = list(into)
        rule = CLIPPING_RULES[self._plan.clipping]
        norms, finite = [], []
        for loss in losses:
            gradients = _gradient(loss, parameters, keep_graph=True)
            norm = _norm(gradients)
            norms.append(norm)
            if len(losses) > 1 and not bool(torch.isfinite(norm)):
                raise RuntimeError(
                    "Expected finite gradients: engine 'per_example' cannot tell an infinite one "
                    "from those it spreads to; use engine='book_keeping', or one example at a time."
                )
            finite.append(torch.isfinite(norm) & torch.isfinite(loss))
            if not bool(finite[-1]):
                continue
            coefficient = rule(norm[None], self._plan.max_grad_norm)[0] * scale
            for parameter, gradient in zip(parameters, gradients, strict=True):
                into[parameter].add_(gradient * coefficient)
        return (
            Clipped(torch.stack(norms), torch.stack(finite)) if norms else Clipped.nothing(losses)
        )

    def weights_changed(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class _Unit:
    """The micro-batch that is being added up."""

    sums: list[Tensor] = field(default_factory=list)
    size: int = 0


class Microbatch:
    """Clips the mean gradient of each micro-batch (eDP-SGD, Dupuy et al. 2022).

    One ordinary backward pass each. One example can turn its micro-batch's mean from any vector
    into any other, so the sensitivity is 2C, which the plan accounts for.
    """

    takes_whole_batches = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self._plan = plan
        self._unit = _Unit()

    def expect(self, batch_size: int | None) -> None:
        if batch_size is None:
            self._unit = _Unit()  # the one before was broken off

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped | None:
        if closes_unit is None:
            return self._add_whole_batch(losses, into, scale)
        if len(losses):
            self._extend_unit(losses, list(into), keep_graph=False)
        return self._close_unit(into, scale) if closes_unit else None

    def _add_whole_batch(
        self, losses: Tensor, into: Mapping[nn.Parameter, Tensor], scale: float
    ) -> Clipped:
        """A logical batch in one piece: its examples are assigned here, independently."""
        assert self._plan.microbatches is not None
        group = torch.randint(self._plan.microbatches, (len(losses),), device=losses.device)
        closed = []
        for number in torch.unique(group):
            self._extend_unit(losses[group == number], list(into), keep_graph=True)
            closed.append(self._close_unit(into, scale))
        if not closed:
            return Clipped.nothing(losses)
        return Clipped(
            torch.cat([unit.norms for unit in closed]), torch.cat([unit.finite for unit in closed])
        )

    def _extend_unit(
        self, losses: Tensor, parameters: list[nn.Parameter], *, keep_graph: bool
    ) -> None:
        gradients = _gradient(losses.sum(), parameters, keep_graph=keep_graph)
        unit = self._unit
        unit.size += len(losses)
        if unit.sums:
            torch._foreach_add_(unit.sums, gradients)
        else:
            unit.sums = gradients

    def _close_unit(self, into: Mapping[nn.Parameter, Tensor], scale: float) -> Clipped:
        unit, self._unit = self._unit, _Unit()
        norm = _norm(unit.sums) / unit.size
        clipped = Clipped(norm[None], torch.isfinite(norm)[None])
        if clipped.non_finite:
            return clipped
        rule = CLIPPING_RULES[self._plan.clipping]
        coefficient = float(rule(norm[None], self._plan.max_grad_norm)) * scale / unit.size
        torch._foreach_add_(list(into.values()), unit.sums, alpha=coefficient)
        return clipped

    def weights_changed(self) -> None:
        pass

    def close(self) -> None:
        self._unit = _Unit()


class Opacus:
    """Per-example gradients written out by Opacus' hooks; to compare with, not to be fast.

    It supports the layers that Opacus supports, in training mode only; `nn.LSTM` and its kin would
    have to be exchanged for Opacus' own.
    """

    takes_whole_batches = True

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        from opacus.grad_sample import GradSampleHooks

        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters()):
                raise UnsupportedLayerError(
                    f"Expected layers that Opacus supports, got {type(module).__name__} at {name}: "
                    "use engine='book_keeping', or Opacus' own recurrent layers."
                )
        try:
            self._hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
        except NotImplementedError as error:
            raise UnsupportedLayerError(f"Opacus refuses this model: {error}") from None
        self._model, self._plan = model, plan

    def expect(self, batch_size: int | None) -> None:
        pass

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped:
        if not len(losses):
            return Clipped.nothing(losses)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for parameter in into:
            parameter.grad = None  # Opacus' gradients lie beside it
        self._check_forward_passes(list(into))
        parts: dict[nn.Parameter, list[Dense]] = {}
        for parameter in into:
            found: Any = getattr(parameter, "grad_sample", None)
            if found is not None:
                parts[parameter] = [Dense(found)]
        self._hooks.set_grad_sample_to_none()
        norms = gradient_norms(parts, losses)
        return add_clipped(parts, norms, losses, self._plan, into=into, scale=scale)

    def _check_forward_passes(self, parameters: list[nn.Parameter]) -> None:
        """Opacus counts forward passes, and delivers nothing while one has had no backward pass.

        Raises:
            RuntimeError: there is such a one.
        """
        counted: list[Any] = [p for p in parameters if getattr(p, "_forward_counter", 0)]
        if not counted:
            return
        for parameter in counted:
            parameter._forward_counter = 0
            vars(parameter).pop("_current_grad_sample", None)
        for module in self._model.modules():
            vars(module).pop("activations", None)
        self._hooks.set_grad_sample_to_none()  # of parameters that the other pass did not use
        raise RuntimeError(
            "Expected every forward pass to end in these losses, but Opacus has seen one more: run "
            "the model under torch.no_grad() for anything but training."
        )

    def weights_changed(self) -> None:
        pass

    def close(self) -> None:
        self._hooks.cleanup()
        for module in self._model.modules():
            vars(module).pop("activations", None)  # Opacus leaves its empty lists behind


ENGINES: dict[str, Callable[..., Engine]] = {
    "book_keeping": BookKeeping,
    "per_example": PerExample,
    "microbatch": Microbatch,
    "opacus": Opacus,
}


def _gradient(loss: Tensor, parameters: list[nn.Parameter], *, keep_graph: bool) -> list[Tensor]:
    """The gradient of a scalar, zero where it does not depend on a parameter."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=keep_graph)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def _norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm over several tensors together."""
    norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
    return norm
