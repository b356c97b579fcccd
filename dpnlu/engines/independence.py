"""Whether an example's loss and gradient stay the same when other examples are exchanged.

What crosses from one example to another without a gradient path, a detached mean, a division by the
batch's tokens, a routing that has only so much room, shows in no comparison of gradients. It shows
when part of the batch is exchanged: for examples that stay, in their places, everything must stay.
The shapes are the same and so are the random numbers, so that the same kernels run: where nothing
crosses, losses and norms come out the same, in any precision.

What it lets pass: changes of a few hundred units in the last place of a loss; where other values
take other kernels (sequences are packed, rows chosen), of eight in that of the coarsest numbers
that were computed with. What it cannot see: what crosses only between examples that were not drawn
for it, and Python's own records of earlier batches.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpnlu.engines.batches import Places, exchanged, leaves_of
from dpnlu.engines.checks import Checks
from dpnlu.gradients.errors import UnsupportedLayerError

# Units in the last place by which a loss may change, of its own and, where other values take other
# kernels, of the coarsest numbers.
_UNITS, _COARSE_UNITS = 256, 8
# Models in float64 may take norms and softmaxes in float32.
_FINEST = 2.0**-40
# How often the first batch of its kind is exchanged, and others.
_AT_FIRST, _LATER = 8, 1


@dataclass(frozen=True)
class Answers:
    """What a run says of each example.

    Attributes:
        values: tensors (B, …), such as losses and norms.
        signature: what was done; None: it is not known.
    """

    values: Sequence[Tensor]
    signature: Hashable = None


class SmallerBatch(Protocol):
    """Can make a batch of the same kind with another number of examples."""

    def make(self) -> tuple[Any, int]:
        """The batch, and the number of its examples."""


class Run(Protocol):
    """Something that was computed of a batch and can be computed again.

    Attributes:
        batch: what it was computed of.
        answers: what was said then, of the first examples or of all; None: it is computed again.
        smaller: makes a batch to compare shapes with; None: who made the batch is not known.
    """

    @property
    def batch(self) -> Any: ...

    @property
    def answers(self) -> Answers | None: ...

    @property
    def smaller(self) -> SmallerBatch | None: ...

    def again(self, batch: Any) -> Answers:
        """What is said of the examples of a batch, with the same random numbers every time."""


class Independence:
    """Checks that examples are independent, as often as `dpnlu.engines.checks` says."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._checks = Checks(model)
        self._coins = random.SystemRandom()
        self._places: dict[int, Places] = {}

    def is_due(self, signature: Hashable, count: int) -> bool:
        """Whether to check a batch of `count` examples."""
        return count > 1 and self._checks.observe(signature)[1]

    def check(
        self, runs: Sequence[Run], *, count: int, signature: Hashable, coarsest: float
    ) -> None:
        """Exchange examples of the batch in each of the runs that led to its losses.

        Args:
            count: number of examples in the batch.
            coarsest: distance from 1 to the next number, of the coarsest numbers computed with.

        Raises:
            UnsupportedLayerError: an example's loss or norm depends on other examples.
        """
        times = _LATER if self._checks.is_shown(signature) else _AT_FIRST
        for number, run in enumerate(runs):
            places = self._places.setdefault(number, Places())
            places.learn(run.batch, count)
            exchange = _Exchange(run, places, self._model, count, coarsest)
            start = self._coins.randrange(2)
            sources = [
                _near(count, self._coins) if time % 2 else _by_one(count, self._coins)
                for time in range(start, start + times)
            ]
            exchange.check(sources)
        self._checks.show_parameters(signature)

    def weights_changed(self) -> None:
        """The optimizer has stepped."""
        self._checks.weights_changed()


