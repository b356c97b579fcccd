"""The tape: what a forward pass did with each trainable parameter.

While a model runs, the tape sees every torch operation. An operation that applies a trainable
parameter to the examples is *recorded*: the gradient edge of its output, and a closure that turns
the gradient with respect to that output into per-example gradients of the parameter. Modules,
parameters and tensors are left as they are.

Two kinds of tensors are told apart by where they come from:

- *batched*: derived from the examples, which lie along dimension 0.
- *free* of the batch: parameters, buffers, constants, and what is computed from these alone, such
  as position embeddings, a relative attention bias or a normalised weight. Back-propagation adds
  up their gradient over the examples, so it is caught where a free tensor *meets* the batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpnlu.gradients import Gradients
from dpnlu.trace import Finish, Lookup, Meeting, Record, Trace


class UnsupportedLayerError(ValueError):
    """A trainable parameter is used in a way whose per-example gradients cannot be had."""


@dataclass(frozen=True)
class Rule:
    """How an operation that applies weights to a batched input is recorded.

    Attributes:
        finish: has the operation's signature; returns the `Finish` of its output.
        input: position of the batched argument.
    """

    finish: Callable[..., Finish]
    input: int = 0


@dataclass(frozen=True)
class Operations:
    """What the tape knows about torch's operations, keyed by function.

    Attributes:
        rules: operations that apply weights to the examples.
        rewrites: computed anew, out of recorded pieces. A rewrite has the operation's signature,
            after the tape as first argument; it may return NotImplemented.
        rearrangements: likewise, of operations that no weights take part in.
        broadcasting: arguments are aligned by their last dimension, and one whose dimension 0 is
            missing or of size 1 may as well be expanded to that of the others.
        row_wise: keep the entries of dimension 0 apart, if all arguments have one.
        fallback: (function, args, kwargs, batched, learned) -> `Finish`, for all others.
    """

    rules: Mapping[Any, Rule]
    rewrites: Mapping[Any, Callable[..., Any]]
    rearrangements: Mapping[Any, Callable[..., Any]]
    broadcasting: frozenset[Any]
    row_wise: frozenset[Any]
    fallback: Callable[..., Finish]


@dataclass(frozen=True)
class _Layout:
    """Copies of a free tensor, made by torch's `expand` or `repeat`.

    That they are one per example cannot be seen before they meet the batch: there may be as many
    positions as examples.
    """

    source: Tensor
    copies: Tensor

    @property
    def _shape(self) -> tuple[int, ...]:
        """The source's shape with as many dimensions as the copies'."""
        return (1,) * (self.copies.dim() - self.source.dim()) + tuple(self.source.shape)

    def holds_a_copy_for_each(self, batch: int) -> bool:
        """Whether the rows are `batch` copies of the source, one after the other."""
        first, *inner = zip(self._shape, self.copies.shape, strict=True)
        return first[0] in (1, first[1] // batch) and all(
            known in (1, size) for known, size in inner
        )

    def per_example(self, batch: int) -> Callable[[Tensor], Tensor]:
        """The gradient of the copies -> that of the source, (B, *shape)."""
        shape = self._shape

        def per_example(gradient: Tensor) -> Tensor:
            apart = gradient.reshape(batch, -1, *gradient.shape[1:])
            return apart.sum_to_size(batch, *shape).reshape(batch, *self.source.shape)

        return per_example


class Tape(TorchFunctionMode):
    """Records the forward passes of one model.

    The tape is active inside the forward of the model and of each of its modules, through forward
    hooks that `close` removes.
    """

    def __init__(self, model: nn.Module, operations: Operations) -> None:
        super().__init__()
        self._operations = operations
        self._trainable = {id(p) for p in model.parameters() if p.requires_grad}
        self._constant = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._free = dict(self._constant)
        self._data: dict[int, Tensor] = {}  # batched, and not differentiated: ids, masks
        self._layouts: dict[int, _Layout] = {}  # by the id of the copies
        self._memory: dict[Any, Any] = {}
        self.trace = Trace()
        self._modules: list[tuple[str, tuple[Any, ...]]] = []
        self._expected: int | None = None
        self._runs_once = False
        self.batch_size: int | None = None
        self._hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(self._opening(name), with_kwargs=True),
                module.register_forward_hook(self._closing, always_call=True),
            )
        ]

    def close(self) -> None:
        """Remove the hooks and forget everything recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded, and release its memory."""
        self.trace = Trace()
        self._free = dict(self._constant)
        self._data = {}
        self._layouts = {}
        self.batch_size = None

    def expect(self, batch_size: int | None, *, runs_once: bool = False) -> None:
        """Forget what was recorded; the coming forward passes hold so many examples (None: look at
        the input).

        Args:
            runs_once: refuse activation checkpointing, which runs modules again.
        """
        self.clear()
        self._expected, self._runs_once = batch_size, runs_once

    def record(self, output: Tensor, finish: Finish, *, rows: int | None = None) -> None:
        """Have `finish` called with the gradient of `output`.

        Args:
            rows: size of the dimension that holds the examples; None: dimension 0 does.
        """
        edge, base = get_gradient_edge(output), output._base
        if base is not None and base.is_contiguous() and output.is_contiguous():
            # A later operation in place gives a view a new past, but not what it is a view of.
            edge, finish = get_gradient_edge(base), _reshaping(finish, output.shape)
        finish = _with_refusals_named(finish, self._module)
        self.trace.records.append(Record(edge, finish, rows or output.shape[0]))

    def meet(
        self,
        target: Tensor,
        arriving: Tensor,
        per_example: Callable[[Tensor], Tensor],
        *,
        aligned: bool = False,
    ) -> None:
        """State that the free tensor `target` enters the batch as `arriving`; for rewrites.

        Args:
            per_example: the gradient of `arriving` -> that of `target`, (B, *target.shape).
            aligned: `arriving` has the target's shape, with the examples along dimension 0.
        """
        edge = get_gradient_edge(arriving)
        self.trace.meetings.append(Meeting(edge, target, per_example, aligned))

    def remembered(self, weights: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """What `make` makes of these weights, made anew only when they have changed."""
        key = tuple((id(weight), weight._version) for weight in weights)
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    def forget_weights(self) -> None:
        """The weights have changed: forget what was made of them."""
        self._memory = {}

    @property
    def module_inputs(self) -> tuple[Any, ...]:
        """What the module that runs at the moment was called with."""
        return self._modules[-1][1]

    def is_free(self, tensor: Tensor) -> bool:
        """Whether the tensor is derived from parameters and constants alone."""
        return id(tensor) in self._free

    # ---- during the forward pass -------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return func(*args, **kwargs)  # evaluation, or recomputation in a backward pass
        tensors = _tensors((args, kwargs) if kwargs else args)
        batched = [tensor for tensor in tensors if self._is_batched(tensor)]
        learned = [t for t in tensors if t.requires_grad and id(t) in self._free]
        if not batched:
            return self._apply_free(func, args, kwargs, learned)
        if learned:
            with _naming_refusals(self._module):
                output = self._apply_learned(func, args, kwargs, batched, learned)
        else:
            rearrange = self._operations.rearrangements.get(func)
            output = NotImplemented if rearrange is None else rearrange(self, *args, **kwargs)
            if output is NotImplemented:
                output = func(*args, **kwargs)
        self._data |= {id(t): t for t in _tensors(output) if not t.requires_grad}
        return output

    def _is_batched(self, tensor: Tensor) -> bool:
        if id(tensor) in self._free:
            return False
        if tensor.requires_grad or id(tensor) in self._data or not self.batch_size:
            return True
        # Neither computed during this forward pass nor handed to it: a constant, or data?
        return self._may_hold_examples(tensor)

    def _may_hold_examples(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and (not self.batch_size or tensor.shape[0] % self.batch_size == 0)

    def _apply_free(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], learned: list[Tensor]
    ) -> Any:
        """An operation on free tensors: what it returns is free."""
        output: Any = func(*args, **kwargs)
        if learned and any(tensor.requires_grad for tensor in _tensors(output)):
            if func is F.embedding:
                self._look_up(output, *args, **kwargs)
            else:
                self.trace.in_free |= {id(t): t for t in learned if id(t) in self._trainable}
            if func in _LAYING_OUT:
                self._layouts[id(output)] = _Layout(args[0], output)
        self._free |= {id(tensor): tensor for tensor in _tensors(output)}
        return output

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
        self.trace.lookups[id(output)] = Lookup(output, ids, table, padding_idx)
        if ids.numel() >= table.shape[0]:  # a short table's gradients are smaller than its rows
            self.trace.in_free[id(table)] = table

    def _apply_learned(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batched: list[Tensor],
        learned: list[Tensor],
    ) -> Any:
        """An operation in which free tensors that are learned meet the batch."""
        table = self._operations
        if func in table.rewrites:
            output = table.rewrites[func](self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        rule = table.rules.get(func)
        if rule is not None and not self.is_free(_argument(rule, args, kwargs)):
            return self._recorded(func(*args, **kwargs), rule.finish(*args, **kwargs))
        if func in table.broadcasting or func in table.row_wise:
            stretches = func in table.broadcasting
            stand_ins = {id(t): self._joined(t, batched, stretches=stretches) for t in learned}
            if None not in stand_ins.values():
                args, kwargs = replaced((args, kwargs), stand_ins)
                return func(*args, **kwargs)
        finish = table.fallback(func, args, kwargs, batched, learned)
        return self._recorded(func(*args, **kwargs), finish)

    def _recorded(self, output: Any, finish: Finish) -> Any:
        if not isinstance(output, Tensor):
            raise UnsupportedLayerError(
                "an operation with trainable weights returns several tensors"
            )
        if output.requires_grad:
            self.record(output, finish)
        return output

    @property
    def _module(self) -> str:
        return self._modules[-1][0] or "(the model itself)"

    def _joined(self, free: Tensor, batched: list[Tensor], *, stretches: bool) -> Tensor | None:
        """A stand-in for `free` whose gradient keeps the examples apart; None: not possible.

        Args:
            batched: what it meets, aligned by the last dimension.
            stretches: the operation would expand `free` to as many rows as the others have.
        """
        widest = max(batched, key=Tensor.dim)
        rows, dims = widest.shape[0], widest.dim()
        batch = rows if self.batch_size is None else self.batch_size
        if not batch:
            return free  # nobody's gradient is to be kept apart
        if rows % batch:
            return None
        if free.dim() == dims and free.shape[0] == rows:
            stand_in = free.view_as(free)
            layout = self._layouts.get(id(free))
            if layout is not None and layout.holds_a_copy_for_each(batch):
                self.meet(layout.source, stand_in, layout.per_example(batch))
            else:
                self.meet(free, stand_in, _rows_apart(batch), aligned=rows == batch)
            return stand_in
        if stretches and (free.dim() < dims or (free.dim() == dims and free.shape[0] == 1)):
            inner = ((1,) * dims + tuple(free.shape))[-(dims - 1) :] if dims > 1 else ()
            stand_in = free.expand(rows, *inner)
            self.meet(free, stand_in, _copies_added(batch, free.shape))
            return stand_in
        return None

    # ---- hooks -------------------------------------------------------------------------------

    def _opening(self, name: str) -> Callable[..., None]:
        def open_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._modules:
                if self.batch_size is None:
                    self.batch_size = self._expected or _leading_size((args, kwargs))
                given = (t for t in _tensors((args, kwargs)) if not t.requires_grad)
                self._data |= {id(t): t for t in given if self._may_hold_examples(t)}
                self.__enter__()  # type: ignore[no-untyped-call]
            self._modules.append((name, (*args, *kwargs.values())))
            if self._runs_once and torch._C._current_graph_task_id() != -1:
                raise UnsupportedLayerError(
                    f"Module {name or '(the model itself)'}: expected to run once, but activation "
                    "checkpointing runs it again, with other units dropped if a program is traced: "
                    "switch it off, or use private.step(losses)."
                )

        return open_module

    def _closing(self, module: nn.Module, args: Any, output: Any) -> None:
        self._modules.pop()
        if not self._modules:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


# Operations that copy a free tensor, perhaps once per example.
_LAYING_OUT = frozenset(
    {
        Tensor.expand,
        Tensor.expand_as,
        Tensor.repeat,
        Tensor.broadcast_to,
        torch.broadcast_to,
        Tensor.tile,
        torch.tile,
    }
)


def _argument(rule: Rule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The argument of an operation that a rule expects to be batched."""
    if rule.input < len(args):
        return args[rule.input]
    return inspect.signature(rule.finish).bind(*args, **kwargs).args[rule.input]


