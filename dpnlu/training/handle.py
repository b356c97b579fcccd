"""Private training: the handle that a plain loop uses, and a loop of our own on top of it.

private = privatize(model, optimizer, plan)
step = private.stepper(per_example_loss)         # batch -> (B,) losses
for batch in private.loader(dataset, collate_fn=collate, physical_batch_size=64):
    step(batch)
print(private.epsilon())
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from dpnlu.engines import ENGINES
from dpnlu.engines.base import Engine
from dpnlu.engines.batches import by_example
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.clipped import Clipped
from dpnlu.engines.independence import Answers, Independence, Run
from dpnlu.engines.moment import Moments
from dpnlu.engines.refusals import check_losses, check_shape, check_trainable, check_unchanged
from dpnlu.gradients.calls import Call
from dpnlu.gradients.signature import Signature
from dpnlu.mechanism.ledger import Ledger, LedgerError
from dpnlu.mechanism.noise import entropy_generators
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import PhysicalBatch
from dpnlu.training.loader import PrivateLoader
from dpnlu.training.logical_batch import NoisySums


class NonFiniteBatchError(RuntimeError):
    """Every gradient of a logical batch was infinite or not a number.

    Nothing of the batch is released. That training stopped there is itself a word about the data,
    which ε does not cover: it is for whoever holds the data.
    """


def privatize(
    model: nn.Module,
    optimizer: Optimizer,
    plan: PrivacyPlan,
    *,
    engine: str | None = None,
    ledger: Ledger | Path | None = None,
    noise: torch.Generator | Literal["system"] | None = None,
    sampling_rng: np.random.Generator | None = None,
    verify: bool = True,
) -> PrivateTraining:
    """Make the training of `model` by `optimizer` follow `plan`.

    The model and the optimizer stay as they are: nothing is wrapped, replaced or patched, and
    `close()` leaves no trace.

    Args:
        model: its trainable parameters (`requires_grad`) are trained privately.
        optimizer: any `torch.optim` optimizer over exactly these parameters.
        plan: the mechanism.
        engine: "book_keeping", "per_example", "microbatch" or "opacus"; None: what suits the plan's
            clipping unit. All per-example engines give the same result.
        ledger: where releases are recorded; a path starts a new file. None: in memory only. One
            that holds releases is continued; its plan must be `plan`, but for the steps. It knows
            of this training alone: a model trained before has spent what that one's ledger says.
        noise: where the noise comes from. None: a generator whose whole state is fresh entropy;
            "system": the operating system's entropy for every draw, cryptographically secure and
            slow; a generator of your own, to repeat an experiment: never for a model that is
            released.
        sampling_rng: the coins of Poisson sampling; None: fresh entropy.
        verify: check before anything is released that every use of a parameter was recorded, that
            no example has a part in another's gradient, loss or norm, and that gradients are those
            of plain automatic differentiation: the first of every batch, the others as often as
            `dpnlu.engines.checks` says.

    Raises:
        UnsupportedLayerError: the model has a layer that mixes examples or modifies weights by
            itself; the message names it.
        ValueError: the optimizer's parameters are not the model's, or the engine or the ledger does
            not fit the plan.
        LedgerError: there is a file at the ledger's path.
    """
    name = engine or {"example": "book_keeping", "microbatch": "microbatch"}[plan.clipping_unit]
    _check_engine(name, plan)
    if isinstance(ledger, Ledger):
        _check_ledger(ledger, plan)
    parameters = check_trainable(model, optimizer)
    generators = _generators(noise, parameters[0].device)
    options = {"verify": verify} if name == "book_keeping" else {}
    made = ENGINES[name](model, plan, **options)
    try:
        # Last: a file that holds nothing would still have to be resumed.
        ledger = ledger if isinstance(ledger, Ledger) else Ledger(plan, path=ledger)
    except (LedgerError, OSError):
        made.close()
        raise
    return PrivateTraining(
        plan=plan,
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        engine=made,
        ledger=ledger,
        generators=generators,
        sampling_rng=sampling_rng or np.random.default_rng(),
        verify=verify,
    )


class PrivateTraining:
    """The state of one private training; made by `privatize`.

    Guarantee: the model's parameters change only by the optimizer acting on released sums: the
    clipped gradients of one logical batch plus noise as planned, recorded in the ledger before the
    optimizer sees them, divided by a public number.
    """

    def __init__(
        self,
        *,
        plan: PrivacyPlan,
        model: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        engine: Engine,
        ledger: Ledger,
        generators: Sequence[torch.Generator],
        sampling_rng: np.random.Generator,
        verify: bool,
    ) -> None:
        self.plan = plan
        self.ledger = ledger
        self.steps_taken = 0
        self._model = model
        self._parameters = parameters
        self._recorder = engine if isinstance(engine, BookKeeping) else None
        # A micro-batch is clipped as a whole: what its members do to each other does not matter.
        checks = verify and plan.clipping_unit == "example"
        self._independence = Independence(model) if checks else None
        self._moments = Moments(model)
        self._optimizer = optimizer
        self._engine = engine
        self._generators = generators
        self.sampling_rng = sampling_rng
        #: Of the logical batch that is open: noise, and the gradients clipped so far.
        self._sums: NoisySums | None = None
        self._released: Mapping[nn.Parameter, Tensor] = {}
        self._is_closed = False
        self._loop: object | None = None
        self._pending: PhysicalBatch | None = None
        self._fewer: Callable[[], tuple[Any, int]] | None = None
        self._warned = False
        self._units = self._non_finite = 0
        #: Clipping units left out so far because their gradient was not finite. Private.
        self.non_finite_units = 0

    @property
    def remaining_steps(self) -> int:
        """Releases that a loop over the loader may still make.

        Guarantee: with them ε does not pass the plan's; see `Ledger.remaining_steps`. Steps outside
        the loader cost more than planned, and leave fewer.
        """
        return self.ledger.remaining_steps(self.plan)

    def epsilon(self, *, accountant: str = "pld") -> float:
        """ε spent so far, at the plan's δ, from the ledger."""
        return self.ledger.epsilon(accountant=accountant)

    @property
    def gradients(self) -> Mapping[nn.Parameter, Tensor]:
        """Parameter -> the released sum of the last logical batch: clipped, noised, not divided.

        Empty from the moment the next one begins.

        Guarantee: nothing is here that the ledger does not hold.
        """
        return {p: total * self.plan.divisor for p, total in self._released.items()}

    def loader(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        physical_batch_size: int | None = None,
        fixed_size: bool = False,
        num_workers: int = 0,
    ) -> PrivateLoader:
        """Physical batches of Poisson-sampled logical batches, for all remaining steps.

        Each batch must be answered by one `step(losses)`. Logical batches that happen to be empty
        are released, as noise alone, without being seen here.

        Args:
            dataset: indexed from 0 to `plan.num_examples` - 1.
            collate_fn: a list of examples -> a batch, as in torch's `DataLoader`.
            physical_batch_size: how many examples to compute at once; None: a whole logical batch.
            fixed_size: have exactly that many in every batch, for kernels that are made anew for
                each shape. What is missing is filled up with further copies of the batch's own
                examples, of which `step` leaves no trace.
            num_workers: processes that load and collate, as in torch's `DataLoader`.

        Raises:
            ValueError: the data set has another size than the plan says, or a fixed size is wanted
                and not given.
        """
        return PrivateLoader(
            self,
            dataset,
            collate_fn=collate_fn,
            physical_batch_size=physical_batch_size,
            fixed_size=fixed_size,
            num_workers=num_workers,
        )

    def stepper(self, losses_of: Callable[[Any], Tensor]) -> Callable[[Any], bool]:
        """Make steps of batches: the way to train, as it sees and can check all that is computed.

        step = private.stepper(per_example_loss)
        for batch in private.loader(dataset, collate_fn=collate, physical_batch_size=64):
            step(batch)

        Args:
            losses_of: batch -> (B,), the loss of each example, depending on that example alone.
                It may use the model's modules and parameters in any way, and must read the batch
                through this argument. It is called again, with half of the batch exchanged, when
                that is checked.

        Returns:
            What is called with each batch of the loader, and answers as `step` does. Outside a loop
            over the loader, its examples count as one whole logical batch.
        """

        def step(data: Any) -> bool:
            batch = self._pending
            if batch is None:
                self._check_unsampled()
            moment = self._moments.now()
            losses = self._losses(losses_of, data, batch)
            self._moments.notice(moment)

            def again(other: Any) -> Answers:
                with moment.repeated():
                    return self._answers(self._losses_again(losses_of, other, batch), batch)

            def add(sums: NoisySums) -> Clipped | None:
                clipped = self._add(losses, batch, sums)
                if clipped is not None and self._is_to_be_exchanged(len(losses)):
                    norms = [] if self._recorder is None else [clipped.norms]
                    values = [losses.detach()[: len(clipped.norms)], *norms]
                    known = Answers(values, self._exact_signature)
                    self._exchange([Run(again, data, known, self._fewer)], len(losses))
                return clipped

            return self._advance(batch, add)

        return step

    def step(self, losses: Tensor) -> bool:
        """Clip and add up the gradients of these examples; release at the end of a logical batch.

        Outside a loop over the loader the examples count as one whole logical batch. As they were
        not sampled, that release is accounted without amplification.

        What is computed outside the model's modules is not seen here: parameters that are used
        there are refused, and what mixes examples there without a gradient is not noticed. Let
        `stepper` call the function that computes the losses where you can.

        Args:
            losses: (B,), the loss of each example of the batch, depending on that example alone.

        Returns:
            Whether a logical batch was completed, and the optimizer has stepped.

        Raises:
            ValueError, TypeError: `losses` is not such a vector, or is not connected to the model.
            NonFiniteBatchError: no example of the logical batch has a finite gradient.
            RuntimeError: the loader's batch was stepped already, all planned steps are taken, the
                training is closed, or a gradient was left by a call of backward.
        """
        batch = self._pending
        check_losses(losses, None if batch is None else len(batch.ids))
        if batch is None:
            self._check_unsampled()
        calls = [] if self._recorder is None else self._recorder.calls

        def add(sums: NoisySums) -> Clipped | None:
            clipped = self._add(losses, batch, sums)
            if calls and self._is_to_be_exchanged(len(losses)):
                self._exchange([self._again(call, len(losses)) for call in calls], len(losses))
            return clipped

        return self._advance(batch, add)

    def compile(
        self, losses_of: Callable[[Any], Tensor], *, backend: str = "inductor"
    ) -> Callable[[Any], bool]:
        """Compile steps, from the batch to the norms of its gradients, with `torch.compile`.

        step = private.compile(per_example_loss)
        for batch in private.loader(dataset, physical_batch_size=64, fixed_size=True):
            step(batch)

        Forward pass, backward pass and norms become one program for each shape of the batch, so
        that few shapes should occur. The model itself must not be compiled.

        Args:
            losses_of: batch -> (B,), the loss of each example. The batch holds tensors, numbers and
                strings in dictionaries, lists and tuples, and is read through this argument alone.
                Which operations are done must not depend on values. Other numbers that the function
                uses stay what they were when a shape first came.
            backend: of `torch.compile`; "inductor" needs a C++ compiler.

        Returns:
            What is called with each batch of the loader in place of `step(losses)`, and answers
            alike.

        Raises:
            ValueError: another engine than book_keeping.
            UnsupportedLayerError: a recurrent layer; or, from the step, a forward pass that cannot
                be traced.
        """
        if not isinstance(self._engine, BookKeeping):
            raise ValueError("Expected engine='book_keeping', the one whose steps can be compiled.")
        from dpnlu.engines.compiled import CompiledClipping  # loads torch's compiler

        clipping = CompiledClipping(
            self._engine, losses_of, scale=1 / self.plan.divisor, backend=backend
        )

        def step(data: Any) -> bool:
            batch = self._pending
            if batch is None:
                raise RuntimeError(
                    "Expected one compiled step for each batch of private.loader, got another: "
                    "call it inside the loop, with the loop's batch."
                )
            count, kept = len(batch.ids), len(batch.ids) - batch.fillers
            moment = self._moments.now()

            def again(other: Any) -> Answers:
                with torch.no_grad(), moment.repeated():
                    return Answers([losses_of(other)[:kept]])

            def add(sums: NoisySums) -> Clipped:
                clipped = clipping.add_clipped(data, count=count, kept=kept, into=sums).first(kept)
                if self._is_to_be_exchanged(count):
                    self._exchange([Run(again, data, fewer=self._fewer)], count)
                return clipped

            return self._advance(batch, add)

        return step

    def weights_changed(self) -> None:
        """Somebody else than the optimizer has changed weights: what was all zero may not be."""
        self._engine.weights_changed()
        if self._independence is not None:
            self._independence.weights_changed()

    def close(self) -> None:
        """Detach from the model and close the ledger; `epsilon()` keeps answering."""
        self._engine.close()
        self.ledger.close()
        self._sums, self._is_closed = None, True

    def __enter__(self) -> PrivateTraining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- for the loader ----------------------------------------------------------------------

    def begin_loop(self) -> object:
        """Begin anew, with a loop that alone may hand out batches; returned is what stands for it.

        What was begun and not completed is forgotten: nothing of it was released.
        """
        self._forget()
        self._loop = object()
        return self._loop

    def begin(
        self,
        batch: PhysicalBatch,
        data: Any = None,
        fewer: Callable[[], tuple[Any, int]] | None = None,
    ) -> None:
        """A physical batch is about to be computed from its data; `fewer` makes one of fewer
        examples, and tells how many."""
        if self._sums is None:
            self._released = {}  # room for its activations
        self._pending, self._fewer = batch, fewer
        self._engine.expect(len(batch.ids), data)

    def check_answered(self, loop: object) -> None:
        """Refuse to go on with a loop that has been replaced, or whose last batch has no step."""
        if self._loop is not loop:
            raise RuntimeError(
                "Expected the loop over the loader that was begun last, and in which no step "
                "failed: begin a new one, `for batch in private.loader(...)`."
            )
        if self._pending is not None:
            raise RuntimeError(
                "Expected private.step(losses) once for every batch of the loader, but the last "
                "batch was left without."
            )

    def release_empty(self) -> None:
        """An empty logical batch: noise alone is released, and accounted."""
        self._release(self._open(), sampled=True)

    def end_loop(self, loop: object) -> None:
        """The loop is over, or was broken off."""
        if self._loop is loop:
            self._forget()

    # ---- one logical batch -------------------------------------------------------------------

    def _forget(self) -> None:
        self._loop = self._pending = self._sums = None
        self._engine.expect(None)

    def _open(self) -> NoisySums:
        """Begin a logical batch, whose sums start from its noise."""
        if self._is_closed:
            raise RuntimeError("Expected an open training, got a closed one: call privatize anew.")
        if len(self.ledger) >= self.plan.steps:
            raise RuntimeError(
                f"All {self.plan.steps} planned steps are taken; to train on, plan more steps."
            )
        check_unchanged(self._model, self._parameters)
        self._check_no_gradients()
        std = self.plan.noise_std_at(len(self.ledger)) / self.plan.divisor
        self._released = {}
        self._sums = NoisySums(self._parameters, std=std, generators=self._generators)
        self._units = self._non_finite = 0
        return self._sums

    def _advance(
        self, batch: PhysicalBatch | None, add: Callable[[NoisySums], Clipped | None]
    ) -> bool:
        """Add clipped gradients to the sums, once; release at the end of a logical batch."""
        sums = self._open() if self._sums is None else self._sums
        try:
            clipped = add(sums)
        except BaseException:
            self._forget()  # some may be in the sums already: to try again would add them twice
            raise
        self._pending = None
        if clipped is not None:
            self._units += len(clipped.norms)
            self._non_finite += clipped.non_finite
        if batch is not None and not batch.closes_step:
            return False
        self._release(sums, sampled=batch is not None)
        return True

    def _losses(
        self, losses_of: Callable[[Any], Tensor], data: Any, batch: PhysicalBatch | None
    ) -> Tensor:
        """The losses of a batch, computed where the engine sees it if it has to."""
        count = None if batch is None else len(batch.ids)
        if self._recorder is not None:
            return self._recorder.losses(losses_of, data, count)
        losses = losses_of(data)
        check_losses(losses, count)
        return losses

    def _losses_again(
        self, losses_of: Callable[[Any], Tensor], data: Any, batch: PhysicalBatch | None
    ) -> Tensor:
        """The same of a batch in which examples were exchanged, on which no step is made."""
        if not self._engine.counts_forward_passes:
            return self._losses(losses_of, data, batch)
        with torch.no_grad():
            losses = losses_of(data)
        check_shape(losses, None if batch is None else len(batch.ids))
        return losses

    def _answers(self, losses: Tensor, batch: PhysicalBatch | None) -> Answers:
        """What is compared of a batch, from losses that were computed for it alone."""
        losses = self._without(losses, 0 if batch is None else batch.fillers)
        norms = [] if self._recorder is None else [self._recorder.norms(losses)]
        return Answers([losses.detach(), *norms], self._exact_signature)

    @property
    def _exact_signature(self) -> Signature | None:
        """What was done with the last batch, if values had no part in that."""
        signature = None if self._recorder is None else self._recorder.signature
        return None if signature is None or signature.may_choose_rows else signature

    def _is_to_be_exchanged(self, count: int) -> bool:
        """Whether to check of the last batch, of `count` examples, that they are independent."""
        signature = None if self._recorder is None else self._recorder.signature
        return self._independence is not None and self._independence.is_due(signature, count)

    def _exchange(self, runs: Sequence[Run], count: int) -> None:
        """Check it by exchanging examples in the runs that led to the batch's losses."""
        assert self._independence is not None
        recorder = self._recorder
        self._independence.check(
            runs,
            count=count,
            signature=None if recorder is None else recorder.signature,
            coarsest=torch.finfo(torch.float32).eps if recorder is None else recorder.coarsest,
        )

    def _again(self, call: Call, count: int) -> Run:
        """The call of a module, to run once more with other examples."""
        moment, recorder = self._moments.now(), self._recorder
        assert recorder is not None

        def again(given: Any) -> Answers:
            with moment.repeated():
                outputs, signature = recorder.run(call, given, count)
            exact = None if signature is None or signature.may_choose_rows else signature
            return Answers(by_example(outputs, count), exact)

        return Run(again, (call.args, call.kwargs))

    def _add(self, losses: Tensor, batch: PhysicalBatch | None, sums: NoisySums) -> Clipped | None:
        """Add the clipped gradients of a batch to the sums."""
        closes_unit, fillers = (None, 0) if batch is None else (batch.closes_unit, batch.fillers)
        clipped = self._engine.add_clipped(
            self._without(losses, fillers),
            into=sums,
            scale=1 / self.plan.divisor,
            closes_unit=closes_unit,
        )
        if clipped is None or self.plan.clipping_unit != "example":
            return clipped
        return clipped.first(len(losses) - fillers)

    def _without(self, losses: Tensor, fillers: int) -> Tensor:
        """The losses without the last ones, or with constants, whose gradients are zero, in their
        place."""
        if not fillers:
            return losses
        kept = len(losses) - fillers
        if not self._engine.takes_whole_batches:
            return losses[:kept]
        return torch.where(torch.arange(len(losses), device=losses.device) < kept, losses, 0.0)

    def _release(self, sums: NoisySums, *, sampled: bool) -> None:
        """Record the release, then let the optimizer act on it."""
        self._sums = None  # whatever happens now, they are not added to again
        self.non_finite_units += self._non_finite
        if self._units > 1 and self._non_finite == self._units:
            raise NonFiniteBatchError(
                f"None of the {self._units} gradients of a logical batch is finite: training has "
                "diverged, or the loss overflows. Lower the learning rate, or compute in float32."
            )
        self._check_no_gradients()
        self.ledger.append(self.plan.event_at(len(self.ledger), sampled=sampled))
        self._released = sums
        for parameter, total in sums.items():
            parameter.grad = total.to(parameter.dtype)
        try:
            self._optimizer.step()
        finally:
            for parameter in self._parameters:
                parameter.grad = None
            self.weights_changed()
        self.steps_taken += 1

    def _check_no_gradients(self) -> None:
        """The optimizer must meet no gradient but what is released: it would act on it too."""
        groups = self._optimizer.param_groups
        if any(parameter.grad is not None for group in groups for parameter in group["params"]):
            raise RuntimeError(
                "Found gradients that the engine did not make: call neither backward() nor a "
                "scaler on the losses, and optimizer.zero_grad() if they are old."
            )

    def _check_unsampled(self) -> None:
        if self._loop is not None:
            raise RuntimeError(
                "Expected one private.step(losses) for each batch of the loader, got a second: its "
                "examples would count twice. Sum up an example's losses, or leave the loop first."
            )
        if not self._warned:
            warnings.warn(
                "private.step was called outside private.loader: no sampling took place, so these "
                "releases are accounted without amplification by sampling.",
                stacklevel=3,
            )
            self._warned = True


