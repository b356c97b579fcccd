"""Engines: losses (B,) in, clipped gradient sums out.

All engines keep the same contract and differ in how they find an example's gradient:

- `BookKeeping`: one backward pass, norms and sums from the tape's records. The default.
- `PerExample`: one backward pass per example. The oracle: slow, right for whatever autograd can do.
- `Microbatch`: one ordinary backward pass per micro-batch, whose mean is clipped (eDP-SGD).
- `Opacus`: per-example gradients by Opacus' hooks. The reference.

Guarantee, of all of them, where the loss of an example depends on that example alone: each clipping
unit adds at most `max_grad_norm` in L2 norm to what `add_clipped` accumulates per unit of `scale`,
rounding of its norm included. A unit whose gradient is not finite adds exactly nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpnlu.batches import detached, leaves_of
from dpnlu.checks import Checks, own_generator
from dpnlu.clipped import Clipped, Parts, add_clipped, gradient_norms
from dpnlu.clipping import CLIPPING_RULES
from dpnlu.errors import UnsupportedLayerError
from dpnlu.gradients import Dense, SquaredNorms
from dpnlu.layout import Layout
from dpnlu.plan import PrivacyPlan
from dpnlu.rounding import full_precision, growth, squared_sums, squared_terms
from dpnlu.rules import OPERATIONS
from dpnlu.signature import Edge, Signature, signature_of, walk
from dpnlu.tape import Call, Tape
from dpnlu.uses import combine
from dpnlu.validation import check_batch_size, check_losses, check_visible
from dpnlu.verification import (
    Evidence,
    check_seen,
    do_rows_agree,
    find_layouts,
    gather,
)


class Engine(Protocol):
    """Finds, clips and adds up gradients.

    Attributes:
        takes_whole_batches: the losses must be those of all examples that were computed.
        counts_forward_passes: of each that keeps a graph the losses must be stepped on.
    """

    takes_whole_batches: bool
    counts_forward_passes: bool

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        """Announce the coming physical batch: its size, None if it is not known beforehand, and
        its data."""

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

    That the tape saw every use of a parameter is checked for every batch, and before anything is
    released, as often as `dpnlu.checks` says, that examples do not mix and that gradients are
    those of plain automatic differentiation.

    Attributes:
        model: whose forward passes are recorded.
        names: of its trainable parameters.
        checks: when to check; None: never.
        signature: of the last batch; None: it was not looked at.
        coarsest: distance from 1 to the next number, of the coarsest gradients of that batch.
    """

    takes_whole_batches = True
    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan, *, verify: bool = True) -> None:
        check_visible(model)
        self.model = model
        self.names: dict[Tensor, str] = {
            p: name for name, p in model.named_parameters() if p.requires_grad
        }
        self.checks = Checks(model) if verify else None
        self.signature: Signature | None = None
        self.coarsest = 0.0
        self._plan = plan
        self._generator = own_generator()
        self._tape = Tape(model, OPERATIONS)

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        self._tape.expect(batch_size, batch)

    @property
    def calls(self) -> list[Call]:
        """The forward passes of outermost modules that were recorded."""
        return self._tape.calls

    def recording(self, batch: Any, batch_size: int | None) -> AbstractContextManager[None]:
        """In here, whatever is computed of a batch is seen, in modules and outside of them; see
        `Tape.recording`."""
        return self._tape.recording(batch, batch_size)

    def losses(
        self, losses_of: Callable[[Any], Tensor], batch: Any, batch_size: int | None
    ) -> Tensor:
        """Have the losses of a batch computed, and see all of it.

        Args:
            batch_size: None: as many as there are losses.
        """
        with self.recording(batch, batch_size):
            losses = losses_of(batch)
        check_losses(losses, batch_size)
        if self._tape.batch_size != len(losses):
            return self.losses(losses_of, batch, len(losses))
        return losses

    def run(self, call: Call, given: Any, count: int) -> tuple[Any, Signature | None]:
        """Have a module called again with other arguments, of `count` examples.

        Returns:
            What it returns, and what was done; None if nothing of that can be differentiated.
        """
        self._tape.expect(count)
        try:
            outputs = call.repeated(*detached(given))
            leaves = [leaf for leaf in leaves_of(outputs) if leaf.requires_grad]
            if not leaves:
                return outputs, None
            total = torch.stack([leaf.sum().double() for leaf in leaves]).sum()
            return outputs, self._signature(list(walk(total)), count)
        finally:
            self._tape.clear()

    def norms(self, losses: Tensor) -> Tensor:
        """(B,) norms of the gradients of losses that were recorded; nothing is added up."""
        trace = self._tape.trace
        try:
            self.signature = self.signature_of(losses)
            with self._tape.on_the_way_back():
                arrived = trace.backward(losses, retain_graph=True)
                expected = trace.expected_layouts(arrived, len(losses))
                layouts = find_layouts(
                    trace, losses, arrived, expected, chooses_rows=True, generator=self._generator
                )
                return self._parts(arrived, layouts, list(self.names), losses)[1].values.sqrt()
        finally:
            self._tape.clear()

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped:
        try:
            with self._tape.on_the_way_back():
                parts, norms = self._found(losses, list(into))
        finally:
            self._tape.clear()
        return self.add_found(parts, norms, losses, into=into, scale=scale)

    def add_found(
        self,
        parts: Parts,
        norms: SquaredNorms,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
    ) -> Clipped:
        """`add_clipped`, of gradients and norms that were found before."""
        return add_clipped(parts, norms, losses, self._plan, into=into, scale=scale)

    def weights_changed(self) -> None:
        self._tape.weights_changed()
        if self.checks is not None:
            self.checks.weights_changed()

    def close(self) -> None:
        self._tape.close()

    # ---- for programs that are traced --------------------------------------------------------

    @property
    def is_checkpointed(self) -> bool:
        """Whether the forward pass that was recorded computes activations anew on the way back."""
        return self._tape.is_checkpointed

    def found_unchecked(
        self, losses: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Parts, SquaredNorms]:
        """The gradients that the tape saw, with their norms."""
        trace = self._tape.trace
        arrived = trace.backward(losses)
        return self._parts(arrived, trace.usual_layouts(arrived, len(losses)), parameters, losses)

    def evidence(
        self, losses: Tensor, parameters: list[nn.Parameter], weights: Tensor, draws: Tensor
    ) -> tuple[Tensor, Evidence]:
        """Whether examples keep apart where they usually lie, (), and what `gather` finds; nothing
        looks at a value."""
        trace = self._tape.trace
        arrived = trace.backward(losses, retain_graph=True)
        layouts = trace.usual_layouts(arrived, len(losses))
        agree = do_rows_agree(trace, losses, arrived, layouts, weights)
        parts, norms = self._parts(arrived, layouts, parameters, losses)
        bound = self._plan.max_grad_norm
        return agree, gather(parts, norms, losses, draws, arrived=arrived, bound=bound)

    def signature_of(self, losses: Tensor) -> Signature:
        """What was done in the forward pass that led to the losses, all of which was seen.

        Raises:
            UnsupportedLayerError: something was not.
        """
        edges = list(walk(losses))
        check_seen(edges, self._tape.trace, self._tape.free_learned(), self.names)
        return self._signature(edges, len(losses))

    # ------------------------------------------------------------------------------------------

    def _found(self, losses: Tensor, parameters: list[nn.Parameter]) -> tuple[Parts, SquaredNorms]:
        """The gradients that the tape saw, with their norms, and checked.

        Raises:
            UnsupportedLayerError: a parameter is used where the tape does not see it, examples mix,
                or the gradients are not those of plain automatic differentiation.
        """
        trace, batch = self._tape.trace, len(losses)
        self.signature = None
        if self.checks is None or not batch:
            return self.found_unchecked(losses, parameters)
        check_batch_size(self._tape.batch_size, batch)
        self.signature = signature = self.signature_of(losses)
        check_rows, check_parameters = self.checks.meet(
            signature, chooses_rows=signature.chooses_rows, is_doubtful=signature.is_doubtful
        )
        check_rows = check_rows and batch > 1
        with nothing_accumulated(parameters):
            arrived = trace.backward(losses, retain_graph=check_rows or check_parameters)
        self.coarsest = max((torch.finfo(g.dtype).eps for g in arrived if g is not None), default=0)
        known = self.checks.layouts(signature, batch)
        if check_rows:
            layouts = find_layouts(
                trace,
                losses,
                arrived,
                known or trace.expected_layouts(arrived, batch),
                chooses_rows=signature.may_choose_rows,
                generator=self._generator,
            )
        else:
            layouts = known or trace.usual_layouts(arrived, batch)
        parts, norms = self._parts(arrived, layouts, parameters, losses)
        if check_rows and bool(torch.isfinite(norms.values).all()):
            self.checks.show_rows(signature, layouts)
        if check_parameters:
            draws = torch.rand(batch, generator=self._generator).to(losses)
            evidence = gather(
                parts, norms, losses, draws, arrived=arrived, bound=self._plan.max_grad_norm
            )
            if evidence.proves([self.names[parameter] for parameter in parameters]):
                self.checks.show_parameters(signature)
        return parts, norms

    def _parts(
        self,
        arrived: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        parameters: Sequence[Tensor],
        losses: Tensor,
    ) -> tuple[Parts, SquaredNorms]:
        with full_precision(losses.device):
            found = self._tape.trace.gradients(arrived, layouts)
            parts = {parameter: combine(found.get(parameter, [])) for parameter in parameters}
        return parts, gradient_norms(parts, losses)

    def _signature(self, edges: Sequence[Edge], batch: int) -> Signature:
        """What was done in the forward pass, and how the tape understood it: which operation used
        parameters, on how many entries per example."""
        tape = self._tape
        graph = signature_of(edges, batch, tape.is_free_node, may_unpack=not tape.is_checkpointed)
        understood = (place.described(batch) for place in tape.trace.places)
        free = f"{len(tape.trace.lookups)} {len(tape.trace.products)}"
        return replace(graph, steps=(*graph.steps, *understood, free))


