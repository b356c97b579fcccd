"""The recorder: what is known of the running forward pass, and where rules record what they find.

Every gradient rule of an operation that the tape sees is given to `Recorder.record`, every way of a
batch-independent tensor into the batch to `Recorder.enter`. The recorder sees no operation itself;
that is the tape's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpnlu.gradients.calls import Calls
from dpnlu.gradients.copies import Copies
from dpnlu.gradients.memory import Memory
from dpnlu.gradients.provenance import Provenance
from dpnlu.gradients.records import EntryPoint, EntryRule, GradientRule, Place, Record
from dpnlu.gradients.trace import Trace


class Recorder:
    """What was recorded of one batch, and what is known of it.

    Attributes:
        trainable: the parameters that are trained, by id.
        provenance: where tensors come from.
        calls: of outermost modules.
        trace: what was recorded.
        memory: what was computed from weights.
        copies: of batch-independent tensors, by the id of the copies.
        running: name and arguments of the modules that run at the moment, outermost first.
        is_checkpointed: whether activations are computed again in the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trainable = {id(p): p for p in model.parameters() if p.requires_grad}
        self.provenance = Provenance(model)
        self.calls = Calls(self.provenance)
        self.memory = Memory()
        self.running: list[tuple[str, tuple[Any, ...]]] = []
        self._reset()

    def clear(self) -> None:
        """Forget what was recorded, and release its memory."""
        self._reset()
        self.calls.clear()
        self.memory.forget_pass()
        self.provenance.forget()

    def _reset(self) -> None:
        self.trace = Trace()
        self.copies: dict[int, Copies] = {}
        self.is_checkpointed = False

    def record(
        self, output: Tensor, rule: GradientRule, *, dims: Sequence[int] | None = None
    ) -> None:
        """Record that an operation applied weights to the batch.

        Args:
            output: what it returned.
            rule: what to call with the gradient of `output`.
            dims: the dimensions of `output` that may hold the examples; None: all but the last.
        """
        self.is_checkpointed |= is_inside_checkpoint()
        edge, base = get_gradient_edge(output), output._base
        strides = None
        is_whole = base is not None and base.numel() == output.numel() and base.grad_fn is not None
        if base is not None and is_whole and base.is_contiguous():
            # A later operation in place gives the view another node, but not its base.
            edge, strides = get_gradient_edge(base), output.stride()
        place = Place(
            edge=edge,
            shape=output.shape,
            strides=strides,
            dims=range(max(1, output.dim() - 1)) if dims is None else dims,
            module=self.module,
            dtype=output.dtype,
        )
        self.trace.records.append(Record(place, rule))

    def enter(
        self,
        target: Tensor,
        stand_in: Tensor,
        rule: EntryRule,
        *,
        dims: Sequence[int] = (0,),
        aligned: bool = False,
        origin: GradientEdge | None = None,
    ) -> None:
        """Record that the batch-independent tensor `target` enters the batch.

        Args:
            stand_in: what enters in its place: a view, or copies, with a gradient of their own.
            rule: the gradient of `stand_in` -> per-example gradients of `target`.
            dims: the dimensions of `stand_in` that may hold the examples.
            aligned: `stand_in` has the target's shape, and every example has rows of its own.
            origin: where back-propagation from `target` continues; None: at its present edge.
        """
        self.is_checkpointed |= is_inside_checkpoint()
        place = Place(
            edge=get_gradient_edge(stand_in),
            shape=stand_in.shape,
            dims=dims,
            module=self.module,
            dtype=stand_in.dtype,
        )
        self.trace.entry_points.append(
            EntryPoint(
                place=place,
                target=target,
                origin=origin or get_gradient_edge(target),
                rule=rule,
                aligned=aligned,
            )
        )

    def is_batch_independent(self, tensor: Tensor) -> bool:
        """Whether the tensor is computed from parameters and constants alone."""
        return self.provenance.is_batch_independent(tensor)

    @property
    def module(self) -> str:
        """Name of the module that runs at the moment, for messages."""
        if not self.running:
            return "(the loss function)"
        return self.running[-1][0] or "(the model itself)"

    @property
    def module_inputs(self) -> tuple[Any, ...]:
        """What the module that runs at the moment was called with; nothing outside of modules."""
        return self.running[-1][1] if self.running else ()


def is_inside_checkpoint() -> bool:
    """Whether activations that are saved now may be dropped, and computed again in the backward
    pass."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is not None