def _generators(
    noise: torch.Generator | Literal["system"] | None, device: torch.device
) -> Sequence[torch.Generator]:
    """What `privatize` was told of noise; none at all stands for the operating system."""
    if isinstance(noise, torch.Generator):
        return [noise]
    return [] if noise == "system" else entropy_generators(device)


def _check_engine(name: str, plan: PrivacyPlan) -> None:
    if name not in ENGINES:
        raise ValueError(f"Expected `engine` to be one of {', '.join(ENGINES)}, got {name!r}.")
    if (name == "microbatch") != (plan.clipping_unit == "microbatch"):
        raise ValueError(
            f"Expected an engine for the plan's clipping unit, {plan.clipping_unit!r}, got "
            f"{name!r}: what is clipped is the plan's business. Micro-batches are planned by "
            "PrivacyPlan(clipping_unit='microbatch', microbatches=K)."
        )


def _check_ledger(ledger: Ledger, plan: PrivacyPlan) -> None:
    """The steps alone may differ, so that training can go on; the ledger tells what was spent."""
    begun, planned = ledger.plan.to_dict(), plan.to_dict()
    if other := [name for name in planned if name != "steps" and begun[name] != planned[name]]:
        raise ValueError(
            f"Expected a ledger of this plan, got one of a plan with other {', '.join(other)}: go "
            "on with the plan that it names, ledger.plan."
        )
