"""One private step by dpnlu and by its peers, on the same model and data, beside an ordinary step.

Peers: the original loop over examples (which micro-batches of one come to as well), eDP-SGD with
few micro-batches, Opacus' hooks and ghost clipping, and FastDP if `fastDP` can be imported (it is
not on the package index: clone awslabs/fast-differential-privacy and put it on PYTHONPATH). All
steps run in turn in one process, and compute at most 64 examples at once. Those of dpnlu and of
eDP-SGD, which dpnlu computes too, write a ledger; the others do not.

    python benchmarks/peers.py --pairs 9 --out benchmarks/results
    python benchmarks/peers.py --batches 16 64 256 --pairs 5 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F

import dpnlu
from dpnlu.benchmark.cases import Case, RecurrentClassifier, minilm
from dpnlu.benchmark.process import KEEPS_MEMORY
from dpnlu.benchmark.steps import Step, ordinary, private
from dpnlu.cli.benchmark import processor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

AT_ONCE = 64
# Of the train split of SNIPS, whose texts these are as long as, or shorter.
EPOCH = 13_084
MICROBATCHES = (1, 4, 16)
# A step of the loop over examples takes so long that few are enough.
ROUNDS_OF_THE_LOOP = 2
LOOP = "loop over examples"


class GivenPositions(nn.Module):
    """The encoder, handed position ids for each example: Opacus stops at shared ones."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        return self.encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            token_type_ids=torch.zeros_like(ids),
        ).logits


def cases(batch: int) -> tuple[Case, ...]:
    """The work at a batch size."""
    sizes = {"logical": batch, "physical": min(batch, AT_ONCE)}
    return (
        Case(
            name="MiniLM-L6",
            build=lambda: GivenPositions(minilm().encoder),
            positions=32,
            vocabulary=30_522,
            **sizes,
        ),
        Case(
            name="BiLSTM 100/100",
            build=lambda: RecurrentClassifier(100, 100),
            positions=24,
            **sizes,
        ),
    )