class PerExample:
    """One backward pass per example: slow, and right by construction.

    Examples that are not finite may spread through the computations that a batch shares. As it
    cannot tell whom they spoilt, this engine stops at a batch of several where that happened.
    """

    takes_whole_batches = False
    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self._plan = plan

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
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
            with nothing_accumulated(parameters):
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
    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        self._plan = plan
        self._unit = _Unit()

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
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
    counts_forward_passes = True

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

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
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
        parts: dict[Tensor, list[Dense]] = {}
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


@contextmanager
def nothing_accumulated(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Refuse backward passes that leave gradients at parameters, where nothing clips them.

    Raises:
        UnsupportedLayerError: one does.
    """
    before = {parameter for parameter in parameters if parameter.grad is not None}
    yield
    if any(parameter.grad is not None for parameter in parameters if parameter not in before):
        for parameter in set(parameters) - before:
            parameter.grad = None
        raise UnsupportedLayerError(
            "Expected gradients that automatic differentiation returns, got some that the model's "
            "own autograd function adds to parameters by calling backward() inside (reversible "
            "layers do): switch to layers without it, or freeze their parameters."
        )


def _gradient(loss: Tensor, parameters: list[nn.Parameter], *, keep_graph: bool) -> list[Tensor]:
    """The gradient of a scalar, zero where it does not depend on a parameter."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=keep_graph)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def _norm(gradients: list[Tensor]) -> Tensor:
    """() L2 norm over several tensors together, rounded up."""
    squares = torch.stack([squared_sums(full[None]).sum() for full in map(_full, gradients)])
    terms = len(gradients) + max(squared_terms(gradient.numel()) for gradient in gradients)
    return (squares.sum() * (1 + growth(terms, squares.dtype))).sqrt()


_HALF = (torch.float16, torch.bfloat16)


def _full(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype in _HALF else gradient
