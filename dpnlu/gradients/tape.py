"""The tape: what a forward pass did with each trainable parameter.

While a model runs, the tape sees every torch operation. An operation that applies a trainable
parameter to the examples is *recorded*: the gradient edge of its output, and a closure that turns
the gradient with respect to that output into per-example gradients of the parameter. Modules,
parameters and tensors are left as they are.

Two kinds of tensors are told apart by where they come from (`dpnlu.gradients.provenance`):

- *batched*: derived from the examples.
- *free* of the batch: parameters, buffers, constants, and what is computed from these alone, such
  as position embeddings, a relative attention bias or a normalised weight. Back-propagation adds
  up their gradient over the examples, so it is caught where a free tensor *meets* the batch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.layout import Layout
from dpnlu.gradients.operations import (
    COPIES,
    INSPECTIONS,
    TURNS,
    Operations,
    Rule,
    replaced,
    tensors_held,
    tensors_in,
    values_of,
    with_numbers,
    writes_in_place,
)
from dpnlu.gradients.provenance import Provenance
from dpnlu.gradients.signature import OF_A_PARAMETER
from dpnlu.gradients.trace import (
    Finish,
    Lookup,
    Meeting,
    PerExample,
    Product,
    Record,
    Trace,
    naming_refusals,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """The call of an outermost module.

    Attributes:
        autocast: whether and to which type operations were cast, on a CPU and on its device.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    def repeated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for other arguments, computed in the same precision."""
        with ExitStack() as stack:
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            return self.module(*args, **kwargs)


def _autocast(device: str) -> tuple[tuple[str, bool, torch.dtype], ...]:
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted({"cpu", device})
    )


class Tape(TorchFunctionMode):
    """Records the forward passes of one model.

    The tape is active inside the forward of the model and of each of its modules, through forward
    hooks that `close` removes, and inside `recording`.
    """

    def __init__(self, model: nn.Module, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        self._trainable = {id(p): p for p in model.parameters() if p.requires_grad}
        self._provenance = Provenance(model)
        self._copies: dict[int, _Copies] = {}  # by the id of the copies
        self._memory: dict[Any, Any] = {}
        self._prepared: dict[Any, _Prepared] = {}
        self._modules: list[tuple[str, tuple[Any, ...]]] = []
        self._is_active = False
        self._expected: int | None = None
        self._hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(self._opening(name), with_kwargs=True),
                module.register_forward_hook(self._closing, always_call=True),
            )
        ]
        self.trace = Trace()
        self.calls: list[Call] = []
        self.batch_size: int | None = None
        #: Whether activations are computed anew on the way back.
        self.is_checkpointed = False
        self._meets_batch = False  # whether a module was called with what was announced

    def close(self) -> None:
        """Remove the hooks and forget everything recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.clear()
        self.weights_changed()

    def weights_changed(self) -> None:
        """What was prepared from the weights is of no use any more: release its memory."""
        self._prepared = {}

    def clear(self) -> None:
        """Forget what was recorded, and release its memory."""
        self.trace, self.calls = Trace(), []
        self._copies, self._memory = {}, {}
        self._provenance.forget()
        self.batch_size = None
        self.is_checkpointed = self._meets_batch = False

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        """Forget what was recorded; the coming forward passes hold so many examples (None: look at
        the input).

        Args:
            batch: what holds them; it may be moved or changed before a module is called with it.
        """
        self.clear()
        self._expected = batch_size
        self._provenance.announce(tensors_held(batch))

    @contextmanager
    def recording(self, batch: Any, batch_size: int | None = None) -> Iterator[None]:
        """See every operation in here, inside modules and outside of them.

        Args:
            batch: what is handed over; everything else that comes from outside is free of it.
            batch_size: number of examples; None: what the first tensor's dimension 0 says.
        """
        self.expect(batch_size)
        tensors = tensors_held(batch)
        self.batch_size = _leading_size(tensors) if batch_size is None else batch_size
        self._provenance.hand_over(tensors)
        with self._active(), _nothing_compiled(), self:
            yield

    @contextmanager
    def on_the_way_back(self) -> Iterator[None]:
        """Backward passes go here: what is checkpointed is then computed as it was before."""
        if not self.is_checkpointed:
            yield
            return
        with self._active(), self:
            yield

    def record(self, output: Tensor, finish: Finish, *, dims: Sequence[int] | None = None) -> None:
        """Have `finish` called with the gradient of `output`.

        Args:
            dims: that may hold the examples; None: all but the last.
        """
        self._notice_checkpointing()
        edge, base = get_gradient_edge(output), output._base
        strides = None
        is_whole = base is not None and base.numel() == output.numel() and base.grad_fn is not None
        if base is not None and is_whole and base.is_contiguous():
            # A later operation in place gives a view a new past, but not what it is a view of.
            edge, strides = get_gradient_edge(base), output.stride()
        self.trace.records.append(
            Record(
                edge=edge,
                shape=output.shape,
                strides=strides,
                dims=range(max(1, output.dim() - 1)) if dims is None else dims,
                module=self._module,
                finish=finish,
            )
        )

    def meet(
        self,
        target: Tensor,
        arriving: Tensor,
        per_example: PerExample,
        *,
        dims: Sequence[int] = (0,),
        aligned: bool = False,
        origin: GradientEdge | None = None,
    ) -> None:
        """State that the free tensor `target` enters the batch as `arriving`; for rewrites.

        Args:
            per_example: the gradient of `arriving` -> that of `target`, (B, *target.shape).
            dims: of `arriving`, that may hold the examples.
            aligned: `arriving` has the target's shape, and an example's rows are its share of it.
            origin: where the gradient of `target` goes on; None: where it does now.
        """
        self._notice_checkpointing()
        self.trace.meetings.append(
            Meeting(
                edge=get_gradient_edge(arriving),
                shape=arriving.shape,
                dims=dims,
                module=self._module,
                target=target,
                origin=origin or get_gradient_edge(target),
                per_example=per_example,
                aligned=aligned,
            )
        )

    def remembered(self, weights: tuple[Tensor, ...], make: Callable[[], T], *key: Any) -> T:
        """What `make` makes of these weights; made once in a forward pass.

        Args:
            key: what else it depends on.
        """
        whole = (*key, *(id(weight) for weight in weights))
        if whole not in self._memory:
            self._memory[whole] = (weights, make())  # their ids stay theirs
        made: T = self._memory[whole][1]
        return made

    def prepared(self, weights: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """The same across forward passes, for as long as the weights are what they were.

        They are compared with copies: an assignment to `.data` leaves no other trace.
        """
        whole = tuple(id(weight) for weight in weights)
        held = self._prepared.get(whole)
        if held is None or not held.is_of(weights):
            held = self._prepared[whole] = _Prepared.of(weights, make())
        made: T = held.made
        return made

    @property
    def module_inputs(self) -> tuple[Any, ...]:
        """What the module that runs at the moment was called with."""
        return self._modules[-1][1]

    def is_free(self, tensor: Tensor) -> bool:
        """Whether the tensor is derived from parameters and constants alone."""
        return self._provenance.is_free(tensor)

    @property
    def trainable(self) -> Mapping[int, Tensor]:
        """The parameters that are trained, by id."""
        return self._trainable

    def is_free_node(self, node: Node) -> bool:
        """Whether what a node of the autograd graph made is known to be free of the batch."""
        if node.name() == OF_A_PARAMETER:
            return self.is_free(node.variable)  # type: ignore[attr-defined]
        return node in self.trace.seen and node not in self._provenance.batched

    def free_learned(self) -> list[Tensor]:
        """The free tensors that were computed from trainable parameters."""
        return self._provenance.free_learned()

    # ---- during the forward pass -------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in INSPECTIONS:
            return func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1:
            return self._run_again(func, args, kwargs or {})
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        provenance = self._provenance
        if func is Tensor.__getitem__ and args[0].requires_grad and provenance.is_free(args[0]):
            args = (args[0], with_numbers(args[1]))
        tensors = values_of(func, args, kwargs)
        start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        with naming_refusals(self._module):
            for tensor in tensors:
                if provenance.is_unseen(tensor, self.trace.seen):
                    self._note_in_free(provenance.recover(tensor, self.trace.seen))
            batched = [tensor for tensor in tensors if provenance.is_batched(tensor)]
            learned: list[Tensor] = []
            if torch.is_grad_enabled():
                learned = [t for t in tensors if t.requires_grad and provenance.is_free(t)]
            if not batched:
                output = self._apply_free(func, args, kwargs, learned)
            elif learned:
                output = self._apply_learned(func, args, kwargs, batched, learned)
            else:
                rearrange = self._operations.rearrangements.get(func)
                output = NotImplemented if rearrange is None else rearrange(self, *args, **kwargs)
                if output is NotImplemented:
                    output = func(*args, **kwargs)
            provenance.derive(func, args, output, batched=bool(batched))
        end = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self.trace.seen.add(start, end)
        if batched:
            provenance.batched.add(start, end)
        return output

    def _run_again(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Activations are computed anew, in a backward pass: by the same operations, which are not
        recorded twice."""
        trace, self.trace = self.trace, Trace()
        self._provenance.recognise(tensors_in((args, kwargs)))
        try:
            return self._run(func, args, kwargs)
        finally:
            self.trace = trace

    def _notice_checkpointing(self) -> None:
        self.is_checkpointed |= _is_inside_checkpoint()

    def _apply_free(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], learned: list[Tensor]
    ) -> Any:
        """An operation on free tensors: what it returns is free."""
        output: Any = func(*args, **kwargs)
        made = args[:1] if writes_in_place(func) else output
        if learned and any(tensor.requires_grad for tensor in tensors_in(made)):
            if func is F.embedding:
                self._look_up(output, *args, **kwargs)
            elif func is F.linear:
                self._multiply(output, *args, **kwargs)
            else:
                self._note_in_free(learned)
            if func in COPIES:
                self._copies[id(output)] = _Copies(args[0], output)
            elif func in TURNS and id(args[0]) in self._copies:
                self._turn_source(func, args, kwargs, output)
        return output

    def _turn_source(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Copies of something are turned: they are copies of it, turned."""
        copies = self._copies[id(args[0])]
        source = copies.source.reshape(copies.shape)
        turned: Tensor = func(source, *args[1:], **kwargs)
        if turned.shape[0] == source.shape[0] and turned.dim() == output.dim():
            self._provenance.derive(func, args, turned, batched=False)
            self._copies[id(output)] = _Copies(turned, output)

    def _note_in_free(self, tensors: Iterable[Tensor]) -> None:
        """These enter a computation free of the batch."""
        self.trace.in_free |= {id(t): t for t in tensors if id(t) in self._trainable}

    def _look_up(
        self,
        output: Tensor,
        ids: Tensor,
        table: Tensor,
        padding_idx: int | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        if id(table) not in self._trainable:
            return
        edge = get_gradient_edge(output)
        self.trace.lookups[id(output)] = Lookup(output, edge, ids, table, padding_idx)

    def _multiply(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """A layer, of parameters alone, is applied to what is free of the batch."""
        learned = [t for t in (weight, bias) if t is not None and t.requires_grad]
        self._note_in_free([input])
        if weight.dim() == 2 and weight.requires_grad and all(t.is_leaf for t in learned):
            use = Product(get_gradient_edge(output), input, weight, bias)
            self.trace.products.append(use)
        else:
            self._note_in_free(learned)

    def _apply_learned(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batched: list[Tensor],
        learned: list[Tensor],
    ) -> Any:
        """An operation in which free tensors that are learned meet the batch."""
        if any(tensor.layout is not torch.strided for tensor in learned):
            raise UnsupportedLayerError("expected dense weights, got sparse ones; make them dense.")
        if writes_in_place(func) and any(args[0] is tensor for tensor in learned):
            self._write_into(args[0], batched)
            learned = [tensor for tensor in learned if tensor is not args[0]]
            if not learned:
                return func(*args, **kwargs)
        table = self._operations
        if func in table.rewrites:
            output = table.rewrites[func](self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        rule = table.rules.get(func)
        if rule is not None and not self.is_free(_argument(rule, args, kwargs)):
            output = func(*args, **kwargs)
            return self._recorded(output, rule.finish(*args, **kwargs), rule.dims(output.dim()))
        if func in table.broadcasting or func in table.row_wise:
            stretches = func in table.broadcasting
            stand_ins = {id(t): self._joined(t, batched, stretches=stretches) for t in learned}
            if None not in stand_ins.values():
                args, kwargs = replaced((args, kwargs), stand_ins)
                return func(*args, **kwargs)
        finish = table.fallback(func, args, kwargs, batched, learned)
        return self._recorded(func(*args, **kwargs), finish, (0,))

    def _recorded(self, output: Any, finish: Finish, dims: Sequence[int]) -> Any:
        if not isinstance(output, Tensor):
            raise UnsupportedLayerError(
                "an operation with trainable weights returns several tensors"
            )
        if output.requires_grad:
            self.record(output, finish, dims=dims)
        return output

    @property
    def _module(self) -> str:
        name = self._modules[-1][0] if self._modules else None
        return "(the loss function)" if name is None else name or "(the model itself)"

    def _write_into(self, free: Tensor, batched: list[Tensor]) -> None:
        """What comes from the batch is about to be written into a free tensor: here they meet."""
        batch = batched[0].shape[0] if self.batch_size is None else self.batch_size
        origin = get_gradient_edge(free)
        free.mul_(1)  # what it was has a gradient of its own now
        rows = range(min(2, free.dim())) if batch else ()
        if not any(free.shape[dim] % batch == 0 for dim in rows):
            raise UnsupportedLayerError(
                f"expected to write what comes from {batch} examples to as many rows, got a tensor "
                f"of shape {tuple(free.shape)}; write x = x + y instead of x += y."
            )
        self.meet(free, free, _rows_apart, dims=rows, origin=origin)

    def _joined(self, free: Tensor, batched: list[Tensor], *, stretches: bool) -> Tensor | None:
        """A stand-in for `free` whose gradient keeps the examples apart; None: not possible.

        Args:
            batched: what it meets, aligned by the last dimension.
            stretches: the operation would expand `free` to as many rows as the others have.
        """
        widest = max(batched, key=Tensor.dim)
        if not widest.dim():
            return None
        rows, dims = widest.shape[0], widest.dim()
        batch = rows if self.batch_size is None else self.batch_size
        if not batch:
            return free  # nobody's gradient is to be kept apart
        shape = ((1,) * dims + tuple(free.shape))[-dims:]
        is_whole = free.dim() == dims and free.shape[0] == rows
        if free.dim() > dims or not (is_whole or (stretches and shape[0] == 1)):
            return None
        copies = self._copies.get(id(free)) if is_whole else None
        if copies is not None and copies.are_one_for_each(batch):
            stand_in = free.view_as(free)
            self.meet(copies.source, stand_in, copies.per_example)
            return stand_in
        is_square = dims > 1 and widest.shape[1] == batch  # dimension 1 may hold them as well
        outer = 2 if stretches and is_square and shape[1] in (1, batch) else 1

        def make() -> Tensor:
            stand_in = free.expand(*widest.shape[:outer], *shape[outer:])
            is_aligned = is_whole and rows == batch and outer == 1
            per_example = _taken_back(shape, free.shape)
            self.meet(free, stand_in, per_example, dims=range(outer), aligned=is_aligned)
            return stand_in

        if is_square or rows != batch or _is_inside_checkpoint():
            return make()
        # The examples can lie in one way only: what arrives at all such uses may be added up.
        return self.remembered((free,), make, shape)

    # ---- hooks -------------------------------------------------------------------------------

    @contextmanager
    def _active(self) -> Iterator[None]:
        before, self._is_active = self._is_active, True
        try:
            yield
        finally:
            self._is_active = before

    def _opening(self, name: str) -> Callable[..., None]:
        def open_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # what is compiled is not seen, and refused later
                return
            runs_again = torch._C._current_graph_task_id() != -1
            if not self._modules:
                self._memory = {}
            is_outermost = not self._modules and not self._is_active and torch.is_grad_enabled()
            if is_outermost:
                self._modules.append((_OUTERMOST, ()))
                self._is_active = True
                self.__enter__()  # type: ignore[no-untyped-call]
            self._modules.append((name, (*args, *kwargs.values())))
            if is_outermost and not runs_again:
                with naming_refusals(self._module):
                    self._begin(module, args, kwargs)

        return open_module

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pass of an outermost module begins: its arguments are the batch, but for
        what is known to be free of it."""
        given = [t for t in tensors_held((args, kwargs)) if not self._provenance.is_known(t)]
        if self.batch_size is None:
            self.batch_size = self._expected or _leading_size(given)
        announced = [tensor for tensor in given if self._provenance.is_announced(tensor)]
        if self._meets_batch and not announced:
            # Beside the batch, as many rows as examples, or multiples, may be of something else.
            given = [tensor for tensor in given if self.batch_size in tensor.shape[:2]]
        self._meets_batch |= bool(announced)
        packed = [held for held in (*args, *kwargs.values()) if isinstance(held, PackedSequence)]
        self._provenance.hand_over(tensor for tensor in given if self._may_hold_examples(tensor))
        self._provenance.hand_over([*announced, *tensors_held(packed)])
        device = next((tensor.device.type for tensor in given), "cpu")
        self.calls.append(Call(module, args, kwargs, _autocast(device)))

    def _may_hold_examples(self, tensor: Tensor) -> bool:
        """Whether a tensor that a module is called with, of which nothing else is known, may be of
        the batch."""
        if not tensor.dim() or not self.batch_size:
            return tensor.dim() > 0
        first, *others = tensor.shape
        is_time_first = first > 1 and bool(others) and others[0] == self.batch_size
        return first % self.batch_size == 0 or is_time_first

    def _closing(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._modules.pop()
        if self._modules and self._modules[-1][0] is _OUTERMOST:
            self._modules.pop()
            self._is_active = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _nothing_compiled() -> AbstractContextManager[Any]:
    """Have functions that went through torch.compile run as they were written, to be seen."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _is_inside_checkpoint() -> bool:
    """Whether what is saved for the way back may be dropped and computed anew."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is not None


# Stands below the names of the modules that run while the tape is active on their behalf.
_OUTERMOST = "(outermost)"


@dataclass(frozen=True)
class _Copies:
    """Copies of a free tensor, made by torch's `expand` or `repeat`.

    That they are one per example cannot be seen before they meet the batch: there may be as many
    positions as examples.
    """

    source: Tensor
    copies: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape with as many dimensions as the copies'."""
        return (1,) * (self.copies.dim() - self.source.dim()) + tuple(self.source.shape)

    def are_one_for_each(self, batch: int) -> bool:
        """Whether the rows are `batch` copies of the source, one after the other."""
        first, *inner = zip(self.shape, self.copies.shape, strict=True)
        return first[0] in (1, first[1] // batch) and all(
            known in (1, size) for known, size in inner
        )

    def per_example(self, gradient: Tensor, layout: Layout) -> Tensor:
        """The gradient of the copies -> that of the source, (B, *shape)."""
        apart = layout.apart(gradient).sum_to_size(layout.batch, *self.shape)
        return apart.reshape(layout.batch, *self.source.shape)


@dataclass(frozen=True)
class _Prepared:
    """What was made of weights, and what these were."""

    made: Any
    weights: tuple[Tensor, ...]
    copies: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, weights: tuple[Tensor, ...], made: Any) -> _Prepared:
        # Elsewhere a comparison would have to be waited for, and making is cheap.
        is_comparable = all(
            weight.device.type == "cpu" and not isinstance(weight, FakeTensor) for weight in weights
        )
        copies = tuple(weight.detach().clone() for weight in weights) if is_comparable else None
        return cls(made, weights, copies)

    def is_of(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether the weights are, number by number, what they were."""
        return self.copies is not None and all(
            torch.equal(weight.detach(), copy)
            for weight, copy in zip(weights, self.copies, strict=True)
        )


def _argument(rule: Rule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument of an operation that a rule expects to be batched."""
    if rule.input < len(args):
        return args[rule.input]
    return inspect.signature(rule.finish).bind(*args, **kwargs).args[rule.input]


def _rows_apart(gradient: Tensor, layout: Layout) -> Tensor:
    """(…, R, …) whose rows belong to examples -> (B, …, R, …), zero where a row is another's."""
    rows = gradient.movedim(layout.dim, 0)
    apart = gradient.new_zeros(layout.batch, *rows.shape)
    every = torch.arange(len(rows), device=gradient.device)
    apart[layout.owner(len(rows)).to(gradient.device), every] = rows
    return apart.movedim(1, 1 + layout.dim)


def _taken_back(shape: tuple[int, ...], target: torch.Size) -> PerExample:
    """The gradient of what was expanded from `shape` -> (B, *target): along the dimension that
    holds the examples it is each one's own rows of a tensor that has them, or a copy of it."""

    def per_example(gradient: Tensor, layout: Layout) -> Tensor:
        if shape[layout.dim] != 1:
            apart = _rows_apart(gradient, layout)
        else:
            apart = layout.apart(gradient).sum(1).unsqueeze(1 + layout.dim)
        return apart.sum_to_size(layout.batch, *shape).reshape(layout.batch, *target)

    return per_example


def _leading_size(tensors: list[Tensor]) -> int | None:
    """Size of dimension 0 of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), None)
