"""Per-example clipping in one backward pass, without weight gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.engines.base import without_fillers
from dpnlu.engines.batches import detached, leaves_of
from dpnlu.engines.checks import Checks, own_generator
from dpnlu.engines.clipped import Parts, clip_gradients, gradient_norms
from dpnlu.engines.clipper import Clipper
from dpnlu.engines.coverage import check_seen
from dpnlu.engines.free_memory import hand_back
from dpnlu.engines.inspection import Comparison, Sketch, all_pieces, compare, sketch
from dpnlu.engines.outcome import ClipOutcome, ClippedSum, OpenUnit
from dpnlu.engines.plain import nothing_accumulated
from dpnlu.engines.refusals import check_batch_size, check_losses, check_visible
from dpnlu.engines.separation import Separated, do_rows_agree, layouts_of, separate
from dpnlu.engines.user_gradients import of_users, shares, user_sums
from dpnlu.engines.verification import Evidence, gather, scales
from dpnlu.gradients.calls import Call
from dpnlu.gradients.forms import Gradients, SquaredNorms
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.rounding import coarsest_of, full_precision
from dpnlu.gradients.rules import OPERATIONS
from dpnlu.gradients.signature import Edge, Signature, signature_of, walk
from dpnlu.gradients.tape import Tape
from dpnlu.gradients.uses import combine
from dpnlu.mechanism.plan import PrivacyPlan


class BookKeeping:
    """Per-example clipping in one backward pass (Bu et al. 2023), without weight gradients.

    That the tape saw every use of a parameter is checked for every batch, and before anything is
    released, as often as `dpnlu.engines.checks` says, that examples do not mix and that gradients
    are those of plain automatic differentiation.

    Attributes:
        model: whose forward passes are recorded.
        clipper: the plan's clipping rule for its parameters.
        names: of its trainable parameters.
        checks: when to check; None: never.
        signature: of the last batch; None: it was not looked at.
        coarsest: distance from 1 to the next number, of the coarsest gradients of that batch.
    """

    counts_forward_passes = False

    def __init__(self, model: nn.Module, plan: PrivacyPlan, *, verify: bool = True) -> None:
        check_visible(model)
        self.model = model
        self.clipper = Clipper.of(model, plan)
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
        """Announce the coming physical batch: its size, None if it is not known beforehand, and
        its data."""
        self._tape.expect(batch_size, batch)

    @property
    def exact_signature(self) -> Signature | None:
        """What was done with the last batch; None if that is not known, or depends on values."""
        signature = self.signature
        return None if signature is None or signature.may_choose_rows else signature

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
        trace, batch = self._tape.trace, len(losses)
        hand_back(trace)
        try:
            self.signature = signature = self.signature_of(losses)
            known = None
            if self.checks is not None and not signature.may_choose_rows:
                known = self.checks.layouts(signature, batch)
            with self._tape.during_backward():
                layouts = known or layouts_of(self._separated(losses, None, True))
                arrived = trace.backward(losses)
                parts = self._parts(arrived, layouts, losses)
                found = gradient_norms(parts, losses).values.sqrt()
            del arrived, parts
            hand_back(trace)
            return found
        finally:
            self._tape.clear()

    def clip(
        self,
        losses: Tensor,
        *,
        kept: int | None = None,
        unit: OpenUnit | None = None,
        closes_unit: bool = True,
        users: Tensor | None = None,
    ) -> ClipOutcome:
        losses = without_fillers(losses, kept)
        if users is not None:
            losses = shares(losses, users)
        try:
            with self._tape.during_backward():
                takes_norms = users is None and not self.clipper.is_divided
                found, norms = self._found(losses, takes_norms=takes_norms)
        finally:
            self._tape.clear()
        if users is None:
            return self.clip_found(found, norms, losses).first(kept)
        parts, losses = of_users(found, users), user_sums(losses.detach(), users)
        return self.clip_found(parts, None, losses).first(kept)

    def clip_found(
        self,
        parts: Parts,
        norms: SquaredNorms | None,
        losses: Tensor,
        *,
        sums: Callable[[Tensor], ClippedSum] | None = None,
    ) -> ClipOutcome:
        """`clip`, of gradients and, unless they are not known, norms that were found before; see
        `clip_gradients`."""
        return clip_gradients(parts, norms, losses, self.clipper, sums=sums)

    def weights_changed(self) -> None:
        """Weights are not what they were: forget what was derived from them."""
        self._tape.weights_changed()
        if self.checks is not None:
            self.checks.weights_changed()

    def close(self) -> None:
        """Leave the model as it was."""
        self._tape.close()

    # ---- for programs that are traced --------------------------------------------------------

    @property
    def is_checkpointed(self) -> bool:
        """Whether the forward pass that was recorded computes activations anew on the way back."""
        return self._tape.is_checkpointed

    def found_unchecked(self, losses: Tensor) -> tuple[Parts, SquaredNorms]:
        """The gradients that the tape saw, with their norms."""
        trace = self._tape.trace
        arrived = trace.backward(losses)
        parts = self._parts(arrived, trace.usual_layouts(len(losses), arrived), losses)
        return parts, gradient_norms(parts, losses)

    def evidence(self, losses: Tensor, weights: Tensor, draws: Tensor) -> tuple[Tensor, Evidence]:
        """Whether examples keep apart where they usually lie, (), and what `gather` finds; nothing
        looks at a value."""
        trace = self._tape.trace
        arrived = trace.backward(losses, retain_graph=True)
        layouts = trace.usual_layouts(len(losses), arrived)
        agree = do_rows_agree(trace, losses, arrived, layouts, weights)
        parts = self._parts(arrived, layouts, losses)
        norms = gradient_norms(parts, losses)
        every = Separated(list(range(len(layouts))), arrived, layouts)
        compared = self._compared(losses, draws, sketch(trace, losses, [every]))
        return agree, gather(parts, norms, losses, draws, compared)

    def signature_of(self, losses: Tensor) -> Signature:
        """What was done in the forward pass that led to the losses, all of which was seen.

        Raises:
            UnsupportedLayerError: something was not.
        """
        edges = list(walk(losses))
        check_seen(edges, self._tape.trace, self._tape.computed_weights(), self.names)
        return self._signature(edges, len(losses))

    # ------------------------------------------------------------------------------------------

    def _found(
        self, losses: Tensor, *, takes_norms: bool
    ) -> tuple[dict[Tensor, Sequence[Gradients]], SquaredNorms | None]:
        """The gradients that the tape saw, with their norms, and checked.

        Args:
            takes_norms: False: norms are computed, and returned, only where checks need them.

        Raises:
            UnsupportedLayerError: a parameter is used where the tape does not see it, examples mix,
                or the gradients are not those of plain automatic differentiation.
        """
        trace, batch = self._tape.trace, len(losses)
        self.signature = None
        if self.checks is None or not batch:
            arrived = trace.backward(losses)
            parts = self._parts(arrived, trace.usual_layouts(batch, arrived), losses)
            return parts, gradient_norms(parts, losses) if takes_norms else None
        check_batch_size(self._tape.batch_size, batch)
        self.signature = signature = self.signature_of(losses)
        check_rows, check_parameters = self.checks.observe(
            signature, chooses_rows=signature.chooses_rows, is_doubtful=signature.is_doubtful
        )
        check_rows = check_rows and batch > 1
        known = self.checks.layouts(signature, batch)
        comparison = None
        with nothing_accumulated(list(self.names)):
            if check_rows or check_parameters:
                hand_back(trace)
                pieces = (
                    self._separated(losses, known, signature.may_choose_rows)
                    if check_rows
                    else all_pieces(trace, losses, known or trace.usual_layouts(batch))
                )
                seen = sketch(trace, losses, pieces)
                known = seen.in_order
                if check_parameters:
                    draws = torch.rand(batch, generator=self._generator).to(losses)
                    comparison = self._compared(losses, draws, seen)
            arrived = trace.backward(losses)
        self.coarsest = coarsest_of(arrived)
        layouts = known or trace.usual_layouts(batch, arrived)
        parts = self._parts(arrived, layouts, losses)
        if not (takes_norms or check_rows or comparison is not None):
            return parts, None
        norms = gradient_norms(parts, losses)
        if check_rows and bool(torch.isfinite(norms.values).all()):
            self.checks.show_rows(signature, layouts)
        if comparison is not None and self._proves(parts, norms, losses, draws, comparison):
            self.checks.show_parameters(signature)
        return parts, norms

    def _proves(
        self,
        parts: Parts,
        norms: SquaredNorms,
        losses: Tensor,
        draws: Tensor,
        comparison: Comparison,
    ) -> bool:
        """See `Evidence.proves`."""
        hand_back(self._tape.trace)
        evidence = gather(parts, norms, losses, draws, comparison)
        proves = evidence.proves(list(self.names.values()))
        del evidence
        hand_back(self._tape.trace)
        return proves

    def _separated(
        self, losses: Tensor, known: list[Layout] | None, chooses_rows: bool
    ) -> Iterator[Separated]:
        trace = self._tape.trace
        expected = known or trace.expected_layouts(len(losses))
        return separate(
            trace, losses, expected, chooses_rows=chooses_rows, generator=self._generator
        )

    def _compared(self, losses: Tensor, draws: Tensor, seen: Sketch) -> Comparison:
        weights = scales(seen.squares, draws, bound=self._plan.max_grad_norm)
        return compare(self._tape.trace, losses, weights, seen, list(self.names))

    def _parts(
        self,
        arrived: Sequence[Tensor | None],
        layouts: Sequence[Layout],
        losses: Tensor,
    ) -> dict[Tensor, Sequence[Gradients]]:
        with full_precision(losses.device):
            found = self._tape.trace.gradients(arrived, layouts)
            return {parameter: combine(found.get(parameter, [])) for parameter in self.names}

    def _signature(self, edges: Sequence[Edge], batch: int) -> Signature:
        """What was done in the forward pass, and how the tape understood it: which operation used
        parameters, on how many entries per example."""
        tape = self._tape
        graph = signature_of(
            edges, batch, tape.is_batch_independent_node, may_unpack=not tape.is_checkpointed
        )
        understood = (place.described(batch) for place in tape.trace.places)
        independent = f"{len(tape.trace.lookups)} {len(tape.trace.products)}"
        return replace(graph, steps=(*graph.steps, *understood, independent))
