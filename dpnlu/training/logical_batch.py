"""One logical batch, from its beginning to its release: noise, clipped sums, ledger, optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpnlu.engines.clipper import Clipper
from dpnlu.engines.outcome import ClipOutcome, OpenUnit
from dpnlu.engines.refusals import check_unchanged
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.noise import add_system_gaussian, fill_gaussian
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.adam_bc import tell_noise
from dpnlu.training.buffers import Buffers
from dpnlu.training.handover import Handover
from dpnlu.training.processes import Counts, OneProcess, Processes
from dpnlu.training.public import PublicGradients


class NonFiniteBatchError(RuntimeError):
    """Every gradient of a logical batch was infinite or not a number.

    Nothing of the batch is released. That training stopped there is itself a word about the data,
    which ε does not cover: it is for whoever holds the data.
    """


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What the logical batches of one training have in common.

    Attributes:
        plan: how much noise, and what a sum is divided by.
        ledger: where every release is recorded.
        model: whose trainable parameters are `parameters`.
        optimizer: acts on what is released and on gradients of public examples, and on nothing
            else.
        generators: where the noise comes from; none at all stands for the operating system.
        processes: that train together, each with a mechanism of its own.
        clipper: of the engine, whose bound follows the releases or public examples where the plan
            says so; None: the bound is the plan's.
        public: gradients of public examples, which the optimizer gets beside; None: there are none.
    """

    plan: PrivacyPlan
    ledger: Ledger
    model: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer | Handover
    generators: Sequence[torch.Generator]
    processes: Processes = field(default_factory=OneProcess)
    clipper: Clipper | None = None
    public: PublicGradients | None = None

    @property
    def bound(self) -> float:
        """The clipping bound of the logical batch that is open, or comes next."""
        return self.plan.max_grad_norm if self.clipper is None else self.clipper.bound

    @property
    def draws_from_system(self) -> bool:
        """Whether noise is added to whole sums, as it hides how these were rounded; else sums begin
        as noise."""
        return not self.generators

    def check_ready(self) -> None:
        """Whether another logical batch may begin.

        Raises:
            RuntimeError: all planned steps are taken, or a gradient was left by a call of backward.
            ValueError: the trainable parameters are not those with which training began.
        """
        if len(self.ledger) >= self.plan.steps:
            raise RuntimeError(
                f"All {self.plan.steps} planned steps are taken; to train on, plan more steps."
            )
        check_unchanged(self.model, self.parameters)
        self.check_no_gradients()

    def noisy_number(self, value: float, *, std: float) -> float:
        """A number with noise added."""
        if self.draws_from_system:
            whole = torch.tensor([value], dtype=torch.float64)
            add_system_gaussian([whole], std=std)
            return float(whole)
        noise = torch.zeros(1, device=self.parameters[0].device)
        fill_gaussian([noise], std=std, generators=self.generators)
        return value + float(noise)

    def check_no_gradients(self) -> None:
        """The optimizer must meet no gradient but what is released: it would act on it too.

        Raises:
            RuntimeError: there is another.
        """
        groups = self.optimizer.param_groups
        if any(parameter.grad is not None for group in groups for parameter in group["params"]):
            raise RuntimeError(
                "Found gradients that the engine did not make: call neither backward() nor a "
                "scaler on the losses, and optimizer.zero_grad() if they are old."
            )


class _State(Enum):
    OPEN = "open"
    RELEASED = "released"
    ABANDONED = "abandoned"


