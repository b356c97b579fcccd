"""Runs a training many times, each with a fault at another of its writes, and resumes it.

Not a test, but what tests start: `python faults.py`, with a request in JSON on standard input. Each
training is a fork of this process, so that nothing has to be imported again.

    arguments   of `dpnlu train`, but for --out
    folder      an empty one, to work in
    faults      pairs of a key of FAULTS and the names of the operations at which it happens, such
                as "write ledger.jsonl"; "write" for all writes, "" for all operations; with a
                number behind a colon the one with that number among them, counted from 0
    moments     or: seconds from the beginning after which the process is killed
    shares      or: the same, as shares of the time that a whole training takes
    heirs       how many resume it, at once

The answer, on standard output, is a JSON list: for each fault where it was, what the training
said, what was left, what the heirs said, and what was there in the end.
"""

import errno
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dpnlu.runs.model_directory
import dpnlu.training.checkpoint
from dpnlu.cli.main import main
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs.model_directory import load

# Whatever changes a file or a directory goes through one of these.
OPERATIONS = ("write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate")
OPERATIONS += ("open",)
TAKES_ROOM = ("write", "mkdir", "open", "save_file")


def _killed(name: str, run: Callable[..., Any], *given: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_halfway(name: str, run: Callable[..., Any], *given: Any) -> None:
    _half(name, run, *given)
    os.kill(os.getpid(), signal.SIGKILL)


def _full(name: str, run: Callable[..., Any], *given: Any) -> Any:
    """This operation and all later ones find no room."""
    if name not in TAKES_ROOM:
        return run(*given)
    _half(name, run, *given)
    if name == "save_file":
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _broken(name: str, run: Callable[..., Any], *given: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _terminated(name: str, run: Callable[..., Any], *given: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return run(*given)


def _half(name: str, run: Callable[..., Any], *given: Any) -> None:
    if name == "write":
        run(given[0], given[1][: len(given[1]) // 2])
    elif name == "save_file":  # writes to a temporary file beside the one that is asked for
        Path(given[1]).with_name(".tmpHalf").write_bytes(b"half")


# What happens instead of the operation; and whether to all later ones as well.
FAULTS = {
    "kill": (_killed, False),
    "kill halfway": (_killed_halfway, False),
    "full disk": (_full, True),
    "input/output error": (_broken, False),
    "terminate": (_terminated, False),
}


class Operations:
    """Counts the operations of this process, and lets a fault happen at one of them."""

    def __init__(self, fault: str | None = None, point: int = -1) -> None:
        self.names: list[str] = []
        self._fault, self._goes_on = FAULTS[fault] if fault else (None, False)
        self._point = point
        self._files: dict[int, str] = {}
        for name in OPERATIONS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        for module in (dpnlu.training.checkpoint, dpnlu.runs.model_directory):
            module.save_file = self._counted("save_file", module.save_file)

    def _counted(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            file = next(place for place in given if isinstance(place, int | str | Path))
            file = self._files.get(file, "") if isinstance(file, int) else Path(file).name
            if name == "open" and not given[1] & os.O_CREAT:
                done = run(*given, **named)
            else:
                done = self._done(f"{name} {file}", lambda *given: run(*given, **named), *given)
            if name == "open":
                self._files[done] = file
            return done

        return counted

    def _done(self, operation: str, run: Callable[..., Any], *given: Any) -> Any:
        number = len(self.names)
        self.names.append(operation)
        happens = number >= self._point if self._goes_on else number == self._point
        if self._fault is not None and happens:
            return self._fault(operation.split()[0], run, *given)
        return run(*given)


class Training:
    """A fork of this process that trains; what it says and does is kept."""

    def __init__(self, arguments: list[str], *, fault: str | None = None, point: int = -1) -> None:
        self._said, saying = os.pipe()
        self._applied = mmap.mmap(-1, 8)  # shared: updates that began to be applied
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.dup2(saying, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                self._run(arguments, fault, point)
            finally:
                os._exit(70)
        os.close(saying)

    def _run(self, arguments: list[str], fault: str | None, point: int) -> None:
        register_optimizer_step_pre_hook(self._apply)
        operations = Operations(fault, point)
        status = main(arguments)
        print(json.dumps({"operations": operations.names}), file=sys.stderr, flush=True)
        os._exit(status)

    def _apply(self, *_: object) -> None:
        self._applied[0:8] = (self.applied + 1).to_bytes(8, "little")

    @property
    def applied(self) -> int:
        return int.from_bytes(self._applied[0:8], "little")

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        os.kill(self._pid, signal.SIGKILL)

    def ended(self) -> dict[str, Any]:
        with os.fdopen(self._said, encoding="utf-8") as said:
            lines = said.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        names = []
        if lines and lines[-1].startswith('{"operations"'):
            names = json.loads(lines.pop())["operations"]
        return {"status": status, "said": lines, "applied": self.applied, "operations": names}


def _state(out: Path) -> dict[str, Any]:
    """What is there."""
    found: dict[str, Any] = {"files": sorted(str(path.relative_to(out)) for path in out.rglob("*"))}
    found["trials"] = {
        path.parent.name: {"releases": len(ledger), "epsilon": ledger.epsilon()}
        for path in out.glob("trials/*/ledger.jsonl")
        if (ledger := _ledger_at(path)) is not None
    }
    for name in ("trials.json", "selection.json", "metrics.json"):
        with suppress(OSError, ValueError):
            found[name] = json.loads((out / name).read_text(encoding="utf-8"))
    for name, look in (("model", load), ("ledger", lambda out: Ledger.read(out / "ledger.jsonl"))):
        try:
            seen = look(out)
        except ValueError as error:
            found[name] = str(error)
            continue
        found[name] = "loads"
        if isinstance(seen, Ledger):
            found |= {"releases": len(seen), "epsilon": seen.epsilon()}
    return found


def _ledger_at(path: Path) -> Ledger | None:
    """None: its first line was not written yet, so that nothing was released."""
    try:
        return Ledger.read(path)
    except ValueError:
        return None


def _anew(request: dict[str, Any]) -> tuple[Path, list[str]]:
    out = Path(request["folder"]) / "model"
    shutil.rmtree(out, ignore_errors=True)
    return out, [*request["arguments"], "--out", str(out)]


def _tried(request: dict[str, Any], **fault: Any) -> dict[str, Any]:
    """One training with a fault, and one that resumes it."""
    out, arguments = _anew(request)
    moment = fault.pop("moment", None)
    first = Training(arguments, **fault)
    if moment is not None:
        first.kill_after(moment)
    found = {"first": first.ended(), "left": _state(out)}
    heirs = [Training([*arguments, "--resume"]) for _ in range(request.get("heirs", 1))]
    found["heirs"] = [heir.ended() for heir in heirs]
    return found | {"end": _state(out)}


def _points(operations: list[str], at: str) -> list[int]:
    name, _, number = at.partition(":")
    points = [n for n, operation in enumerate(operations) if operation.startswith(name)]
    return [points[int(number)]] if number else points


def _answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    if "shares" in request:
        begun = time.monotonic()
        Training(_anew(request)[1]).ended()
        whole = time.monotonic() - begun
        request["moments"] = [share * whole for share in request["shares"]]
    if "moments" in request:
        return [_tried(request, moment=moment) | {"at": moment} for moment in request["moments"]]
    operations = Training(_anew(request)[1]).ended()["operations"]
    return [
        _tried(request, fault=fault, point=point) | {"at": f"{fault} {point}: {operations[point]}"}
        for fault, at in request["faults"]
        for point in _points(operations, at)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # loads half of torch, once for all forks
    print(json.dumps(_answer(json.load(sys.stdin))))