@contextmanager
def loop_over_examples(case: Case, model: nn.Module) -> Iterator[Step]:
    """The original, one backward pass for each example (Abadi et al. 2016)."""
    optimizer = _adamw(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = case.inputs()

    def step() -> None:
        sums = [torch.zeros_like(p) for p in parameters]
        for ids, intents in batches:
            for one in range(len(ids)):
                loss = F.cross_entropy(model(ids[one : one + 1]), intents[one : one + 1])
                gradients = torch.autograd.grad(loss, parameters)
                norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
                factor = (1.0 / norm).clamp(max=1.0)
                for total, gradient in zip(sums, gradients, strict=True):
                    total.add_(gradient * factor)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total.add_(torch.randn_like(total)) / case.logical
        optimizer.step()
        optimizer.zero_grad()

    yield step


@contextmanager
def edp_sgd(case: Case, model: nn.Module, *, microbatches: int) -> Iterator[Step]:
    """Clipping of micro-batches by dpnlu, each one ordinary backward pass."""
    size, rest = divmod(case.logical, microbatches)
    if rest or size > AT_ONCE:
        raise NotImplementedError(f"{microbatches} of {case.logical} examples, {AT_ONCE} at once")
    pieces = replace(case, physical=size)
    with private(pieces, model, microbatches=microbatches) as step:
        yield step


@contextmanager
def opacus_hooks(case: Case, model: nn.Module) -> Iterator[Step]:
    """Gradients of every example, written out."""
    wrapped = GradSampleModule(ModuleValidator.fix(model))
    optimizer = DPOptimizer(
        _adamw(wrapped), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=case.logical
    )
    yield _stepping(case, wrapped, optimizer, F.cross_entropy)


@contextmanager
def opacus_ghost(case: Case, model: nn.Module) -> Iterator[Step]:
    """Norms without the gradients, then a second backward pass."""
    wrapped = GradSampleModuleFastGradientClipping(
        ModuleValidator.fix(model), max_grad_norm=1.0, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        _adamw(wrapped), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=case.logical
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    yield _stepping(case, wrapped, optimizer, criterion)


@contextmanager
def fast_dp(case: Case, model: nn.Module) -> Iterator[Step]:
    """Book-keeping by FastDP, in its default mode, with the clipping that the others have."""
    from fastDP import PrivacyEngine

    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        raise NotImplementedError("no recurrent layers")
    engine = PrivacyEngine(
        model,
        batch_size=case.logical,
        sample_size=100 * case.logical,
        epochs=1,
        noise_multiplier=1.0,
        clipping_fn="Abadi",
    )
    optimizer = _adamw(model)
    engine.attach(optimizer)
    yield _stepping(case, model, optimizer, F.cross_entropy)


Peer = Callable[[Case, nn.Module], AbstractContextManager[Step]]
PEERS: dict[str, Peer] = {
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "FastDP": fast_dp,
}
METHODS: dict[str, Peer] = {
    "dpnlu": private,
    "dpnlu compiled": partial(private, compiles=True),
    **{f"eDP-SGD, {count}": partial(edp_sgd, microbatches=count) for count in MICROBATCHES},
    **PEERS,
    LOOP: loop_over_examples,
}


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _stepping(case: Case, model: nn.Module, optimizer: Any, criterion: Callable[..., Any]) -> Step:
    device = next(model.parameters()).device
    batches = [(ids.to(device), intents.to(device)) for ids, intents in case.inputs()]

    def step() -> None:
        for number, (ids, intents) in enumerate(batches, start=1):
            criterion(model(ids), intents).backward()
            is_last = number == len(batches)
            if isinstance(optimizer, DPOptimizer):  # which clips what it has at every call
                optimizer.signal_skip_step(do_skip=not is_last)
            elif not is_last:
                continue
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(case: Case, pairs: int, names: list[str]) -> dict[str, Any]:
    """Median ratio of each method's step to the ordinary step of its round, and its quartiles."""
    torch.manual_seed(0)
    model = case.build().train()
    refused = {}
    with ExitStack() as stack:
        steps = {"ordinary": stack.enter_context(ordinary(case, copy.deepcopy(model)))}
        for name in names:
            try:
                steps[name] = stack.enter_context(METHODS[name](case, copy.deepcopy(model)))
                steps[name]()
            except (ImportError, NotImplementedError, dpnlu.UnsupportedLayerError) as error:
                refused[name] = str(error)
                steps.pop(name, None)
        for name in [*steps] * 2:
            if name != LOOP:
                steps[name]()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for place in range(pairs):
            for name, step in steps.items():
                if name != LOOP or place < ROUNDS_OF_THE_LOOP:
                    times[name].append(_time(step))
    return {"case": case.name, "batch": case.logical, "refused": refused, "seconds": times}


def _time(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def ratios(row: dict[str, Any], name: str) -> list[float]:
    """Of a method's steps to the ordinary ones of the same rounds."""
    pairs = zip(row["seconds"][name], row["seconds"]["ordinary"], strict=False)
    return [taken / usual for taken, usual in pairs]


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """The results in Markdown."""
    lines = [
        f"| work | batch | ordinary: ms a step | s an epoch | {' | '.join(names)} |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(names),
    ]
    for row in rows:
        seconds = statistics.median(row["seconds"]["ordinary"])
        cells = [_cell(row, name) for name in names]
        lines.append(
            f"| {row['case']} | {row['batch']} | {1e3 * seconds:.0f} | "
            f"{EPOCH / row['batch'] * seconds:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    found = ratios(row, name)
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{statistics.median(found):.2f} ({low:.2f} – {high:.2f})"


def figure(rows: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """How many times as long as an ordinary step each method takes, on a logarithmic scale."""
    works = list(dict.fromkeys(row["case"] for row in rows))
    drawn, axes = plt.subplots(1, len(works), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, work in zip(axes, works, strict=True):
        of_work = [row for row in rows if row["case"] == work]
        height = 0.8 / len(of_work)
        for place, row in enumerate(of_work):
            known = [name for name in names if name in row["seconds"]]
            middles = [statistics.median(ratios(row, name)) for name in known]
            heights = [names.index(name) + height * place for name in known]
            axis.barh(heights, middles, height, label=f"batch {row['batch']}")
            for x, y in zip(middles, heights, strict=True):
                axis.annotate(
                    f"{x:.2f}", (x, y), xytext=(3, -3), textcoords="offset points", fontsize=7
                )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", title=work, xlabel="times an ordinary step")
        axis.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    axes[-1].legend()
    drawn.savefig(path)
    plt.close(drawn)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[32])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not KEEPS_MEMORY.items() <= os.environ.items():  # which is read when a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEPS_MEMORY)
    torch.set_num_threads(options.threads)
    rows = []
    with _quiet():
        for case in [case for batch in options.batches for case in cases(batch)]:
            rows.append(measure(case, options.pairs, options.methods))
            print(table(rows[-1:], options.methods), flush=True)
    rows.sort(key=lambda row: row["case"], reverse=True)
    if options.out is not None:
        _keep(options.out, rows, options.methods, options.threads)


def _keep(folder: Path, rows: list[dict[str, Any]], names: list[str], threads: int) -> None:
    day = datetime.date.today().isoformat()
    machine = {
        "processor": processor(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "opacus", "transformers")},
    }
    if "fastDP" in sys.modules:
        machine["fastDP"] = sys.modules["fastDP"].__version__
    command = " ".join(["python", *sys.argv])
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    reasons = "".join(
        f"- {row['case']}, batch {row['batch']}: {name} was not measured ({reason}).\n"
        for row in rows
        for name, reason in row["refused"].items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "date": day, "machine": machine, "rows": rows}
    (folder / f"{day}-peers.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{day}-peers.md").write_text(
        f"# Private step over ordinary step, {day}\n\n`{command}`\n\n{facts}\n\n"
        f"{table(rows, names)}\n\nMedians of the ratios of one round, with quartiles; of the "
        f"loop, of {ROUNDS_OF_THE_LOOP} rounds. An epoch is {EPOCH} examples. All had an allocator "
        f"that keeps its memory, and computed {AT_ONCE} examples at once.\n\n{reasons}\n"
        f"![times an ordinary step]({day}-peers.svg)\n"
    )
    figure(rows, names, folder / f"{day}-peers.svg")


if __name__ == "__main__":
    main()
