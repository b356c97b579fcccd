"""The table of a GPU: ordinary and private steps, and those of others, in float32 and bfloat16.

    python benchmarks/gpu.py

needs no network and less than eight minutes; what there is no time for is named and left out. On a
CPU, `--device cpu --toy` goes through all of it at a size that tells nothing.

Each step is that of one whole logical batch: forward and backward pass, for private ones clipping,
noise and (dpnlu alone) the ledger on disk, and AdamW. "ordinary" computes recurrent layers by
cuDNN, as torch does unless told otherwise, in TF32; "no cuDNN" by torch's own kernels. All other
products are in float32 where it says so, torch's default. bfloat16 is autocast of the forward pass.
Replayed steps begin all kernels up to the optimizer's by one call (dpnlu: two), as CUDA graphs;
forward and backward pass of ordinary ones are traced and replayed in the same way. Compiled steps
are by torch.compile, for models without recurrent layers. Memory is what torch holds at its peak,
beyond what it held before.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from peers import PEERS, GivenPositions, Peer
from torch import Tensor, nn

from dpnlu.benchmark.cases import Case, RecurrentClassifier, bert
from dpnlu.benchmark.steps import Step, optimizer_of, ordinary, private
from dpnlu.cli.benchmark import device_facts, processor
from dpnlu.engines.replay import Replay
from dpnlu.engines.tracing import traced
from dpnlu.runs.resources import memory_of
from dpnlu.training.device import resolved_device, synchronize

PRECISIONS = ("float32", "bfloat16")
WORDS = 30_522
COMPILED = ("ordinary compiled", "dpnlu compiled")
REPLAYED = ("ordinary replayed", "dpnlu replayed")
_NO_MEMORY, _NO_TIME = "out of memory", "no time was left"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many steps of a cell are made.

    Attributes:
        warm_up: steps that are not timed; the first and the fourth batch are checked.
        least, most: steps that are; at least two.
        seconds: after which the least are enough.
    """

    warm_up: int = 5
    least: int = 5
    most: int = 30
    seconds: float = 3.0


TOY_PACE = Pace(warm_up=1, least=2, most=2)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One kind of step on one case.

    Attributes:
        step_ms: median time of a step; None: it was not measured, for the `reason`.
        quartiles_ms: of the same.
        memory_mib: at the peak; None: unknown on this device.
    """

    case: str
    precision: str
    kind: str
    step_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    memory_mib: float | None = None
    reason: str = ""


class Half(nn.Module):
    """A model whose forward pass is under autocast to bfloat16."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.kind = model, torch.device(device).type

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.kind, torch.bfloat16):
            logits: Tensor = self.model(ids)
        return logits.float()


def encoder(*, layers: int, hidden: int, heads: int) -> nn.Module:
    return GivenPositions(bert(layers=layers, hidden=hidden, heads=heads).encoder)


def cases(*, toy: bool) -> tuple[Case, ...]:
    """BERT-base, the shape of MiniLM-L6, and a BiLSTM; sizes at which peers' gradients fit."""
    base = Case(
        name="BERT-base, 64 texts",
        build=partial(encoder, layers=12, hidden=768, heads=12),
        positions=32,
        physical=64,
        logical=64,
        vocabulary=WORDS,
    )
    small = replace(
        base,
        name="MiniLM-L6, 256 texts",
        build=partial(encoder, layers=6, hidden=384, heads=12),
        physical=256,
        logical=256,
    )
    lstm = replace(
        small,
        name="BiLSTM 300/256, 256 texts",
        build=partial(RecurrentClassifier, 300, 256),
        positions=24,
        vocabulary=10_000,
    )
    if not toy:
        return base, small, lstm
    size = {"positions": 6, "physical": 4, "logical": 4}
    return (
        replace(base, build=partial(encoder, layers=2, hidden=16, heads=2), **size),
        replace(small, build=partial(encoder, layers=1, hidden=8, heads=2), **size),
        replace(lstm, build=partial(RecurrentClassifier, 6, 5), **size),
    )


def measure(case: Case, precision: str, kind: str, device: str, pace: Pace) -> Cell:
    """Build the model and time its steps; what cannot be done is a reason, not an error."""
    cell = Cell(case=case.name, precision=precision, kind=kind)
    if precision == "bfloat16":
        case = replace(case, build=partial(_half, case.build, device))
    try:
        return replace(cell, **_measured(case, kind, device, pace))
    except torch.OutOfMemoryError:
        return replace(cell, reason=_NO_MEMORY)
    except Exception as error:  # whatever it is, the other cells are worth having
        if kind not in PEERS:
            traceback.print_exc()
        reason = " ".join(str(error).split())[:200]
        return replace(cell, reason=f"{type(error).__name__}: {reason}")
    finally:
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _half(build: Callable[[], nn.Module], device: str) -> nn.Module:
    return Half(build(), device)


