"""The command line.

    dpnlu compare     train at several budgets, attack every model, report
    dpnlu train       train one model for release
    dpnlu attack      attack a trained model
    dpnlu predict     intents and slots of texts, by a trained model
    dpnlu budget      which ε a mechanism has, or which noise an ε needs
    dpnlu benchmark   what private training costs on this machine

Exit status: 0; 1 when a run failed or was interrupted; 2 for bad input, with one line that says
what to do; 141 when the reader of a pipe had seen enough.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dpnlu.cli import benchmark, budget, predict

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
        hint = " --resume" if options.command == "train" else ""
        return _failed(f"interrupted; to go on, run the same command again{hint}", status=1)
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


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console

    from attacks.report import terminal_table
    from dpnlu.compare import Settings, compare, prepare
    from dpnlu.runs.progress import bars

    settings = Settings(
        data=options.data,
        model=options.model,
        epsilons=tuple(options.epsilons),
        delta=options.delta,
        epochs=options.epochs,
        batch_size=options.batch_size,
        dropout=options.dropout,
        max_grad_norm=options.max_grad_norm,
        attacks=_chosen_attacks(options),
        canaries=tuple(options.canaries),
        references=options.references,
        audit_examples=options.audit_examples,
        confidence=options.confidence,
        physical_batch_size=options.physical_batch_size,
        device=options.device,
        seed=options.seed,
    )
    with bars(quiet=options.quiet) as told:
        prepared = prepare(settings)
        report = compare(prepared, options.out, command=options.command_line, told=told)
    Console().print(terminal_table(report))
    print(options.out / "report.html")


def _train(options: argparse.Namespace) -> None:
    from dpnlu.runs.progress import bars
    from dpnlu.runs.resumable import ReleaseSettings, release

    settings = ReleaseSettings(
        data=options.data,
        model=options.model,
        epsilon=options.epsilon,
        delta=options.delta,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        dropout=options.dropout,
        max_grad_norm=options.max_grad_norm,
        vocabulary=options.vocabulary,
        labels=options.labels,
        engine=options.engine,
        physical_batch_size=options.physical_batch_size,
        device=options.device,
        seed=options.seed,
    )
    with bars(quiet=options.quiet) as told:
        metrics = release(settings, options.out, resume=options.resume, told=told)
    _print_numbers(metrics)
    print(options.out)


def _chosen_attacks(options: argparse.Namespace) -> tuple[str, ...]:
    from dpnlu.compare.attacking import default_attacks

    return tuple(options.attacks or default_attacks(options.references))


def _attack(options: argparse.Namespace) -> None:
    from rich.console import Console

    from attacks.report import terminal_table
    from dpnlu.compare.model import attack_model
    from dpnlu.runs.progress import bars

    with bars(quiet=options.quiet) as told:
        report = attack_model(
            options.model_directory,
            options.out,
            data=options.data,
            attacks=_chosen_attacks(options),
            references=options.references,
            audit_examples=options.audit_examples,
            confidence=options.confidence,
            physical_batch_size=options.physical_batch_size,
            device=options.device,
            seed=options.seed,
            command=options.command_line,
            told=told,
        )
    Console().print(terminal_table(report))
    print(options.out / "report.html")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dpnlu", description="Private training of NLU models, and attacks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compare = commands.add_parser("compare", help="train at several budgets, attack, report")
    compare.add_argument("--epsilons", type=_epsilon, nargs="+", default=[math.inf, 8.0, 2.0])
    compare.add_argument("--canaries", nargs="+", default=[], metavar="PATTERN:LENGTH:R=COPIES")
    _add_training(compare, run=_compare)
    _add_attacks(compare)
    train = commands.add_parser("train", help="train one model for release")
    train.add_argument("--epsilon", type=_epsilon, required=True)
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--engine", help="book_keeping, per_example or opacus")
    train.add_argument("--vocabulary", default="hashed", help="hashed, fitted, or a word list")
    train.add_argument("--labels", help="JSON file that declares the label sets")
    train.add_argument("--resume", action="store_true", help="go on after an interruption")
    _add_training(train, run=_train)
    attack = commands.add_parser("attack", help="attack a trained model")
    attack.add_argument("model_directory", type=Path)
    attack.add_argument("--data", required=True, metavar="SPEC")
    _add_attacks(attack)
    _add_common(attack, run=_attack)
    predict.add_parser(commands)
    budget.add_parser(commands)
    benchmark.add_parser(commands)
    return parser


def _add_training(parser: argparse.ArgumentParser, *, run: Any) -> None:
    parser.add_argument("--data", required=True, metavar="SPEC")
    parser.add_argument("--model", default="lstm", metavar="lstm|encoder:NAME_OR_PATH")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--batch-size", type=int, help="expected batch size of private training")
    parser.add_argument("--dropout", type=float, help="in [0, 1), instead of the recipe's")
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    _add_common(parser, run=run)


def _add_attacks(parser: argparse.ArgumentParser) -> None:
    names = "loss, lira, rmia, exposure, extraction, audit"
    parser.add_argument("--attacks", nargs="+", metavar="ATTACK", help=f"default: {names}")
    parser.add_argument("--references", type=int, default=8, help="reference models per budget")
    parser.add_argument("--audit-examples", type=int, default=2000)
    parser.add_argument("--confidence", type=float, default=0.95)


def _add_common(parser: argparse.ArgumentParser, *, run: Any) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--physical-batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]|mps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


class _Parser(argparse.ArgumentParser):
    """Errors on one line."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        raise SystemExit(_failed(f"{line} (see {self.prog} --help)", status=2))


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected ε > 0 or inf, got {text}")
    return value


def _print_numbers(metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")


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
