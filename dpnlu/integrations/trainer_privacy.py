"""What a private trainer has spent, and how it goes on after an interruption.

Beside the checkpoints of a trainer there is a folder of ours, whose name begins with "_", so that
`push_to_hub` leaves it out:

_private/ledger.jsonl    what was released so far; never rewound
_private/run.json        the keyed fingerprint of the data; to be kept as secret as they are
_private/staging/        a checkpoint that is being written
checkpoint-*/privacy.json    the plan, the ledger that it belongs to, and how far that was
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dpnlu.integrations.records import ResumeError, check_record, record_of
from dpnlu.integrations.spending import EngineSettings, Spending
from dpnlu.integrations.trainer_data import fingerprint, is_same
from dpnlu.mechanism.durable import remove, write_json
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.runs.directory import claimed, new_ledger, resumed_ledger
from dpnlu.training.cutting import WhoseExamples

FOLDER, LEDGER, RUN, RECORD = "_private", "ledger.jsonl", "run.json", "privacy.json"


@dataclass(frozen=True, kw_only=True)
class Settings(EngineSettings):
    """What `privatize_trainer` was told besides the plan; see there."""

    physical_batch_size: int
    users: WhoseExamples | None = None
    max_epsilon: float | None = None
    log_private: bool = False


class TrainerPrivacy(Spending):
    """The privacy of one trainer: its plan, and what `train` has spent of it.

    Attributes:
        plan: the mechanism.
        settings: the rest of what was asked for.
        last_step: after how many releases to stop.
        not_covered: what was chosen by scores on data, in sentences.
        is_terminated: whether the process was told to end during `train`.
    """

    def __init__(
        self, plan: PrivacyPlan, settings: Settings, *, not_covered: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.plan, self.settings = plan, settings
        self.last_step = last_step(plan, settings.max_epsilon)
        self.not_covered = list(not_covered)
        self.is_terminated = False

    @property
    def remaining_steps(self) -> int:
        """Releases that are planned and not made."""
        return self.plan.steps if self.ledger is None else self.ledger.remaining_steps(self.plan)

    # ---- for the trainer ---------------------------------------------------------------------

    @contextmanager
    def opened(
        self, folder: Path, dataset: Any, *, resumes: bool, checkpoint: Path | None
    ) -> Iterator[None]:
        """In here steps may be taken, and nobody else takes any in this folder.

        Guarantee: a ledger is continued or begun, never rewound or replaced.

        Args:
            folder: the trainer's, with its checkpoints.
            dataset: that is trained on.
            resumes: whether a training continues; if not, none may have begun here.
            checkpoint: whose weights it goes on from; None: the initial ones.

        Raises:
            ResumeError: these do not belong together.
            ValueError: another training is going on here.
            LedgerError: see `Ledger.resume`.
        """
        place = folder / FOLDER
        with ExitStack() as stack:
            stack.enter_context(claimed(place))
            self.ledger, self._last = _ledger(place, self.plan, dataset, resumes=resumes), None
            stack.callback(self.ledger.close)
            self.plan = self.ledger.plan  # as it was calibrated when training began
            if checkpoint is not None:
                check_record(read_record(checkpoint), self.ledger, place=str(checkpoint))
            elif len(self.ledger):
                _check_not_lost(self.ledger, place)
            self.last_step = last_step(self.plan, self.settings.max_epsilon)
            stack.callback(self._detach)
            yield

    def begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach to the model; the trainer steps the optimizer."""
        self._attach(model, optimizer, self.plan, self.settings)


def last_step(plan: PrivacyPlan, max_epsilon: float | None) -> int:
    """After how many releases the next one would take ε above what it may be at most.

    Raises:
        ValueError: the first one would.
    """
    if max_epsilon is None or plan.epsilon() <= max_epsilon:
        return plan.steps
    steps = range(1, plan.steps + 1)
    found = bisect_right(steps, max_epsilon, key=lambda count: plan.epsilon(steps=count))
    if not found:
        raise ValueError(
            f"Expected `max_epsilon` to leave room for a step, whose ε is {plan.epsilon(steps=1):g}"
            f", got {max_epsilon:g}: raise it, or plan more noise."
        )
    return found


def read_record(checkpoint: Path) -> Any:
    """What is said in a checkpoint of the ledger that it belongs to; None if nothing is."""
    try:
        return json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_record(checkpoint: Path, ledger: Ledger) -> None:
    """Put into a checkpoint what it must never be resumed without."""
    write_json(checkpoint / RECORD, record_of(ledger))


def has_begun(folder: Path) -> bool:
    """Whether the trainer's folder has a ledger with releases."""
    path = folder / FOLDER / LEDGER
    return path.is_file() and bool(path.read_bytes().partition(b"\n")[2])


def _ledger(place: Path, plan: PrivacyPlan, dataset: Any, *, resumes: bool) -> Ledger:
    """The ledger of a training that begins, or goes on."""
    if has_begun(place.parent):
        if not resumes:
            raise ResumeError(
                f"Expected no training in {place.parent}, found one that has begun: go on with it "
                "by train(resume_from_checkpoint=True), or choose another output_dir."
            )
        _check_data(place, dataset)
        return resumed_ledger(place, plan)
    remove(place / LEDGER)  # one that was begun and records nothing
    write_json(place / RUN, fingerprint(dataset))
    return new_ledger(place, plan)


def _check_not_lost(ledger: Ledger, place: Path) -> None:
    """Without a checkpoint only what is left can be done, from the initial weights."""
    if not ledger.remaining_steps(ledger.plan):
        raise ResumeError(
            f"Expected a checkpoint in {place.parent}, found none: no release is left after the "
            f"{len(ledger)} of the ledger, and what was learnt from them is lost; train anew in "
            "another folder."
        )


def _check_data(place: Path, dataset: Any) -> None:
    try:
        known = json.loads((place / RUN).read_text(encoding="utf-8"))
        same = is_same(dataset, known)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ResumeError(
            f"Expected the data with which the training in {place} was begun, got others, or in "
            "another order: restore them, or train anew in another folder."
        )