@contextmanager
def _naming_refusals(module: str) -> Iterator[None]:
    """Name the module in what is refused here."""
    try:
        yield
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"Module {module}: {error}") from None


def _with_refusals_named(finish: Finish, module: str) -> Finish:
    """The same, though it runs when the module no longer does."""

    @functools.wraps(finish)
    def named(gradient: Tensor, batch: int) -> list[tuple[Tensor, Gradients]]:
        with _naming_refusals(module):
            return list(finish(gradient, batch))

    return named


def _reshaping(finish: Finish, shape: torch.Size) -> Finish:
    """The same for a gradient that arrives in another shape."""

    @functools.wraps(finish)
    def reshaping(gradient: Tensor, batch: int) -> Iterable[tuple[Tensor, Gradients]]:
        return finish(gradient.reshape(shape), batch)

    return reshaping


def _rows_apart(batch: int) -> Callable[[Tensor], Tensor]:
    """(B·k, …) whose rows belong to the examples in turn -> (B, B·k, …), zero elsewhere."""

    def per_example(gradient: Tensor) -> Tensor:
        rows = gradient.shape[0]
        apart = gradient.new_zeros(batch, *gradient.shape)
        blocks = apart.view(batch, batch, rows // batch, *gradient.shape[1:])
        index = torch.arange(batch, device=gradient.device)
        blocks[index, index] = gradient.view(batch, rows // batch, *gradient.shape[1:])
        return apart

    return per_example


def _copies_added(batch: int, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """(B·k, …), the gradients of copies in turn -> (B, *shape)."""

    def per_example(gradient: Tensor) -> Tensor:
        apart = gradient.reshape(batch, -1, *gradient.shape[1:])
        return apart.sum(1).reshape(batch, *shape)

    return per_example


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if not isinstance(tree, (tuple, list)):
        return []
    found = []
    for branch in tree:
        if isinstance(branch, Tensor):  # most of them are; every operation passes here
            found.append(branch)
        elif isinstance(branch, (tuple, list, dict)):
            found += _tensors(branch)
    return found


def replaced(tree: Any, stand_ins: Mapping[int, Tensor | None]) -> Any:
    """The same nesting with some tensors, known by id, exchanged."""
    if isinstance(tree, Tensor):
        return stand_ins.get(id(tree), tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(replaced(branch, stand_ins) for branch in tree)
    if isinstance(tree, dict):
        return {key: replaced(branch, stand_ins) for key, branch in tree.items()}
    return tree


def _leading_size(tree: Any) -> int | None:
    """Size of dimension 0 of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in _tensors(tree) if tensor.dim()), None)
