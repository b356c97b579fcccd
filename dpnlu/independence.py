"""Whether an example's loss and gradient stay what they are in other company.

What crosses from one example to another without a gradient path, a detached mean, a division by the
batch's tokens, a routing that has only so much room, shows in no comparison of gradients. It shows
when half of the batch is exchanged: for examples that stay, in their places, everything must stay.
The shapes are the same, so that the same kernels run, and so are the random numbers; where nothing
crosses, losses come out the same to the last bit.

What it lets pass: changes of a loss by a few hundred units in its last place. What it cannot see:
what crosses only where values coincide otherwise, and Python's own records of earlier batches.
"""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dpnlu.checks import Checks
from dpnlu.errors import UnsupportedLayerError

# Units in the last place by which a loss may change where other values take other kernels.
_UNITS, _COARSE_UNITS = 256, 8
# Models in float64 may take norms and softmaxes in float32.
_FINEST = 2.0**-40
# In how many ways examples are looked for in tensors that may hold them in several dimensions.
_WAYS = 8


# What a run says of each example: tensors (B, …), such as losses and norms.
Answers = Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """Something that was computed of a batch and can be computed again.

    Attributes:
        again: a batch -> what is said of its examples, with the same random numbers every time.
        batch: what it was computed of.
        answers: what was said then, of the first examples or of all; None: it is computed again.
    """

    again: Callable[[Any], Answers]
    batch: Any
    answers: Answers | None


class Randomness:
    """The states of all random generators at one moment, to run something again from there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = self._read()

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """In here, random numbers are those that followed that moment; afterwards nothing was."""
        now = self._read()
        self._write(self._states)
        try:
            yield
        finally:
            self._write(now)

    def _read(self) -> tuple[Any, ...]:
        on_device = None
        if self._device.type == "cuda":
            on_device = torch.cuda.get_rng_state(self._device)
        numpy = np.random.get_state()  # noqa: NPY002 — it is what others draw from
        return torch.get_rng_state(), on_device, random.getstate(), numpy

    def _write(self, states: tuple[Any, ...]) -> None:
        on_cpu, on_device, python, numpy = states
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._device)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what runs in here change in the model's buffers."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, values in before:
                if buffer._version != version and buffer.shape == values.shape:
                    buffer.copy_(values)


class Independence:
    """Checks batches of one training for independent examples, as often as `dpnlu.checks` says."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._checks = Checks(model)
        self._coins = random.SystemRandom()
        self._places: dict[int, Places] = {}

    def is_due(self, signature: Hashable, count: int) -> bool:
        """Whether to check a batch of `count` examples."""
        return count > 1 and self._checks.meet(signature)[1]

    def check(
        self, runs: Sequence[Run], *, count: int, signature: Hashable, coarsest: float
    ) -> None:
        """Exchange half of the batch in each of the runs that led to its losses; see
        `check_independence`."""
        for number, run in enumerate(runs):
            places = self._places.setdefault(number, Places())
            places.learn(run.batch, count)
            check_independence(
                run,
                places,
                count=count,
                model=self._model,
                coins=self._coins,
                coarsest=coarsest,
            )
        self._checks.show_parameters(signature)

    def weights_changed(self) -> None:
        """The optimizer has stepped."""
        self._checks.weights_changed()


def by_example(outputs: Any, count: int) -> list[Tensor]:
    """What `outputs` hold of each example: tensors (B, …)."""
    found = []
    for leaf in leaves_of(outputs):
        dim = next((dim for dim, size in enumerate(leaf.shape) if size == count), None)
        if dim is not None:
            found.append(leaf.detach().movedim(dim, 0))
    return found


@dataclass
class Places:
    """Where the tensors of batches hold the examples: in dimensions that had their number in every
    batch so far.

    Attributes:
        dims: of each tensor of a batch, in order; None: no batch was seen yet.
    """

    dims: list[list[int]] | None = None

    def learn(self, batch: Any, count: int) -> None:
        """A batch of so many examples."""
        found = [
            [dim for dim, size in enumerate(leaf.shape) if size == count]
            for leaf in leaves_of(batch)
        ]
        if self.dims is not None and len(self.dims) == len(found):
            found = [
                [dim for dim in now if dim in before]
                for now, before in zip(found, self.dims, strict=True)
            ]
        self.dims = found

    def ways(self) -> Iterator[tuple[int | None, ...]]:
        """How the examples may lie in the tensors of a batch, the likeliest way first."""
        choices: list[list[int] | list[None]] = [dims or [None] for dims in self.dims or []]
        if any(self.dims or []):
            yield from itertools.islice(itertools.product(*choices), _WAYS)


def check_independence(
    run: Run,
    places: Places,
    *,
    count: int,
    model: nn.Module,
    coins: random.Random,
    coarsest: float,
) -> None:
    """Exchange half of a batch and compare what is said of the other half.

    Args:
        places: where the batch holds the examples.
        count: number of examples in the batch.
        model: what runs.
        coarsest: distance from 1 to the next number, of the coarsest numbers computed with.

    Raises:
        UnsupportedLayerError: an example's loss or norm depends on other examples.
    """
    source = _drawn_exchange(count, coins)
    stay = source == torch.arange(count)
    answers = run.again(run.batch) if run.answers is None else run.answers
    found: list[tuple[Tensor, Any]] = []
    for dims in places.ways():
        other = exchanged(run.batch, source, dims)
        changed = _changed(answers, run.again(other), stay, coarsest)
        if not bool(changed.any()):
            return
        found.append((changed, other))
    if not found:
        return
    if bool(_changed(answers, run.again(run.batch), torch.ones_like(stay), 0.0).any()):
        warnings.warn(
            "Whether examples are independent could not be checked: the same batch with the same "
            "random numbers gives other losses when it is computed again.",
            stacklevel=2,
        )
        return
    changed, other = found[0]
    name = _first_module_that_changes(model, run.again, (run.batch, other), stay)
    where = "" if name is None else f", first in module {name}"
    raise UnsupportedLayerError(
        "Expected the loss of one example to depend on that example alone, but that of example "
        f"{int(changed.nonzero()[0])} of the batch changes when {int((~stay).nonzero()[0])} and "
        f"others are exchanged{where}: remove what is computed of the whole batch (detached "
        "statistics, a division by its tokens or classes, mining of hard examples, routing with "
        "limited room)."
    )


