"""The tape: sees every torch operation of a forward pass, and has those recorded that matter.

An operation that applies a trainable parameter to the examples is recorded: the gradient edge of
its output, and the gradient rule that turns the gradient of that output into per-example gradients
of the parameter. Modules, parameters and tensors stay as they are.

Two kinds of tensors are told apart by what they are computed from (`dpnlu.gradients.provenance`):

- *batched*: computed from the examples.
- *batch-independent*: parameters, buffers, constants, and what is computed from these alone, such
  as position embeddings, a relative attention bias or a normalised weight. Those of them that
  require gradients are *learned*. Back-propagation adds up their gradient over the examples, so
  it is recorded where they enter the batch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from dpnlu.gradients.calls import Call
from dpnlu.gradients.entering import prepare_write, stand_in_for
from dpnlu.gradients.errors import UnsupportedLayerError, named, naming_refusals
from dpnlu.gradients.independent import note_operation, note_parameters
from dpnlu.gradients.nodes import OF_A_PARAMETER
from dpnlu.gradients.operations import (
    INSPECTIONS,
    LayerRule,
    Operations,
    replaced,
    tensors_in,
    values_of,
    with_numbers,
    writes_in_place,
)
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.records import GradientRule
from dpnlu.gradients.trace import Trace

# Of the next node of the autograd graph that will be made.
_next_number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


class Tape(TorchFunctionMode):
    """Records the forward passes of one model.

    The tape is active inside the forward of the model and of each of its modules, through forward
    hooks that `close` removes, and inside `recording`.
    """

    def __init__(self, model: nn.Module, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        self._recorder = Recorder(model)
        self._is_active = False
        self._is_active_for_module = False  # the outermost one that runs
        self._hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(self._opening(name), with_kwargs=True),
                module.register_forward_hook(self._closing, always_call=True),
            )
        ]

    @property
    def trace(self) -> Trace:
        """What was recorded."""
        return self._recorder.trace

    @property
    def calls(self) -> list[Call]:
        """The calls of outermost modules that were recorded."""
        return self._recorder.calls.made

    @property
    def batch_size(self) -> int | None:
        """Number of examples; None: not known yet."""
        return self._recorder.calls.batch_size

    @property
    def is_checkpointed(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self._recorder.is_checkpointed

    def close(self) -> None:
        """Remove the hooks and forget everything recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.clear()
        self.weights_changed()

    def weights_changed(self) -> None:
        """Release the memory of what was prepared from the weights: it is no longer valid."""
        self._recorder.memory.forget_prepared()

    def clear(self) -> None:
        """Forget what was recorded, and release its memory."""
        self._recorder.clear()

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        """Forget what was recorded, and announce the batch of the coming forward passes.

        Args:
            batch_size: number of examples; None: dimension 0 of the first input says it.
            batch: what holds the examples; it may be moved or changed before a module is called
                with it.
        """
        self.clear()
        self._recorder.calls.expect(batch_size, batch)

    @contextmanager
    def recording(self, batch: Any, batch_size: int | None = None) -> Iterator[None]:
        """See every operation in here, inside modules and outside of them.

        Args:
            batch: what holds the examples; all other tensors from outside are batch-independent.
            batch_size: number of examples; None: dimension 0 of the first tensor says it.
        """
        self.expect(batch_size)
        self._recorder.calls.hand_over(batch, batch_size)
        with self._active(), _nothing_compiled(), self:
            yield

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Run backward passes in here: activations that are computed again are then computed by the
        same operations as before."""
        if not self.is_checkpointed:
            yield
            return
        with self._active(), self:
            yield

    def is_batch_independent_node(self, node: Node) -> bool:
        """Whether the output of a node of the autograd graph is known to be batch-independent."""
        provenance = self._recorder.provenance
        if node.name() == OF_A_PARAMETER:
            return provenance.is_batch_independent(node.variable)  # type: ignore[attr-defined]
        return node in self.trace.seen and node not in provenance.batched

    def computed_weights(self) -> list[Tensor]:
        """The batch-independent tensors that were computed from trainable parameters."""
        return self._recorder.provenance.computed_weights()

    # ---- operations --------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in INSPECTIONS:
            return func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1:
            return self._run_again(func, args, kwargs or {})
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, record what learned tensors do in it, and note what it made."""
        recorder = self._recorder
        provenance = recorder.provenance
        if func is Tensor.__getitem__ and args[0].requires_grad:
            if provenance.is_batch_independent(args[0]):
                args = (args[0], with_numbers(args[1]))
        start = _next_number()
        try:
            batched, learned = self._told_apart(values_of(func, args, kwargs))
            if batched and learned:
                output = self._apply_learned(func, args, kwargs, batched, learned)
            elif batched:
                rearrange = self._operations.rearrangements.get(func)
                output = NotImplemented if rearrange is None else rearrange(*args, **kwargs)
                if output is NotImplemented:
                    output = func(*args, **kwargs)
            else:
                output = func(*args, **kwargs)
                if learned:
                    note_operation(recorder, func, args, kwargs, output, learned)
            provenance.derive(func, args, output, batched=bool(batched))
        except UnsupportedLayerError as error:
            raise named(error, recorder.module) from None
        end = _next_number()
        if end > start:
            recorder.trace.seen.add(start, end)
            if batched:
                provenance.batched.add(start, end)
        return output

    def _told_apart(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The batched ones, and those that are learned, where gradients are computed."""
        recorder = self._recorder
        provenance, seen = recorder.provenance, recorder.trace.seen
        batched: list[Tensor] = []
        learned: list[Tensor] = []
        for tensor in tensors:
            if provenance.is_computed(tensor):  # the usual case
                batched.append(tensor)
                continue
            if provenance.is_unseen(tensor, seen):
                note_parameters(recorder, provenance.recover(tensor, seen))
            if provenance.is_batched(tensor):
                batched.append(tensor)
            elif tensor.requires_grad:
                learned.append(tensor)
        return batched, (learned if torch.is_grad_enabled() else [])

    def _run_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of activations that are computed again, in a backward pass: in the same
        way as before, without recording it twice."""
        recorder = self._recorder
        trace, recorder.trace = recorder.trace, Trace()
        recorder.provenance.recognise(tensors_in((args, kwargs)))
        try:
            return self._run(func, args, kwargs)
        finally:
            recorder.trace = trace

    def _apply_learned(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batched: list[Tensor],
        learned: list[Tensor],
    ) -> Any:
        """Run an operation of batched and learned tensors, in the first way that applies: as a
        rewrite, by a layer's gradient rule, with stand-ins for what is learned, by the fallback."""
        recorder, table = self._recorder, self._operations
        if any(tensor.layout is not torch.strided for tensor in learned):
            raise UnsupportedLayerError("expected dense weights, got sparse ones; make them dense.")
        if writes_in_place(func) and any(args[0] is tensor for tensor in learned):
            prepare_write(recorder, args[0], batched)
            learned = [tensor for tensor in learned if tensor is not args[0]]
            if not learned:
                return func(*args, **kwargs)
        if func in table.rewrites:
            output = table.rewrites[func](recorder, *args, **kwargs)
            if output is not NotImplemented:
                return output
        layer = table.rules.get(func)
        if layer is not None and not recorder.is_batch_independent(_input(layer, args, kwargs)):
            output, rule = func(*args, **kwargs), layer.gradient_rule(*args, **kwargs)
            return self._recorded(output, rule, layer.dims(output.dim()))
        if func in table.broadcasting or func in table.row_wise:
            expands = func in table.broadcasting
            stand_ins = {
                id(t): stand_in_for(recorder, t, batched, expands=expands) for t in learned
            }
            if None not in stand_ins.values():
                args, kwargs = replaced((args, kwargs), stand_ins)
                return func(*args, **kwargs)
        rule = table.fallback(func, args, kwargs, batched, learned)
        return self._recorded(func(*args, **kwargs), rule, (0,))

    def _recorded(self, output: Any, rule: GradientRule, dims: Sequence[int]) -> Any:
        """The output, whose gradient rule is recorded if it has a gradient."""
        if not isinstance(output, Tensor):
            raise UnsupportedLayerError(
                "an operation with trainable weights returns several tensors"
            )
        if output.requires_grad:
            self._recorder.record(output, rule, dims=dims)
        return output

    # ---- modules -----------------------------------------------------------------------------

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Modules that are called in here do not switch the tape on and off."""
        before, self._is_active = self._is_active, True
        try:
            yield
        finally:
            self._is_active = before

    def _opening(self, name: str) -> Callable[..., None]:
        """The hook before the forward of the module with this name."""

        def open_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # operations of compiled code are refused elsewhere
                return
            recorder = self._recorder
            runs_again = torch._C._current_graph_task_id() != -1
            if not recorder.running:
                recorder.memory.forget_pass()
            is_outermost = not recorder.running and not self._is_active and torch.is_grad_enabled()
            if is_outermost:
                self._is_active = self._is_active_for_module = True
                self.__enter__()  # type: ignore[no-untyped-call]
            recorder.running.append((name, (*args, *kwargs.values())))
            if is_outermost and not runs_again:
                with naming_refusals(recorder.module):
                    recorder.calls.add(module, args, kwargs)

        return open_module

    def _closing(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook after the forward of every module."""
        if torch.compiler.is_compiling():
            return
        running = self._recorder.running
        running.pop()
        if not running and self._is_active_for_module:
            self._is_active = self._is_active_for_module = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _input(layer: LayerRule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument of an operation that the rule of a layer expects to be batched."""
    if layer.input < len(args):
        return args[layer.input]
    return inspect.signature(layer.gradient_rule).bind(*args, **kwargs).args[layer.input]


def _nothing_compiled() -> AbstractContextManager[Any]:
    """Have functions that went through torch.compile run eagerly, so that their operations are
    seen."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
