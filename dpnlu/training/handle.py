"""Private training: `privatize`, and the handle that a loop of your own uses.

private = privatize(model, optimizer, plan)
step = private.stepper(per_example_loss)         # batch -> (B,) losses
for batch in private.loader(dataset, collate_fn=collate, physical_batch_size=64):
    step(batch)
print(private.epsilon())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from dpnlu.engines.book_keeping import BookKeeping
from dpnlu.engines.independence import Independence
from dpnlu.engines.refusals import check_trainable
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.noise import entropy_generators
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.agreement import check_engine, check_ledger, check_processes, check_public
from dpnlu.training.cutting import WhoseExamples
from dpnlu.training.handover import Handover
from dpnlu.training.loader import PrivateLoader
from dpnlu.training.logical_batch import Mechanism
from dpnlu.training.logical_batch import NonFiniteBatchError as NonFiniteBatchError
from dpnlu.training.logical_loader import LogicalLoader
from dpnlu.training.processes import OneProcess, Processes
from dpnlu.training.public import PublicExamples, PublicGradients
from dpnlu.training.stepping import Stepping
from dpnlu.training.steps import Steps


def privatize(
    model: nn.Module,
    optimizer: Optimizer | Handover,
    plan: PrivacyPlan,
    *,
    engine: str | None = None,
    ledger: Ledger | Path | None = None,
    noise: torch.Generator | Literal["system"] | None = None,
    sampling_rng: np.random.Generator | None = None,
    verify: bool = True,
    processes: Processes | None = None,
    public: PublicExamples | None = None,
) -> PrivateTraining:
    """Make the training of `model` by `optimizer` follow `plan`.

    The model and the optimizer stay as they are: nothing is wrapped, replaced or patched, and
    `close()` leaves no trace.

    Args:
        model: its trainable parameters (`requires_grad`) are trained privately.
        optimizer: any `torch.optim` optimizer over exactly these parameters; or what stands for one
            that somebody else steps.
        plan: the mechanism.
        engine: "book_keeping", "per_example", "microbatch" or "opacus"; None: what suits the plan's
            clipping unit. All per-example engines give the same result.
        ledger: where releases are recorded; a path starts a new file. None: in memory only. One
            that holds releases is continued; its plan must be `plan`, but for the steps. It knows
            of this training alone: a model trained before has spent what that one's ledger says.
        noise: where the noise comes from. None: a generator whose whole state is fresh entropy;
            "system": the operating system's entropy for every draw, added so that floating-point
            numbers give nothing away (`dpnlu.mechanism.noise.add_system_gaussian`), and slow; a
            generator of your own, to repeat an experiment: never for a model that is
            released.
        sampling_rng: the random numbers of Poisson sampling; None: fresh entropy.
        verify: check before anything is released that every use of a parameter was recorded, that
            no example changes another's gradient, loss or norm, and that gradients are those
            of plain automatic differentiation: the first of every batch, the others as often as
            `dpnlu.engines.checks` says.
        processes: what `dpnlu.integrations.distributed` hands over; None: this one trains alone.
        public: examples whose mean gradient the optimizer gets beside the released one, unclipped
            and without noise, and which tell the bound where the plan says clipping="public:Q".

    Raises:
        UnsupportedLayerError: the model has a layer that mixes examples or modifies weights by
            itself; the message names it.
        ValueError: the optimizer's parameters are not the model's, the engine or the ledger does
            not fit the plan, or there is no such noise.
        LedgerError: there is a file at the ledger's path.
    """
    processes = processes or OneProcess()
    check_processes(processes.count, plan)
    name = engine or ("microbatch" if plan.clipping_unit == "microbatch" else "book_keeping")
    check_engine(name, plan)
    check_public(public, plan, engine=name, processes=processes.count)
    if isinstance(ledger, Ledger):
        check_ledger(ledger, plan)
    parameters = check_trainable(model, optimizer)
    generators = _generators(noise, parameters[0].device)
    options = {"verify": verify} if name == "book_keeping" else {}
    with ExitStack() as stack:
        made = stack.enter_context(ENGINES[name](model, plan, **options))
        # Last: a file that holds nothing would still have to be resumed.
        ledger = ledger if isinstance(ledger, Ledger) else Ledger(plan, path=ledger)
        stack.callback(ledger.close)
        mechanism = Mechanism(
            plan=plan,
            ledger=ledger,
            model=model,
            parameters=parameters,
            optimizer=optimizer,
            generators=generators,
            processes=processes,
            clipper=made.clipper,
            public=PublicGradients.of(public, engine=made, parameters=parameters),
        )
        if ledger.bound is not None:
            made.clipper.bound = ledger.bound
        return PrivateTraining(
            mechanism,
            engine=made,
            attached=stack.pop_all(),
            sampling_rng=sampling_rng or np.random.default_rng(),
            verify=verify,
        )


class PrivateTraining:
    """The state of one private training; made by `privatize`.

    Guarantee: the model's parameters change only by the optimizer acting on released sums: the
    clipped gradients of one logical batch plus noise as planned, recorded in the ledger before the
    optimizer sees them, divided by a public number; plus gradients of public examples, if there are
    any, which were computed at released weights.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        *,
        engine: Engine,
        attached: ExitStack,
        sampling_rng: np.random.Generator,
        verify: bool,
    ) -> None:
        self.plan, self.ledger = mechanism.plan, mechanism.ledger
        self._engine, self._attached = engine, attached
        self._sampling_rng, self._processes = sampling_rng, mechanism.processes
        # A micro-batch is clipped as a whole: what its members do to each other does not matter.
        checks = verify and self.plan.clipping_unit != "microbatch"
        independence = Independence(mechanism.model) if checks else None
        recorder = engine if isinstance(engine, BookKeeping) else None
        holders = (recorder, independence, mechanism.public)
        derived = [one for one in holders if one is not None]
        self.steps = Steps(mechanism, recorder=recorder, derived=derived)
        self._stepping = Stepping(engine, self.steps, independence=independence)

    @property
    def steps_taken(self) -> int:
        """Releases that this training has made; those of the ledger may be more."""
        return self.steps.taken

    @property
    def non_finite_units(self) -> int:
        """Clipping units that this process has left out so far because their gradient was not
        finite. Private."""
        return self.steps.non_finite_units

    @property
    def remaining_steps(self) -> int:
        """Releases that a loop over the loader may still make.

        Guarantee: with them ε does not pass the plan's; see `Ledger.remaining_steps`. Steps outside
        the loader cost more than planned, and leave fewer.
        """
        return self.steps.remaining

    @property
    def max_grad_norm(self) -> float:
        """The clipping bound of the logical batch that is open, or comes next: the plan's, unless
        it adapts; then it was computed from what was released, and the ledger holds it. Where
        public examples tell it, the last one, until they have told the next."""
        return self.steps.mechanism.bound

    def epsilon(self, *, accountant: str = "pld") -> float:
        """ε spent so far, at the plan's δ, from the ledger."""
        return self.ledger.epsilon(accountant=accountant)

    @property
    def gradients(self) -> Mapping[nn.Parameter, Tensor]:
        """Parameter -> the released sum of the last logical batch: clipped, noised, not divided;
        without what public examples add.

        Empty from the moment the next one begins.

        Guarantee: nothing is here that the ledger does not hold.
        """
        return {p: total * self.plan.divisor for p, total in self.steps.released.items()}

    def loader(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        users: WhoseExamples | None = None,
        physical_batch_size: int | None = None,
        fixed_size: bool = False,
        num_workers: int = 0,
    ) -> PrivateLoader:
        """Physical batches of Poisson-sampled logical batches, for all remaining steps.

        Each batch must be answered by one `step(losses)`. Logical batches that happen to be empty
        are released, as noise alone, without being seen here.

        Args:
            dataset: indexed from 0 to `plan.num_examples` - 1, or with examples of so many users.
            collate_fn: a list of examples -> a batch, as in torch's `DataLoader`.
            users: with a plan of unit="user", whose the examples are: the name of a column, a
                function of an example, or the ids of all of them in order. An id is a string, an
                integer or a tuple of such. All examples are looked at once, here.
            physical_batch_size: how many examples to compute at once; None: a whole logical batch.
            fixed_size: have exactly that many in every batch, for kernels that are made anew for
                each shape. What is missing is filled up with further copies of the batch's own
                examples, of which `step` leaves no trace.
            num_workers: processes that load and collate, as in torch's `DataLoader`.

        Raises:
            ValueError: the data set has another size than the plan says, a fixed size is wanted
                and not given, or it is not known of every example whose it is.
        """
        return PrivateLoader(
            self.steps,
            dataset,
            rng=self._sampling_rng,
            collate_fn=collate_fn,
            users=users,
            physical_batch_size=physical_batch_size,
            fixed_size=fixed_size,
            num_workers=num_workers,
        )

    def logical_loader(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        users: WhoseExamples | None = None,
        physical_batch_size: int,
        num_workers: int = 0,
    ) -> LogicalLoader:
        """The same for a trainer that counts steps: one item for each logical batch, empty ones
        included, in passes of `plan.steps_per_epoch`. An item hands out its physical batches.

        Raises:
            ValueError: see `loader`; where the size of the data set changes, on a later pass.
        """
        return LogicalLoader(
            self.steps,
            dataset,
            rng=self._sampling_rng,
            collate_fn=collate_fn,
            users=users,
            physical_batch_size=physical_batch_size,
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

        def step(batch: Any) -> bool:
            with self._processes.reporting():
                return self._stepping.by_function(losses_of, batch)

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
        with self._processes.reporting():
            return self._stepping.by_losses(losses)

    def compile(
        self, losses_of: Callable[[Any], Tensor], *, backend: str = "inductor"
    ) -> Callable[[Any], bool]:
        """Compile steps, from the batch to the norms of its gradients.

        step = private.compile(per_example_loss)
        for batch in private.loader(dataset, physical_batch_size=64, fixed_size=True):
            step(batch)

        Forward pass, backward pass and norms become one program for each shape of the batch, so
        that few shapes should occur. `torch.compile` compiles it, or a GPU replays it, and another
        for the sums, as CUDA graphs that hold memory. The model itself must not be compiled.

        Args:
            losses_of: batch -> (B,), the loss of each example. The batch holds tensors, numbers and
                strings in dictionaries, lists and tuples, and is read through this argument alone.
                Which operations are done must not depend on values. Other numbers that the function
                uses stay what they were when a shape first came.
            backend: of `torch.compile`; "inductor" needs a C++ compiler. Or "cudagraphs", for a
                model on a GPU.

        Returns:
            What is called with each batch of the loader in place of `step(losses)`, and answers
            alike.

        Raises:
            ValueError: another engine than book_keeping, a plan that clips users, or CUDA graphs
                for a model that is not on a GPU.
            UnsupportedLayerError: a recurrent layer, unless CUDA graphs replay it; or, from the
                step, a forward pass that cannot be traced.
        """
        if not isinstance(self._engine, BookKeeping):
            raise ValueError("Expected engine='book_keeping', the one whose steps can be compiled.")
        if self.plan.unit == "user":
            raise ValueError(
                "Expected a plan that clips examples for compiled steps, got one that clips users, "
                "who have unlike numbers of them: use private.stepper."
            )
        from dpnlu.engines.compiled import CompiledClipping  # loads torch's compiler

        clipping = CompiledClipping(self._engine, losses_of, backend=backend)

        def step(batch: Any) -> bool:
            with self._processes.reporting():
                return self._stepping.by_program(clipping, batch)

        return step

    def weights_changed(self) -> None:
        """Somebody else than the optimizer has changed weights: what was all zero may not be."""
        self.steps.weights_changed()

    def close(self) -> None:
        """Detach from the model and close the ledger; `epsilon()` keeps answering."""
        self.steps.close()
        self._attached.close()
        self._processes.close()

    def __enter__(self) -> PrivateTraining:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _generators(
    noise: torch.Generator | Literal["system"] | None, device: torch.device
) -> Sequence[torch.Generator]:
    """What `privatize` was told of noise; none at all stands for the operating system."""
    if isinstance(noise, torch.Generator):
        return [noise]
    if noise not in (None, "system"):
        raise ValueError(
            f"Expected `noise` to be None, 'system' or a torch.Generator, got {noise!r}: leave it "
            "out for fresh entropy."
        )
    return entropy_generators(device) if noise is None else []