def _first_module_that_changes(
    model: nn.Module, run: Callable[[Any], object], batches: tuple[Any, Any], stay: Tensor
) -> str | None:
    """The first module whose outputs for the examples that stay differ; None: there is none."""
    seen: list[list[tuple[str, list[Tensor]]]] = []
    for batch in batches:
        outputs: list[tuple[str, list[Tensor]]] = []
        hooks = [
            module.register_forward_hook(_noting(name, outputs, len(stay)))
            for name, module in model.named_modules()
        ]
        try:
            run(batch)
        finally:
            for hook in hooks:
                hook.remove()
        seen.append(outputs)
    for (name, one), (_, other) in zip(*seen, strict=False):
        for left, right in zip(one, other, strict=False):
            if left.shape == right.shape and not torch.equal(left[stay], right[stay]):
                return name or "(the model itself)"
    return None


def _noting(name: str, outputs: list[tuple[str, list[Tensor]]], count: int) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        leaves = [leaf for leaf in leaves_of(output) if leaf.dim() and leaf.shape[0] == count]
        outputs.append((name, [leaf.detach().nan_to_num() for leaf in leaves]))

    return note


def _drawn_exchange(count: int, coins: random.Random) -> Tensor:
    """(B,) what to put in each place: half of the examples stay, one of these takes the places of
    the others."""
    places = list(range(count))
    coins.shuffle(places)
    stay = places[: (count + 1) // 2]
    source = torch.full((count,), stay[0])
    source[stay] = torch.tensor(stay)
    return source


def _changed(one: Answers, other: Answers, stay: Tensor, coarsest: float) -> Tensor:
    """(B,) which of the examples that stay have another loss or norm."""
    changed = torch.zeros(len(stay), dtype=torch.bool)
    for left, right in zip(one, other, strict=True):
        changed[: len(left)] |= _differ(left, right[: len(left)], coarsest).cpu()
    return changed & stay


def _differ(one: Tensor, other: Tensor, coarsest: float) -> Tensor:
    """(n,) whether what is said of each example differs, as far as both say something."""
    shape = [min(sizes) for sizes in zip(one.shape, other.shape, strict=True)]
    one, other = (_cut(values, shape) for values in (one, other))
    known = torch.isfinite(one) & torch.isfinite(other)
    sizes = torch.where(known, one.abs(), 0)
    scale = sizes.maximum(sizes.mean()) if sizes.numel() else sizes
    fine = max(torch.finfo(one.dtype).eps, _FINEST)
    share = max(_UNITS * fine, _COARSE_UNITS * coarsest) if coarsest else 0.0
    return (known & ((one - other).abs() > share * scale)).flatten(1).any(1)


def _cut(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries along each dimension, as numbers with a fraction."""
    for dim, size in enumerate(shape):
        values = values.narrow(dim, 0, size)
    values = values.detach().reshape(shape[0], -1)
    return values if values.is_floating_point() else values.double()


# ---- batches of any kind ---------------------------------------------------------------------


def exchanged(batch: Any, source: Tensor, dims: Sequence[int | None]) -> Any:
    """The batch with example `source[i]` in place i.

    Args:
        dims: of each tensor, in the order of `leaves_of`, the dimension that holds the examples;
            None: none does.
    """
    remaining = iter(dims)

    def exchange(leaf: Tensor) -> Tensor:
        dim = next(remaining)
        if dim is None:
            return leaf
        return leaf.detach().index_select(dim, source.to(leaf.device))

    return _mapped(batch, exchange)


def leaves_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    _mapped(batch, note)
    return found


def _mapped(value: Any, function: Callable[[Tensor], Tensor], depth: int = 5) -> Any:
    """The same nesting of containers with every tensor replaced; packed sequences are unpacked
    for it."""
    if isinstance(value, Tensor):
        return function(value)
    if depth == 0 or value is None or isinstance(value, (str, bytes, int, float, nn.Module, type)):
        return value
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        padded, lengths = function(padded), function(lengths)
        return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    if isinstance(value, Mapping):
        held = {key: _mapped(branch, function, depth - 1) for key, branch in value.items()}
        return _refilled(value, held)
    if isinstance(value, (tuple, list)):
        branches = [_mapped(branch, function, depth - 1) for branch in value]
        return type(value)(*branches) if hasattr(value, "_fields") else type(value)(branches)
    if callable(value) or not (hasattr(value, "__dict__") or is_dataclass(value)):
        return value
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))
    changed = copy.copy(value)
    for name in names:
        branch = _mapped(getattr(value, name), function, depth - 1)
        object.__setattr__(changed, name, branch)
    return changed


def _refilled(value: Mapping[Any, Any], held: dict[Any, Any]) -> Any:
    """A mapping of the same kind with other values."""
    if type(value) is dict or not isinstance(value, MutableMapping):
        return held
    changed = copy.copy(value)
    for key, branch in held.items():
        changed[key] = branch
    return changed