class LogicalBatch:
    """The sum behind one step of the optimizer. It is begun, added to any number of times, and then
    either released or abandoned; nothing is seen of it unless it is released. Of several processes
    each has one, for its part of the examples; they are released together.

    Guarantee: what is released is the sum of what was added plus noise, drawn independently for
    every entry, with the standard deviation that the plan states for this release; and the ledger
    holds the release before the optimizer, or anybody else, sees it.

    Attributes:
        unit: what there is of the clipping unit that has begun.
        non_finite: clipping units left out so far because their gradient was not finite. Private.
    """

    def __init__(self, mechanism: Mechanism) -> None:
        """Begin; nothing is drawn yet.

        Raises:
            RuntimeError, ValueError: see `Mechanism.check_ready`.
        """
        mechanism.check_ready()
        self._mechanism = mechanism
        step = len(mechanism.ledger)
        self._std = mechanism.plan.noise_std_at(step, bound=mechanism.bound)
        self._divisor = mechanism.plan.divisor
        self._state = _State.OPEN
        self._buffers: dict[nn.Parameter, Tensor] = {}
        self._blocks: Sequence[Tensor] = ()
        self._units = self._unclipped = 0
        self.unit = OpenUnit()
        self.non_finite = 0

    @property
    def is_open(self) -> bool:
        """Whether it is neither released nor abandoned."""
        return self._state is _State.OPEN

    @property
    def released(self) -> Mapping[nn.Parameter, Tensor]:
        """Parameter -> the released sum, divided by the plan's divisor; empty unless released."""
        return self._buffers if self._state is _State.RELEASED else {}

    def add(self, outcome: ClipOutcome) -> None:
        """Add the clipped gradients of a physical batch. If that fails, the batch is abandoned:
        some may be in the sum already, and to try again would add them twice.

        Raises:
            RuntimeError: the logical batch is not open.
        """
        self._check_open()
        self._units += len(outcome.norms)
        self.non_finite += outcome.non_finite
        if outcome.unclipped is not None:
            self._unclipped += int(outcome.unclipped.sum())
        if outcome.total is None:
            return
        try:
            self._begin_sums()
            outcome.total.add_to(self._buffers, scale=1 / self._divisor)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """End without a release: nothing of the batch is ever seen."""
        self._state, self._buffers, self._blocks = _State.ABANDONED, {}, ()

    def release(self, *, sampled: bool) -> None:
        """Record the release, then let the optimizer act on it. If it cannot be recorded, or
        another process does not come, the batch is abandoned.

        Args:
            sampled: whether the examples were drawn as planned; else the release is accounted
                without amplification.

        Raises:
            NonFiniteBatchError: there are several clipping units, and none is finite.
            RuntimeError: the logical batch is not open, or there are gradients of somebody else.
            LedgerError, OSError: the ledger cannot hold the release.
            ProcessesError: another process has failed or ended.
        """
        self._check_open()
        ledger, plan = self._mechanism.ledger, self._mechanism.plan
        processes = self._mechanism.processes
        try:
            self._mechanism.check_no_gradients()
            # What fails on one process alone must fail before all agree, or the others would wait.
            self._begin_sums()
            counts = processes.agree(len(ledger), self._counts(), sampled=sampled)
            _check_finite(counts)
            processes.add_up(list(self._buffers.values()))
            if self._mechanism.draws_from_system:
                std = self._std / self._divisor
                processes.noisy(self._blocks, partial(add_system_gaussian, std=std))
            event = plan.event_at(len(ledger), sampled=sampled)
            bound = self._next_bound(counts)
            told = {} if bound is None else {"bound": bound}
            processes.record(partial(ledger.append, event, **told))
        except BaseException:
            self.abandon()
            raise
        self._state = _State.RELEASED
        if self._mechanism.clipper is not None and bound is not None:
            self._mechanism.clipper.bound = bound
        self._step()
        is_last = len(ledger) == plan.steps
        processes.compare(self._mechanism.parameters, releases=len(ledger), is_last=is_last)

    def _begin_sums(self) -> None:
        """Have the sums begin as noise, once; or as zeros, where it is added to them at last.

        As late as possible: only when the first clipped gradients are there are the activations of
        their forward pass gone. And into the memory that is added to: a pass less over all
        parameters.
        """
        if self._buffers:
            return
        buffers = Buffers.like(self._mechanism.parameters)
        if self._mechanism.draws_from_system:
            torch._foreach_zero_(buffers.blocks)
        else:
            ours = self._mechanism.processes.noisy_part_of(buffers.blocks)
            std, generators = self._std / self._divisor, self._mechanism.generators
            fill_gaussian(ours, std=std, generators=generators)
        self._buffers, self._blocks = buffers.of, buffers.blocks

    def _counts(self) -> Counts:
        return Counts(units=self._units, non_finite=self.non_finite, unclipped=self._unclipped)

    def _next_bound(self, counts: Counts) -> float | None:
        """The clipping bound after this release, from a noisy count, or, where the next one is that
        of public examples, as it was; None: it does not change.

        Args:
            counts: of all processes.
        """
        clipper, plan = self._mechanism.clipper, self._mechanism.plan
        if clipper is None or clipper.adaptation is None:
            is_public = clipper is not None and clipper.public_quantile is not None
            return self._mechanism.bound if is_public else None
        # Half of all units less, so that one of them moves it by a half, whichever way it counts.
        centred = counts.unclipped - counts.units / 2
        std = plan.count_std_at(len(self._mechanism.ledger))
        noisy = self._mechanism.noisy_number(centred, std=std)
        bound = clipper.adaptation.next_bound(clipper.bound, noisy / plan.divisor + 1 / 2)
        return self._mechanism.processes.from_first(clipper.within_limits(bound))

    def _step(self) -> None:
        """Let the optimizer act on the sums, with public gradients added, which it finds as
        gradients for as long as that takes."""
        public = self._mechanism.public
        beside: Mapping[nn.Parameter, Tensor] = {} if public is None else public.mean
        try:
            for parameter, total in self._buffers.items():
                whole = total + beside[parameter] if parameter in beside else total
                parameter.grad = whole.to(parameter.dtype)
            optimizer = self._mechanism.optimizer
            tell_noise(optimizer, self._std / self._divisor)
            optimizer.step()
        finally:
            for parameter in self._mechanism.parameters:
                parameter.grad = None

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError(
                f"Expected a logical batch that is open, got one that is {self._state.value}: "
                "begin another."
            )


def _check_finite(counts: Counts) -> None:
    if counts.units > 1 and counts.non_finite == counts.units:
        raise NonFiniteBatchError(
            f"None of the {counts.units} gradients of a logical batch is finite: training has "
            "diverged, or the loss overflows. Lower the learning rate, or compute in float32."
        )