def _measured(case: Case, kind: str, device: str, pace: Pace) -> dict[str, object]:
    memory = memory_of(device)
    memory.reset_peak()
    before = memory.current()
    torch.manual_seed(0)
    with KINDS[kind](case, case.build().train(), device) as step:
        times = _times(step, pace)
    peak = memory.peak()
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "step_ms": middle,
        "quartiles_ms": (low, high),
        "memory_mib": None if peak is None or before is None else max(0.0, peak - before),
    }


def _times(step: Step, pace: Pace) -> list[float]:
    """Milliseconds of steps, after some that are not timed."""
    for _ in range(pace.warm_up):
        step()
    begun = time.perf_counter()
    times: list[float] = []
    while len(times) < pace.least or (
        len(times) < pace.most and time.perf_counter() - begun < pace.seconds
    ):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return times


@contextmanager
def _ordinary(
    case: Case, model: nn.Module, device: str, *, compiles: bool = False
) -> Iterator[Step]:
    with ordinary(case, model, compiles=compiles, device=device) as step:
        yield step


@contextmanager
def _ordinary_replayed(case: Case, model: nn.Module, device: str) -> Iterator[Step]:
    """Of the gradients of the whole logical batch, which is one physical batch here."""
    optimizer, parameters = optimizer_of(model.to(device)), list(model.parameters())

    @torch.enable_grad()
    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.losses_of(model, inputs).sum() / case.logical, parameters)

    inputs = [tensor.to(device) for tensor in next(iter(case.inputs()))]
    # cuDNN's operations are captured as they stand; an encoder looks at its mask, unless traced.
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    program = gradients if is_recurrent else traced(gradients, inputs, model=model)
    replay = Replay(program, pool=torch.cuda.graph_pool_handle())

    def step() -> None:
        with torch.no_grad():
            found = replay(*inputs)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        synchronize(device)

    yield step


@contextmanager
def _no_cudnn(case: Case, model: nn.Module, device: str) -> Iterator[Step]:
    with torch.backends.cudnn.flags(enabled=False), ordinary(case, model, device=device) as step:
        yield step


@contextmanager
def _private(
    case: Case, model: nn.Module, device: str, *, backend: str | None = None
) -> Iterator[Step]:
    options = {} if backend is None else {"compiles": True, "backend": backend}
    with private(case, model, device=device, **options) as step:
        yield step


@contextmanager
def _by_peer(peer: Peer, case: Case, model: nn.Module, device: str) -> Iterator[Step]:
    with peer(case, model.to(device)) as step:

        def synchronized() -> None:
            step()
            synchronize(device)

        yield synchronized


KINDS = {
    "ordinary": _ordinary,
    "no cuDNN": _no_cudnn,
    "dpnlu": _private,
    "ordinary compiled": partial(_ordinary, compiles=True),
    "dpnlu compiled": partial(_private, backend="inductor"),
    "ordinary replayed": _ordinary_replayed,
    "dpnlu replayed": partial(_private, backend="cudagraphs"),
    **{name: partial(_by_peer, peer) for name, peer in PEERS.items()},
}


def kinds_of(case: Case, device: str) -> list[str]:
    """The kinds of step that say something about the case; what is meant for GPUs only there."""
    has_cuda = device.startswith("cuda")
    is_recurrent = isinstance(case.build(), RecurrentClassifier)
    left_out: set[str] = set()
    if not (has_cuda and is_recurrent):
        left_out |= {"no cuDNN"}
    if is_recurrent or not has_cuda:
        left_out |= set(COMPILED)
    if not has_cuda:
        left_out |= set(REPLAYED)
    return [kind for kind in KINDS if kind not in left_out]


