"""The command line.

    dpnlu compare     train at several budgets, attack every model, report
    dpnlu train       train one model
    dpnlu attack      attack a trained model
    dpnlu predict     intents and slots of texts, by a trained model
    dpnlu recipe      what `dpnlu train` would do with a corpus
    dpnlu diagnose    where the accuracy of a private training is lost
    dpnlu budget      which ε a mechanism has, or which noise an ε needs
    dpnlu benchmark   what private training costs on this machine

Exit status: 0; 1 when a run failed or was interrupted; 2 for bad input, with one line that says
what to do; 141 when the reader of a pipe had seen enough.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from dpnlu.cli import attack, benchmark, budget, compare, diagnose, predict, recipe, train
from dpnlu.cli.examples import add_examples

# Set it to see the traceback behind an error.
_TRACEBACK = "DPNLU_TRACEBACK"

# What a terminal or a scheduler sends to have a command end.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    status = 0
    try:
        try:
            status = _answer(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            print(end="", flush=True)  # now, when a failure can still be answered
    except OSError as error:
        # When Python ends, it tries once more to write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return status or _failed(_one_line(error), status=1)
    return status


def _answer(arguments: list[str]) -> int:
    if broken := [text for text in arguments if text.encode(errors="replace").decode() != text]:
        return _failed(
            f"Expected arguments in UTF-8, which reports are written in, got {broken[0]!a}: rename "
            "the file.",
            status=2,
        )
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["dpnlu", *arguments])
    try:
        with warnings.catch_warnings(), _interruptible():
            warnings.showwarning = _show_warning
            options.run(options)
    except KeyboardInterrupt:
        again = "to go on, run the same command again"
        hints = {"train": f"{again} --resume", "benchmark": "--out has what was measured"}
        return _failed(f"interrupted; {hints.get(options.command, again)}", status=1)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _failed(_one_line(error), status=2)
    except Exception as error:
        return _failed(f"{type(error).__name__}: {_one_line(error)}", status=1)
    return 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at every signal to end, once: tidying up is not interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not this thread's business
        return
    # One that is ignored, as under nohup, stays ignored.
    before = {s: h for s in _INTERRUPTS if (h := signal.getsignal(s)) not in (signal.SIG_IGN, None)}

    def interrupt(*_: object) -> NoReturn:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dpnlu",
        description="Train intent and slot classifiers with differential privacy, and measure what "
        "they leak.",
        epilog="dpnlu COMMAND --help shows the options of a command, with defaults and examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (compare, train, attack, predict, recipe, diagnose, budget, benchmark):
        command.add_parser(commands)
    add_examples(commands.choices)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors on one line; help that every terminal can show."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        raise SystemExit(_failed(f"{line} (see {self.prog} --help)", status=2))

    def _print_message(self, message: str, file: Any = None) -> None:
        encoding = getattr(file, "encoding", None) or "utf-8"
        # An ASCII terminal has no ε; a question mark is better than no help.
        super()._print_message(message.encode(encoding, "replace").decode(encoding), file)


def _failed(message: str, *, status: int) -> int:
    if os.environ.get(_TRACEBACK) and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    print(f"dpnlu: error: {message}", file=sys.stderr)
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"dpnlu: warning: {' '.join(str(message).split())}", file=sys.stderr)
