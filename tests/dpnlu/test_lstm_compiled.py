"""The compiled scan of LSTM layers: its numbers, its independence of the batch, its building."""

import copy
import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dpnlu
from dpnlu.gradients.lstm import native
from dpnlu.gradients.lstm.compiled import CompiledLayer, Packed
from dpnlu.gradients.lstm.native import Scan, scan_for
from dpnlu.gradients.lstm.steps import Layer, Prepared

Weights = list[tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def scan() -> Scan:
    found = scan_for(torch.zeros(4, 1))
    if found is None:
        pytest.skip("no C compiler, or DPNLU_KERNELS=torch")
    return found


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process, with an empty cache."""
    native._scan.cache_clear()
    monkeypatch.delenv("DPNLU_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield monkeypatch
    native._scan.cache_clear()


def _flipped(sequences: Tensor) -> Tensor:
    return sequences.flip(0)


def _weights(inputs: int, units: int, *, directions: int = 2, bias: bool = True) -> Weights:
    torch.manual_seed(inputs + 7 * units)
    shapes = [(4 * units, inputs), (4 * units, units), *[(4 * units,)] * (2 * bias)]
    return [
        tuple(torch.randn(shape) / max(1, shape[-1]) ** 0.5 for shape in shapes)
        for _ in range(directions)
    ]


def _states(weights: Weights, sequences: int) -> tuple[Tensor, Tensor]:
    units = weights[0][1].shape[1]
    hidden, cell = (torch.randn(len(weights), sequences, units) for _ in range(2))
    return hidden, cell


def _results(
    scan: Scan | None, weights: Weights, inputs: Tensor, states: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Outputs of a layer, and the gradients of a loss of theirs; by torch's operations in float64
    where `scan` is None."""
    dtype = torch.float32 if scan else torch.float64
    leaves = [one.detach().to(dtype, copy=True).requires_grad_() for one in (inputs, *states)]
    of_layer = [tuple(one.to(dtype, copy=True).requires_grad_() for one in way) for way in weights]
    every = [one for way in of_layer for one in way]
    steps, sequences, _ = inputs.shape
    tap = torch.zeros(len(weights), steps, sequences, len(every[0]), dtype=dtype).requires_grad_()
    prepared = (
        Packed.of(scan, of_layer, steps * sequences) if scan else Prepared.of(of_layer, sequences)
    )
    kernel = CompiledLayer if scan else Layer
    used = [one.view_as(one) for one in (tap, *leaves, *every)]
    hidden, cells, before = kernel.apply(*used[:4], _flipped, prepared, *used[4:])
    scale = 1 + torch.arange(hidden.numel(), dtype=dtype).view(hidden.shape) % 5
    loss = (hidden * scale).sin().sum() + (cells * scale).cos().sum()
    gradients = torch.autograd.grad(loss, [tap, *leaves, *every])
    names = ["delta", "d_inputs", "d_hidden", "d_cell", *(f"d_{n}" for n in range(len(every)))]
    return {"hidden": hidden, "cells": cells, "before": before} | dict(
        zip(names, gradients, strict=True)
    )


@pytest.mark.parametrize("units", [1, 4, 15, 16, 17, 33, 70])
@pytest.mark.parametrize(("sequences", "steps"), [(1, 1), (5, 3), (6, 1), (13, 4)])
@pytest.mark.parametrize("directions", [1, 2])
def test_it_computes_what_torch_computes(
    scan: Scan, units: int, sequences: int, steps: int, directions: int
) -> None:
    weights = _weights(3, units, directions=directions, bias=units != 15)
    case = weights, torch.randn(steps, sequences, 3), _states(weights, sequences)
    exact = _results(None, *case)
    for name, found in _results(scan, *case).items():
        torch.testing.assert_close(found.double(), exact[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_neither_the_batch_nor_the_threads_change_a_sequence(scan: Scan, threads: int) -> None:
    weights = _weights(5, 21)
    states = _states(weights, 11)
    before = torch.get_num_threads()
    gates = torch.randn(2, 4, 11, 84)
    packed, _ = scan.pack(torch.stack([way[1] for way in weights]))

    def run(chosen: slice) -> tuple[Tensor, ...]:
        own = gates[:, :, chosen].clone(memory_format=torch.contiguous_format)
        kept = [torch.zeros(2, 5, own.shape[2], 21) for _ in range(2)]
        for whole, first in zip(kept, states, strict=True):
            whole[:, 0] = first[:, chosen]
        scan.ahead(own, *kept, packed)
        return own, *kept

    torch.set_num_threads(threads)
    try:
        together = run(slice(None))
    finally:
        torch.set_num_threads(before)
    for place in range(11):
        alone = run(slice(place, place + 1))
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one, all_of_them[:, :, place : place + 1])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_a_sequence_that_is_not_finite_stays_alone(scan: Scan, poison: float) -> None:
    weights = _weights(3, 9)
    inputs, states = torch.randn(3, 8, 3), _states(weights, 8)
    clean = _results(scan, weights, inputs, states)
    inputs[1, 4, 0] = poison
    spoilt = _results(scan, weights, inputs, states)
    others = [place for place in range(8) if place != 4]
    assert torch.equal(clean["delta"][:, :, others], spoilt["delta"][:, :, others])
    assert torch.equal(clean["hidden"][:, others], spoilt["hidden"][:, others])
    if math.isnan(poison):
        assert spoilt["hidden"][:, 4].isnan().any() and spoilt["delta"][:, :, 4].isnan().any()


def test_the_nonlinearities_are_exact_over_their_whole_range(scan: Scan) -> None:
    """Without recurrent weights the gates are σ and tanh of what is given."""
    given = torch.cat((torch.linspace(-100, 100, 20_001), torch.tensor([-1e30, 1e30, 0.0, 1e-6])))
    gates = given[None, None, :, None].repeat(1, 1, 1, 4)
    kept = [torch.zeros(1, 2, len(given), 1) for _ in range(2)]
    packed, _ = scan.pack(torch.zeros(1, 4, 1))
    scan.ahead(gates, *kept, packed)
    squashed, g = torch.sigmoid(given.double()), torch.tanh(given.double())
    for place, exact in enumerate((squashed, squashed, g, squashed)):
        torch.testing.assert_close(
            gates[0, 0, :, place].double(), exact, rtol=1e-6, atol=1e-37, msg=str(place)
        )
    torch.testing.assert_close(kept[1][0, 1, :, 0].double(), squashed * g, rtol=2e-6, atol=1e-37)


class _OfAnotherKind(Tensor):
    """As quantised and distributed tensors are, whose numbers are elsewhere."""


def test_it_is_for_float32_on_a_cpu(unbuilt: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(4, 1)
    assert scan_for(weight, weight.double()) is None
    assert scan_for(weight, weight.to("meta")) is None
    assert scan_for(weight.as_subclass(_OfAnotherKind)) is None
    with FakeTensorMode():
        assert scan_for(torch.zeros(4, 1)) is None
    found = []
    torch.vmap(lambda one: found.append(scan_for(one)) or one)(torch.zeros(3, 4, 1))
    assert found == [None]
    unbuilt.setenv("DPNLU_KERNELS", "torch")
    assert scan_for(weight) is None


@pytest.mark.usefixtures("scan")
def test_it_is_built_once_and_only_its_owner_can_write(
    unbuilt: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert scan_for(torch.zeros(4, 1)) is not None
    (built,) = (tmp_path / "dpnlu").iterdir()
    assert stat.S_IMODE((tmp_path / "dpnlu").stat().st_mode) == 0o700
    native._scan.cache_clear()
    unbuilt.setattr(native, "_LONGEST_BUILD", 20.0)
    changed = built.stat().st_mtime_ns
    assert scan_for(torch.zeros(4, 1)) is not None
    assert built.stat().st_mtime_ns == changed
    native._scan.cache_clear()
    (tmp_path / "dpnlu").chmod(0o777)
    built.write_bytes(b"someone else's")
    assert scan_for(torch.zeros(4, 1)) is not None  # built anew, elsewhere
    assert built.read_bytes() == b"someone else's"


def _compiler(folder: Path, script: str) -> Path:
    folder.mkdir()
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o700)
    return folder


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("[ $1 = --version ] || { echo 'no target' >&2; exit 1; }", "no target"),
        ("exit 3", "status 3"),
        ('[ $1 = --version ] || { while [ "$1" != -o ]; do shift; done; echo x > "$2"; }', "scan-"),
    ],
    ids=["refuses the source", "does not run", "makes no library"],
)
def test_a_build_that_fails_is_said_once(
    unbuilt: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    unbuilt.setenv("PATH", f"{_compiler(tmp_path / 'bin', script)}:/usr/bin:/bin")
    with pytest.warns(UserWarning, match=f"run through torch, which is slower.*{said}"):
        assert scan_for(torch.zeros(4, 1)) is None
    assert scan_for(torch.zeros(4, 1)) is None


def test_without_a_compiler_nothing_is_said(unbuilt: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unbuilt.setenv("PATH", str(tmp_path))
    assert scan_for(torch.zeros(4, 1)) is None


@pytest.mark.usefixtures("scan")
def test_processes_that_build_at_once_all_get_it(tmp_path: Path) -> None:
    code = (
        "import torch; from dpnlu.gradients.lstm.native import scan_for;"
        "print(scan_for(torch.zeros(4, 1)) is not None)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == [b"True"] * 2
    assert len(list((tmp_path / "dpnlu").iterdir())) == 1


class _Reader(nn.Module):
    def __init__(self, *, packed: bool = False, frozen: bool = False, **options: Any) -> None:
        super().__init__()
        self.packed = packed
        self.lstm = nn.LSTM(5, batch_first=True, **options)
        self.lstm.weight_hh_l0.requires_grad_(not frozen)
        width = (options.get("proj_size") or options["hidden_size"]) * (1 + self.lstm.bidirectional)
        self.head = nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.packed:
            outputs, (_, cells) = self.lstm(inputs)
        else:
            lengths = torch.arange(len(inputs)) % inputs.shape[1] + 1
            rows = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
            outputs, (_, cells) = self.lstm(rows)
            outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        return self.head(outputs).mean(1) + cells.sum(2).mean(0)[:, None]


@pytest.mark.usefixtures("scan")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 33, "num_layers": 3, "bidirectional": True},
        {"hidden_size": 8, "packed": True, "num_layers": 2},
        {"hidden_size": 9, "bidirectional": True, "frozen": True},
        {"hidden_size": 9, "bias": False},
        {"hidden_size": 9, "proj_size": 4},
    ],
    ids=str,
)
def test_a_private_step_in_float32_is_that_of_the_loop_in_float64(
    options: dict[str, Any], shape: tuple[int, int], autocast: bool
) -> None:
    plan = dpnlu.PrivacyPlan(
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        sample_rate=0.5,
        steps=1,
        target_delta=1e-3,
        num_examples=100,
    )
    torch.manual_seed(1)
    model, inputs = _Reader(**options), torch.randn(*shape, 5)
    found = []
    for engine, dtype in (("book_keeping", torch.float32), ("per_example", torch.float64)):
        twin, rows = copy.deepcopy(model).to(dtype), inputs.to(dtype)
        labels = torch.arange(len(rows)) % 3

        def losses(batch: Tensor, twin: nn.Module = twin, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(twin(batch), labels, reduction="none")

        trained = [p for p in twin.parameters() if p.requires_grad]
        with dpnlu.privatize(
            twin, torch.optim.SGD(trained, lr=0.1), plan, engine=engine
        ) as private:
            step = private.stepper(losses)
            is_low = autocast and dtype is torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=is_low), pytest.warns(UserWarning):
                step(rows)  # outside of a loader
            found.append(torch.cat([g.flatten() for g in private.gradients.values()]).double())
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert error < (0.05 if autocast else 2e-4)