def all_cells(
    chosen: tuple[Case, ...],
    device: str,
    *,
    pace: Pace,
    seconds: float,
    kinds: Sequence[str] = (),
) -> Iterator[Cell]:
    """Every cell; from `seconds` on, only what was not measured. Ours come first, then peers', and
    last what is compiled, which takes a minute each.

    Args:
        kinds: of step, beside ordinary ones; none: all of them.
    """
    begun = time.perf_counter()
    work = [
        (case, precision, kind)
        for case in chosen
        for precision in PRECISIONS
        for kind in kinds_of(case, device)
        if not kinds or kind in ("ordinary", *kinds)
    ]
    for case, precision, kind in sorted(
        work, key=lambda job: (job[2] in COMPILED, job[2] in PEERS)
    ):
        if time.perf_counter() - begun > seconds:
            yield Cell(case=case.name, precision=precision, kind=kind, reason=_NO_TIME)
        else:
            yield measure(case, precision, kind, device, pace)


def table(cells: list[Cell]) -> str:
    """The results in Markdown: time, its ratio to the ordinary step's, memory."""
    lines = [
        "| work | precision | step | ms | quartiles | × ordinary | peak MiB |",
        "| --- | --- | --- | ---: | --- | ---: | ---: |",
    ]
    plain = {(c.case, c.precision): c.step_ms for c in cells if c.kind == "ordinary"}
    for cell in sorted(cells, key=lambda c: list(plain).index((c.case, c.precision))):
        start = f"| {cell.case} | {cell.precision} | {cell.kind} |"
        if cell.step_ms is None or cell.quartiles_ms is None:
            lines.append(f"{start} – | {cell.reason.replace('|', ' ')} | – | – |")
            continue
        whole = plain[cell.case, cell.precision]
        ratio = "–" if whole is None else f"**{cell.step_ms / whole:.2f}**"
        memory = "–" if cell.memory_mib is None else f"{cell.memory_mib:.0f}"
        low, high = cell.quartiles_ms
        times = f"{cell.step_ms:.2f} | {low:.2f} – {high:.2f}"
        lines.append(f"{start} {times} | {ratio} | {memory} |")
    return "\n".join(lines)


def machine(device: str) -> dict[str, str]:
    """What it was measured on, and by."""
    facts = {**device_facts(device), "processor": processor(), "python": platform.python_version()}
    for package in ("dpnlu", "torch", "transformers", "opacus", "fastDP"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        facts |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return facts


def keep(folder: Path, cells: list[Cell], *, device: str, toy: bool) -> None:
    """Write the dated Markdown and JSON."""
    day = datetime.date.today().isoformat()
    command, facts = " ".join(["python", *sys.argv]), machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}-gpu{'-toy' if toy else ''}"
    content = {
        "command": command,
        "date": day,
        "machine": facts,
        "rows": [asdict(cell) for cell in cells],
    }
    written = json.dumps(content, indent=1, allow_nan=False)
    path.with_suffix(".json").write_text(written + "\n", encoding="utf-8")
    listed = ", ".join(f"{name} {value}" for name, value in facts.items())
    described = "\n\n".join(__doc__.split("\n\n")[3:])
    path.with_suffix(".md").write_text(
        f"# Steps on {facts.get('device', 'a CPU')}, {day}\n\n`{command}`\n\n{listed}\n\n"
        f"{table(cells)}\n\n{described}",
        encoding="utf-8",
    )


def _may_be_missing(cell: Cell) -> bool:
    """Whether nothing is wrong with what was measured, though this was not."""
    return cell.kind in PEERS or cell.reason in (_NO_MEMORY, _NO_TIME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda[:N] or mps")
    parser.add_argument(
        "--toy", action="store_true", help="tiny models: tells nothing, runs at all"
    )
    parser.add_argument("--seconds", type=float, default=420, help="after which no cell is begun")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=[],
        choices=list(KINDS),
        metavar="KIND",
        help="of step, beside ordinary ones: " + ", ".join(KINDS) + " (default: all)",
    )
    options = parser.parse_args()
    device = resolved_device(options.device)
    if device == "cpu" and not options.toy:
        parser.error("expected a GPU, or --toy; found none: for a CPU there is dpnlu benchmark")
    cells = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        pace = TOY_PACE if options.toy else Pace()
        chosen = cases(toy=options.toy)
        found = all_cells(chosen, device, pace=pace, seconds=options.seconds, kinds=options.kinds)
        for cell in found:
            cells.append(cell)
            print(cell.case, cell.precision, cell.kind, cell.step_ms, cell.reason, file=sys.stderr)
            keep(options.out, cells, device=device, toy=options.toy)
    print(table(cells))
    if any(cell.step_ms is None and not _may_be_missing(cell) for cell in cells):
        sys.exit("a step of ours failed; see above")


if __name__ == "__main__":
    main()
