"""Compiled steps: forward pass, backward pass and norms as one program.

Inside a compiled model the tape sees nothing. But it can be traced together with the model: where
an ordinary step runs the model, asks automatic differentiation for the gradients of what was
recorded, and takes their norms, here all of that runs once on tensors without values while every
operation it comes to is noted down. What results is a program without modules, gradients or Python,
which torch compiles, or a GPU replays (`dpnlu.engines.replay`), as it stands. It holds for one
shape of the batch; each shape gets its own.

The sums are not part of it. They are large products that a compiler does not make faster, and they
begin as noise, whose memory is not there while the forward pass needs its own. Where programs are
replayed the sums are another one, which is not used for a batch with an infinite gradient.

Guarantee: that of the engine, as far as torch's compiler keeps what programs mean. The operations
of each program, before they are compiled, are compared with plain automatic differentiation, as the
engine does for each graph signature. What a program would keep from its tracing, though it may
change or belongs to one batch, is refused (`dpnlu.engines.tracing`). Numbers that the losses'
function holds otherwise stay what they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.checks import own_generator
from dpnlu.engines.clipped import Parts
from dpnlu.engines.outcome import ClipOutcome, ClippedSum, WeightedGradients, buffer_like
from dpnlu.engines.replay import Pool, Replay
from dpnlu.engines.separation import draw_weights
from dpnlu.engines.step_functions import Forms, Tracing
from dpnlu.engines.tracing import traced
from dpnlu.engines.verification import Evidence
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import SquaredNorms
from dpnlu.gradients.rounding import full_precision

# The backend that is not one of `torch.compile`: a GPU replays programs.
REPLAY = "cudagraphs"
# That many programs are compiled without a word.
_PROGRAMS = 8

Program = Callable[..., Any]


@dataclass
class _Programs:
    """What there is for one shape of the batch.

    Attributes:
        find: tensors of the batch, number of losses that count -> losses, norms, and the tensors of
            the per-example gradients.
        forms: of these gradients.
        check: weights, draws, tensors of the batch, number -> whether examples keep apart, and the
            fields of `Evidence`; None: nothing is checked.
        sums: (G, B) clip coefficients -> the sum of the gradients that were found last, so clipped;
            None: it is made as ever.
        is_new: not run yet.
    """

    find: Program
    forms: Forms
    check: Program | None
    sums: Callable[[Tensor], ClippedSum] | None = None
    is_new: bool = True

    def run(
        self, inputs: tuple[Tensor, ...], device: torch.device
    ) -> tuple[Parts, SquaredNorms, Tensor]:
        """The gradients, their squared norms, and the losses."""
        with torch.no_grad(), full_precision(device):
            losses, values, slack, *tensors = self.find(*inputs)
        return self.forms.filled(tensors), SquaredNorms(values, slack), losses


class CompiledClipping:
    """Clips gradients that compiled programs find; these are made as shapes come.

    Attributes:
        losses_of: batch -> (B,) losses.
    """

    def __init__(
        self,
        engine: BookKeeping,
        losses_of: Callable[[Any], Tensor],
        *,
        backend: str,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            losses_of: batch -> (B,) losses of the model that the engine watches.
            backend: of `torch.compile`, or "cudagraphs".

        Raises:
            UnsupportedLayerError: the model is recurrent, and would be compiled.
            ValueError: programs are to be replayed, and the model is not on a GPU.
        """
        self.losses_of = losses_of
        self._engine, self._backend = engine, backend
        self._generator = own_generator()
        self._programs: dict[Any, _Programs] = {}
        self._pool: Pool | None = None
        if backend == REPLAY:
            _check_on_gpu(engine.model)
            self._pool = torch.cuda.graph_pool_handle()
        else:
            _check_not_recurrent(engine.model)
        #: What sums are replayed into, of all programs.
        self._totals: list[Tensor] = []

    def clip(self, batch: Any, *, count: int, kept: int) -> ClipOutcome:
        """Compute the losses of a batch and clip their gradients.

        Args:
            batch: tensors, numbers and strings in dictionaries, lists and tuples.
            count: number of examples in it.
            kept: how many of them count, the first ones.

        Raises:
            TypeError: the batch holds something else.
            UnsupportedLayerError: the model cannot be traced, or mixes examples.
        """
        leaves, nesting = tree_flatten(batch)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        device = next(iter(self._engine.names)).device
        inputs = (*tensors, torch.tensor(kept, device=device))
        key = (count, repr(nesting), *map(_described, leaves), *self._modes(device.type))
        programs = self._programs.get(key)
        if programs is None:
            self._run_once(batch, device)
            with self._unchanged(tensors):
                programs = self._made(leaves, nesting, count, inputs)
            self._programs[key] = programs
            self._warn_of_many()
        with self._unchanged(tensors) if programs.is_new else nullcontext():
            if programs.check is not None:
                self._check(programs.check, key, inputs)
            parts, norms, losses = programs.run(inputs, device)
        if programs.is_new and self._pool is not None:
            programs.sums = self._replayed_sums(parts, norms.values, self._pool)
        programs.is_new = False
        return self._engine.clip_found(parts, norms, losses, sums=programs.sums).first(kept)

    def _run_once(self, batch: Any, device: torch.device) -> None:
        """Have the model compute what it computes once and keeps while tensors have values."""
        devices = [] if device.type == "cpu" else [device]
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
            self.losses_of(batch)

    def _check(self, check: Program, key: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> None:
        """Check the batch, if it is its turn."""
        checks, names = self._engine.checks, self._engine.names
        assert checks is not None
        rows, gradients = checks.observe(key)
        if not (rows or gradients):
            return
        like = torch.empty(key[0], device=inputs[-1].device)
        narrow = torch.get_autocast_dtype(like.device.type) is torch.float16
        with torch.no_grad(), full_precision(like.device):
            weights = draw_weights(like, narrow=narrow, generator=self._generator)
            draws = torch.rand(key[0], generator=self._generator).to(like)
            agree, *found = check(weights, draws, *inputs)
        if not bool(agree):
            raise UnsupportedLayerError(
                "Expected the loss of one example to depend on that example alone, and dimension 0 "
                "of every activation to hold the examples, got a forward pass in which examples "
                "mix or lie otherwise: use private.stepper, which says where."
            )
        if Evidence(*found).proves(list(names.values())):
            checks.show_rows(key, [])
            checks.show_parameters(key)

    def _modes(self, device: str) -> tuple[Any, ...]:
        """What else decides about the program: autocast, and all that modules keep beside the
        values of tensors."""
        casts = (torch.is_autocast_enabled(kind) for kind in ("cpu", device))
        modules = list(self._engine.model.modules())
        states = (state for module in modules for state in _state(module))
        # What a GPU replays reads parameters where they were.
        places = [] if self._pool is None else [t.data_ptr() for m in modules for t in _tensors(m)]
        return (*casts, torch.get_autocast_dtype(device), *states, *places)

    @contextmanager
    def _unchanged(self, tensors: list[Tensor]) -> Iterator[None]:
        """See to it that the batch and the model's tensors stay as they are.

        Raises:
            UnsupportedLayerError: some are changed in place.
        """
        model = self._engine.model
        watched = (*tensors, *model.parameters(), *model.buffers())
        before = [tensor._version for tensor in watched]
        yield
        if before != [tensor._version for tensor in watched]:
            raise UnsupportedLayerError(
                "Expected a forward pass that leaves the batch and the model's buffers as they "
                "are, got one that changes some in place: use private.stepper."
            )

    def _warn_of_many(self) -> None:
        if len(self._programs) == _PROGRAMS + 1:
            warnings.warn(
                f"More than {_PROGRAMS} programs have been compiled, one for each shape of the "
                "batch and each number or string in it: take fixed_size=True in the loader, pad "
                "texts to few different lengths, and leave out what changes.",
                stacklevel=5,
            )

    def _made(
        self, leaves: list[Any], nesting: TreeSpec, count: int, inputs: tuple[Tensor, ...]
    ) -> _Programs:
        """Trace and compile; `inputs` show the shapes."""
        engine, model = self._engine, self._engine.model
        tracing = Tracing(engine, self.losses_of, leaves, nesting, count)
        checking = None
        if engine.checks is not None:
            drawn = [torch.ones(count, device=inputs[-1].device)] * 2
            checking = traced(tracing.check, (*drawn, *inputs), model=model)
        finding = traced(tracing.find, inputs, model=model)
        tracing.check_signatures()
        assert tracing.forms is not None
        return _Programs(find=self._compiled(finding), forms=tracing.forms, check=checking)

    def _compiled(self, finding: Program) -> Program:
        if self._pool is not None:
            return Replay(finding, pool=self._pool)
        compiled: Program = torch.compile(
            finding, backend=self._backend, fullgraph=True, dynamic=False
        )
        return compiled

    def _replayed_sums(
        self, parts: Parts, norms: Tensor, pool: Pool
    ) -> Callable[[Tensor], ClippedSum] | None:
        """See `_Programs.sums`. None where the operations of a sum depend on values: it takes more
        time then, and is the same.

        Args:
            parts: the gradients, where they will always be found.
            norms: (B,), of the type that coefficients have.
        """
        clipper, parameters = self._engine.clipper, list(self._engine.names)
        forms = Forms.of(parts)
        self._totals = self._totals or [buffer_like(parameter) for parameter in parameters]
        held = (*forms.tensors(), *self._totals)

        def sums(coefficients: Tensor, *held: Tensor) -> list[Tensor]:
            found, totals = held[: -len(parameters)], list(held[-len(parameters) :])
            torch._foreach_zero_(totals)
            into = dict(zip(parameters, totals, strict=True))
            divided = clipper.divided(forms.filled(list(found)))
            for some, of_group in zip(divided, coefficients.unbind(0), strict=True):
                WeightedGradients(some, of_group).add_to(into, scale=1.0)
            return totals

        coefficients = norms.new_empty(len(clipper.divided(parts)), len(norms))
        try:
            program = traced(sums, (coefficients, *held), model=self._engine.model)
        except UnsupportedLayerError:
            return None
        return partial(_ReplayedSum, Replay(program, held=held, pool=pool), parameters)


@dataclass(frozen=True)
class _ReplayedSum:
    """The sum of clipped gradients, by a program.

    Attributes:
        program: coefficients (G, B) -> sums of the parameters.
        coefficients: the clip coefficients.
    """

    program: Program
    parameters: Sequence[Tensor]
    coefficients: Tensor

    def add_to(self, buffers: Mapping[Any, Tensor], *, scale: float) -> None:
        totals = self.program(scale * self.coefficients)
        torch._foreach_add_([buffers[parameter] for parameter in self.parameters], list(totals))


def _check_on_gpu(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"Expected a model on a GPU for the backend 'cudagraphs', got one on {device}: move it "
            "there, or leave the backend out."
        )


def _check_not_recurrent(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise UnsupportedLayerError(
                f"Expected a model without recurrent layers, got {type(module).__name__} at "
                f"{name or 'the top'}: unrolled over time it takes minutes to compile and "
                "gains nothing; use private.stepper."
            )


def _state(module: nn.Module) -> tuple[Any, ...]:
    """What a module does depends on, beside the values of its tensors."""
    return (
        *(value for value in vars(module).values() if isinstance(value, _PLAIN)),
        *((id(tensor), tensor.requires_grad) for tensor in _tensors(module)),
        len(module._forward_hooks),
        len(module._forward_pre_hooks),
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    every = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in every if tensor is not None]


_PLAIN = (bool, int, float, str)


def _described(leaf: Any) -> tuple[Any, ...]:
    """What a program depends on: of tensors all but the values, of all else the value."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if leaf is None or isinstance(leaf, _PLAIN):
        return (type(leaf), leaf)
    raise TypeError(
        "Expected a batch of tensors, numbers and strings in dictionaries, lists and tuples, got "
        f"{type(leaf).__name__}: convert it, for example by dict(batch)."
    )
