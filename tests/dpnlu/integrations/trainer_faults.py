"""Trains by a private Trainer, many times, and kills it each time at another moment.

Not a test, but what tests start: `python -m tests.dpnlu.integrations.trainer_faults`, with a
request in JSON on standard input. Each training is a fork of this process, so that nothing has to
be imported again.

    folder      an empty one, to work in
    moments     at which the process is killed, as shares of the time of a whole training; or
    faults      pairs of a key of OPERATIONS and which of them, counted from 0, ends the process
    steps       of the training

The answer, on standard output, is a JSON list: for each fault what was there after the process that
was killed, and after the one that resumed.
"""

import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertForSequenceClassification

from dpnlu.mechanism.ledger import Ledger
from tests.dpnlu.integrations import subjects

OPERATIONS: dict[str, tuple[Any, str]] = {
    "write": (os, "write"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "torch.save": (torch, "save"),
    "save_pretrained": (BertForSequenceClassification, "save_pretrained"),
}


def _train(folder: Path, steps: int, *, resumes: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    plan = subjects.plan(noise_multiplier=1.0, steps=steps)
    ordinary = subjects.trainer(folder, max_steps=steps, **saving)
    made = subjects.private(ordinary, plan=plan, sampling_rng=None)
    made.train(resume_from_checkpoint=resumes or None)


class Training:
    """A fork of this process that trains; how many updates it began to apply is kept."""

    def __init__(
        self, folder: Path, steps: int, *, resumes: bool, fault: tuple[str, int] | None = None
    ) -> None:
        self._applied = mmap.mmap(-1, 8)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                register_optimizer_step_pre_hook(self._apply)
                if fault is not None:
                    _arm(*fault)
                _train(folder, steps, resumes=resumes)
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(70)

    def _apply(self, *_: object) -> None:
        self._applied[0:8] = (self.applied + 1).to_bytes(8, "little")

    @property
    def applied(self) -> int:
        return int.from_bytes(self._applied[0:8], "little")

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        os.kill(self._pid, signal.SIGKILL)

    def ended(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _arm(name: str, number: int) -> None:
    """Have the process killed at this operation: halfway, if it writes."""
    place, attribute = OPERATIONS[name]
    run: Callable[..., Any] = getattr(place, attribute)
    count = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count - 1 == number:
            if name == "write":
                run(given[0], given[1][: len(given[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*given, **named)

    setattr(place, attribute, counted)


def _state(folder: Path) -> dict[str, Any]:
    """What is there: releases, ε, and whether every checkpoint can be read."""
    path = folder / "_private" / "ledger.jsonl"
    found: dict[str, Any] = {"releases": 0, "epsilon": 0.0, "checkpoints": [], "unreadable": []}
    if path.exists() and b"\n" in path.read_bytes():
        ledger = Ledger.read(path)
        found |= {"releases": len(ledger), "epsilon": ledger.epsilon()}
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        try:
            BertForSequenceClassification.from_pretrained(checkpoint)
            torch.load(checkpoint / "optimizer.pt", weights_only=True)
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            record = json.loads((checkpoint / "privacy.json").read_text())
            found["checkpoints"].append([state["global_step"], record["releases"]])
        except Exception as error:
            found["unreadable"].append(f"{checkpoint.name}: {error!r}")
    return found


def _tried(request: dict[str, Any], moment: float | None, fault: tuple[str, int] | None) -> Any:
    """A training that is killed, and those that resume it until one ends by itself."""
    folder, steps = Path(request["folder"]) / "trained", request["steps"]
    shutil.rmtree(folder, ignore_errors=True)
    first = Training(folder, steps, resumes=False, fault=fault)
    if moment is not None:
        first.kill_after(moment)
    status = first.ended()
    found = [{"status": status, "applied": first.applied, **_state(folder)}]
    if status:
        begun = found[0]["releases"] > 0
        heir = Training(folder, steps, resumes=begun)
        found.append({"status": heir.ended(), "applied": heir.applied, **_state(folder)})
    return found


def _seconds(request: dict[str, Any]) -> float:
    """How long a training takes that nobody kills."""
    folder = Path(request["folder"]) / "timed"
    started = time.monotonic()
    assert Training(folder, request["steps"], resumes=False).ended() == 0
    return time.monotonic() - started


def main() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # trainers print their logs
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warmed = Path(request["folder"]) / "warm"
    _train(warmed, request["steps"], resumes=False)  # imports all, once for all forks
    whole = _seconds(request)
    moments = [(share * whole, None) for share in request.get("moments", [])]
    faults = [(None, (name, number)) for name, number in request.get("faults", [])]
    found = [_tried(request, *one) for one in (*moments, *faults)]
    with os.fdopen(answer, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