class _Exchange:
    """The check of one run."""

    def __init__(
        self, run: Run, places: Places, model: nn.Module, count: int, coarsest: float
    ) -> None:
        self._run, self._places, self._model = run, places, model
        self._count, self._coarsest = count, coarsest
        self._answers = run.again(run.batch) if run.answers is None else run.answers

    def check(self, sources: Sequence[Tensor]) -> None:
        """Exchange as each of the sources says, (B,) which example to put in each place."""
        failures: list[Exception] = []
        for source in sources:
            try:
                accused = self._accused(source)
                if accused is not None and self._learns_more():
                    accused = self._accused(source)
            except _NotExchangeable as error:
                failures.append(error)
                continue
            if accused is not None and not self._is_repeatable():
                return
            if accused is not None:
                raise UnsupportedLayerError(self._accusation(source, *accused))
        if failures and len(failures) == len(sources):
            warnings.warn(
                "Whether examples are independent could not be checked: a batch in which some are "
                f"exchanged for others cannot be computed ({failures[0]}).",
                stacklevel=6,
            )

    def _accused(self, source: Tensor) -> tuple[int, Any] | None:
        """An example that stays and whose answers change, and the batch in which they do; None:
        there is none.

        Raises:
            _NotExchangeable: the model does not accept such a batch.
        """
        found: tuple[int, Any] | None = None
        failure: Exception | None = None
        for dims in self._places.ways():
            other = exchanged(self._run.batch, source, dims)
            try:
                answers = self._run.again(other)
            except UnsupportedLayerError:
                raise
            except Exception as error:  # whatever the user's code makes of it
                failure = error
                continue
            changed = self._changed(answers, source == torch.arange(self._count))
            if not bool(changed.any()):
                return None
            found = found or (int(changed.nonzero()[0]), other)
        if found is None and failure is not None:
            raise _NotExchangeable(f"{type(failure).__name__}: {failure}")
        return found

    def _learns_more(self) -> bool:
        """See a batch of fewer examples, if their number may be that of something else."""
        if self._run.smaller is None or not self._places.may_be_chance:
            return False
        self._places.learn(*self._run.smaller.make())
        return True

    def _changed(self, other: Answers, stay: Tensor) -> Tensor:
        """(B,) which of the examples that stay have other answers."""
        is_alike = other.signature is not None and other.signature == self._answers.signature
        changed = torch.zeros(len(stay), dtype=torch.bool)
        for left, right in zip(self._answers.values, other.values, strict=True):
            share = _share(left, 0.0 if is_alike else self._coarsest)
            changed[: len(left)] |= _differ(left, right[: len(left)], share).cpu()
        return changed & stay

    def _is_repeatable(self) -> bool:
        """Whether the very batch gives the very answers again; says so if it does not."""
        again = self._run.again(self._run.batch)
        pairs = zip(self._answers.values, again.values, strict=True)
        if not any(bool(_differ(one, two[: len(one)], 0.0).any()) for one, two in pairs):
            return True
        warnings.warn(
            "Whether examples are independent could not be checked: the same batch with the same "
            "random numbers gives other losses when it is computed again.",
            stacklevel=7,
        )
        return False

    def _accusation(self, source: Tensor, example: int, other: Any) -> str:
        stay = source == torch.arange(self._count)
        name = _first_module_that_changes(self._model, self._run, (self._run.batch, other), stay)
        where = "" if name is None else f", first in module {name}"
        return (
            "Expected the loss of one example to depend on that example alone, but that of example "
            f"{example} of the batch changes when {int((~stay).nonzero()[0])} and others are "
            f"exchanged{where}: remove what is computed of the whole batch (detached statistics, a "
            "division by its tokens or classes, mining of hard examples, routing with limited "
            "room)."
        )


class _NotExchangeable(Exception):
    """The user's code does not accept a batch with exchanged examples."""


def _by_one(count: int, coins: random.Random) -> Tensor:
    """(B,) half of the examples stay, one of them takes the places of the others."""
    stay = coins.sample(range(count), (count + 1) // 2)
    source = torch.full((count,), stay[0])
    source[stay] = torch.tensor(stay)
    return source


def _near(count: int, coins: random.Random) -> Tensor:
    """(B,) half of the examples stay, each of them takes the places up to the next that stays, so
    that a batch in order stays in order."""
    stay = sorted(coins.sample(range(count), (count + 1) // 2))
    following = torch.searchsorted(torch.tensor(stay), torch.arange(count), right=True) - 1
    return torch.tensor(stay)[following.clamp(min=0)]


def _share(values: Tensor, coarsest: float) -> float:
    """By which share values may change where other kernels are taken.

    Args:
        coarsest: of the numbers that other kernels round; 0: the same kernels are taken.
    """
    info = torch.finfo(values.dtype) if values.is_floating_point() else torch.finfo(torch.float64)
    units = _UNITS if info.bits > 16 else 1
    return max(units * max(info.eps, _FINEST), _COARSE_UNITS * coarsest)


def _differ(one: Tensor, other: Tensor, share: float) -> Tensor:
    """(n,) whether what is said of each example differs, as far as both say something."""
    shape = [min(sizes) for sizes in zip(one.shape, other.shape, strict=True)]
    one, other = (_cut(values, shape) for values in (one, other))
    known = torch.isfinite(one) & torch.isfinite(other)
    sizes = torch.where(known, one.abs(), 0)
    scale = sizes.maximum(sizes.mean()) if sizes.numel() else sizes
    return (known & ((one - other).abs() > share * scale)).any(1)


def _cut(values: Tensor, shape: Sequence[int]) -> Tensor:
    """(n, …) -> (n, m), the first entries along each dimension, as numbers with a fraction."""
    for dim, size in enumerate(shape):
        values = values.narrow(dim, 0, size)
    values = values.detach().reshape(shape[0], -1)
    return values if values.is_floating_point() else values.double()


def _first_module_that_changes(
    model: nn.Module, run: Run, batches: tuple[Any, Any], stay: Tensor
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
            run.again(batch)
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
