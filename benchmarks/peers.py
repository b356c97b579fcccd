"""One private step by dpnlu and by its peers, on the same model and data, beside an ordinary step.

Peers: Opacus' hooks and ghost clipping, and FastDP if `fastDP` can be imported (it is not on the
package index: clone awslabs/fast-differential-privacy and put it on PYTHONPATH). All steps run in
turn in one process. Peers do not write a ledger; dpnlu does.

    python benchmarks/peers.py --pairs 9 --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.benchmark.cases import Case, RecurrentClassifier, minilm
from dpnlu.benchmark.steps import Step, ordinary, private
from dpnlu.cli.benchmark import processor

BATCH = 32
Peer = Callable[[Case, nn.Module], Step]


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


CASES = (
    Case(
        name="MiniLM-L6",
        build=lambda: GivenPositions(minilm().encoder),
        positions=32,
        physical=BATCH,
        logical=BATCH,
        vocabulary=30_522,
    ),
    Case(
        name="BiLSTM 100/100",
        build=lambda: RecurrentClassifier(100, 100),
        positions=24,
        physical=BATCH,
        logical=BATCH,
    ),
)


def opacus_hooks(case: Case, model: nn.Module) -> Step:
    """Gradients of every example, written out."""
    wrapped = GradSampleModule(ModuleValidator.fix(model))
    optimizer = DPOptimizer(
        _adamw(wrapped), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=case.logical
    )
    return _stepping(case, wrapped, optimizer, F.cross_entropy)


def opacus_ghost(case: Case, model: nn.Module) -> Step:
    """Norms without the gradients, then a second backward pass."""
    wrapped = GradSampleModuleFastGradientClipping(
        ModuleValidator.fix(model), max_grad_norm=1.0, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        _adamw(wrapped), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=case.logical
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    return _stepping(case, wrapped, optimizer, criterion)


def fast_dp(case: Case, model: nn.Module) -> Step:
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
    return _stepping(case, model, optimizer, F.cross_entropy)


PEERS: dict[str, Peer] = {
    "Opacus hooks": opacus_hooks,
    "Opacus ghost": opacus_ghost,
    "FastDP": fast_dp,
}


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _stepping(case: Case, model: nn.Module, optimizer: object, criterion: Callable) -> Step:
    device = next(model.parameters()).device
    ((ids, intents),) = case.inputs()
    ids, intents = ids.to(device), intents.to(device)

    def step() -> None:
        criterion(model(ids), intents).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(case: Case, pairs: int) -> dict[str, object]:
    """Median ratio of each engine's step to the ordinary step before it, and its quartiles."""
    torch.manual_seed(0)
    model = case.build().train()
    with ExitStack() as stack:
        steps = {"ordinary": stack.enter_context(ordinary(case, copy.deepcopy(model)))}
        refused = {}
        for name, build in PEERS.items():
            try:
                steps[name] = build(case, copy.deepcopy(model))
                steps[name]()
            except (ImportError, NotImplementedError) as error:
                refused[name] = str(error)
                steps.pop(name, None)
        steps["dpnlu"] = stack.enter_context(private(case, model))
        for step in [*steps.values()] * 2:
            step()
        times = [{name: _time(step) for name, step in steps.items()} for _ in range(pairs)]
    row: dict[str, object] = {
        "case": case.name,
        "ordinary_ms": 1e3 * statistics.median(t["ordinary"] for t in times),
        "refused": refused,
    }
    for name in steps:
        if name != "ordinary":
            ratios = [t[name] / t["ordinary"] for t in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row[name] = {"ratio": middle, "quartiles": [low, high]}
    return row


def _time(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    names = ["dpnlu", *PEERS]
    lines = [
        f"| work, {BATCH} examples | ordinary ms | {' | '.join(names)} |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for row in rows:
        cells = [_cell(row.get(name)) for name in names]
        lines.append(f"| {row['case']} | {row['ordinary_ms']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict | None) -> str:
    if found is None:
        return "–"
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} – {high:.2f})"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with _quiet():
        rows = [measure(case, options.pairs) for case in CASES]
    text = table(rows)
    print(text)
    if options.out is not None:
        _keep(options.out, rows, text, options.threads)


def _keep(folder: Path, rows: list[dict], text: str, threads: int) -> None:
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
        f"{row['case']}: {name} was not measured ({reason}).\n"
        for row in rows
        for name, reason in row["refused"].items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "date": day, "machine": machine, "rows": rows}
    (folder / f"{day}-peers.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"{day}-peers.md").write_text(
        f"# Private step over ordinary step, {day}\n\n`{command}`\n\n{facts}\n\n{text}\n\n"
        f"Medians of the ratios of one round, with quartiles. {reasons}"
    )


if __name__ == "__main__":
    main()
