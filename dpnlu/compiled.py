"""Compiled steps: forward pass, backward pass, clipping and sums as one program for torch.compile.

Inside a compiled model the tape sees nothing. But it can be traced together with the model: where
an ordinary step runs the model, asks automatic differentiation for the gradients of what was
recorded, and clips and adds up, here all of that runs once on tensors without values while every
operation it comes to is noted down. What results is a program without modules, gradients or Python,
which torch compiles as it stands. It holds for one shape of the batch; each shape gets its own.

Guarantee: as that of the engine, as far as torch's compiler keeps what programs mean. Each program
is compared with plain automatic differentiation as the engine's courses are, on its own operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dpnlu.clipped import Clipped
from dpnlu.engines import BookKeeping
from dpnlu.tape import UnsupportedLayerError
from dpnlu.validation import check_losses
from dpnlu.verification import Evidence, draw_shares

# That many shapes are compiled without a word.
_SHAPES = 8

Program = Callable[..., Any]
Parameters = list[nn.Parameter]


@dataclass
class _Programs:
    """What there is for one shape of the batch.

    Attributes:
        clip: tensors of the batch, number of losses that count, sums -> norms, whether they are
            finite; adds to the sums.
        check: tensors of the batch, number -> the fields of `Evidence`; None once it was enough.
    """

    clip: Program
    check: Program | None


class CompiledClipping:
    """Adds clipped gradients to sums by compiled programs, which are made as shapes come."""

    def __init__(
        self,
        engine: BookKeeping,
        losses_of: Callable[[Any], Tensor],
        *,
        scale: float,
        backend: str,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            losses_of: batch -> (B,) losses of the model that the engine watches.
            scale: of all that is added.
            backend: of `torch.compile`.

        Raises:
            UnsupportedLayerError: the model is recurrent.
        """
        for name, module in engine.model.named_modules():
            if isinstance(module, nn.RNNBase):
                raise UnsupportedLayerError(
                    f"Expected a model without recurrent layers, got {type(module).__name__} at "
                    f"{name or 'the top'}: unrolled over time it takes minutes to compile and "
                    "gains nothing; use private.step(losses)."
                )
        self._engine, self._losses_of = engine, losses_of
        self._scale, self._backend = scale, backend
        self._programs: dict[Any, _Programs] = {}

    def add_clipped(
        self, batch: Any, *, count: int, kept: int, into: Mapping[nn.Parameter, Tensor]
    ) -> Clipped:
        """Add scale * (sum of clipped gradients) to the buffers of `into`.

        Args:
            batch: tensors, numbers and strings in dictionaries, lists and tuples.
            count: number of examples in it.
            kept: of the first so many examples; the others add nothing.

        Raises:
            TypeError: the batch holds something else.
            UnsupportedLayerError: the model cannot be traced, or mixes examples.
        """
        leaves, nesting = tree_flatten(batch)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        device = next(iter(into)).device
        key = (repr(nesting), *map(_described, leaves), *self._modes(device.type))
        inputs = (*tensors, torch.tensor(kept, device=device))
        programs = self._programs.get(key)
        if programs is None:
            programs = self._made(leaves, nesting, count, inputs, into)
            self._programs[key] = programs
            if len(self._programs) == _SHAPES + 1:
                warnings.warn(
                    f"More than {_SHAPES} shapes of batches have been compiled: take "
                    "fixed_size=True in the loader, and pad texts to few different lengths.",
                    stacklevel=4,
                )
        if programs.check is not None and count > 1:
            self._check(programs, inputs, list(into))
        with _as_written(device.type):
            norms, finite = programs.clip(*inputs, *into.values())
        return Clipped(norms, finite)

    def _check(
        self, programs: _Programs, inputs: tuple[Tensor, ...], parameters: Parameters
    ) -> None:
        assert programs.check is not None
        with _as_written(inputs[-1].device.type):
            evidence = Evidence(*programs.check(*inputs))
        if evidence.proves([self._engine.names[parameter] for parameter in parameters]):
            programs.check = None

    def _modes(self, device: str) -> tuple[Any, ...]:
        """What decides about the program, beside the batch."""
        casts = (torch.is_autocast_enabled(kind) for kind in ("cpu", device))
        return (
            *(module.training for module in self._engine.model.modules()),
            *casts,
            torch.get_autocast_dtype(device),
        )

    def _made(
        self,
        leaves: list[Any],
        nesting: TreeSpec,
        count: int,
        inputs: tuple[Tensor, ...],
        into: Mapping[nn.Parameter, Tensor],
    ) -> _Programs:
        """Trace and compile; `inputs` and `into` show the shapes."""
        parameters, given = list(into), len(inputs)

        def losses(tensors: tuple[Tensor, ...]) -> Tensor:
            *values, kept = tensors
            batch = tree_unflatten(_with_tensors(leaves, iter(values)), nesting)
            found = self._losses_of(batch)
            check_losses(found, count)
            if self._engine.course(found).chooses_rows:
                raise UnsupportedLayerError(
                    "Expected a forward pass that takes the examples as they come, got one that "
                    "picks rows by their values, which has to be checked at every batch: use "
                    "private.step(losses)."
                )
            return torch.where(torch.arange(count, device=found.device) < kept, found, 0.0)

        def clip(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            with self._engine.tracing(count):
                sums = dict(zip(parameters, tensors[given:], strict=True))
                clipped = self._engine.add_traced(
                    losses(tensors[:given]), into=sums, scale=self._scale
                )
            return clipped.norms, clipped.finite

        def check(shares: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            with self._engine.tracing(count):
                found = losses(tensors)
                evidence = self._engine.evidence(found, parameters, shares.to(found), turn=0)
            return tuple(vars(evidence).values())

        shares = draw_shares(torch.empty(count, device=inputs[-1].device))
        checking = _traced(check, shares, *inputs) if self._engine.verifies else None
        compiled = torch.compile(
            _traced(clip, *inputs, *into.values()),
            backend=self._backend,
            fullgraph=True,
            dynamic=False,
        )
        return _Programs(compiled, None if checking is None else partial(checking, shares))


def _traced(function: Program, *inputs: Tensor) -> Program:
    """The operations that the function comes to on inputs of these shapes.

    Raises:
        UnsupportedLayerError: it depends on values.
    """
    try:
        with torch.enable_grad():
            return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except RuntimeError as error:
        raise UnsupportedLayerError(
            "Expected a forward pass that does the same operations whatever the values are, got "
            f"one that cannot be traced ({str(error).splitlines()[0]}): use private.step(losses)."
        ) from error


@contextmanager
def _as_written(device: str) -> Iterator[None]:
    """Run a program's operations as they were noted down: what to cast, and the gradients, are
    among them."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _described(leaf: Any) -> tuple[Any, ...]:
    """What a program depends on: of tensors the shape, of all else the value."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return (type(leaf), leaf)
    raise TypeError(
        "Expected a batch of tensors, numbers and strings in dictionaries, lists and tuples, got "
        f"{type(leaf).__name__}: convert it, for example by dict(batch)."
    )


def _with_tensors(leaves: list[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The leaves with these tensors in place of their own."""
    return [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
