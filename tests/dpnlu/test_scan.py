"""The compiled scan of recurrent layers: its numbers, that sequences keep apart, its building."""

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
from dpnlu.gradients.recurrent import native
from dpnlu.gradients.recurrent.gru_compiled import CompiledGRU, PackedGRU
from dpnlu.gradients.recurrent.lstm_compiled import CompiledLayer, Packed
from dpnlu.gradients.recurrent.lstm_steps import Layer, Prepared
from dpnlu.gradients.recurrent.native import Scan, scan_for
from dpnlu.gradients.recurrent.plain_compiled import CompiledPlain, PackedPlain

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
    packed = scan.packed_ahead(torch.stack([way[1] for way in weights]))

    def run(chosen: slice) -> tuple[Tensor, ...]:
        own = gates[:, :, chosen].clone(memory_format=torch.contiguous_format)
        kept = [torch.zeros(2, 5, own.shape[2], 21) for _ in range(2)]
        for whole, first in zip(kept, states, strict=True):
            whole[:, 0] = first[:, chosen]
        scan.lstm_ahead(own, *kept, packed)
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
    packed = scan.packed_ahead(torch.zeros(1, 4, 1))
    scan.lstm_ahead(gates, *kept, packed)
    squashed, g = torch.sigmoid(given.double()), torch.tanh(given.double())
    for place, exact in enumerate((squashed, squashed, g, squashed)):
        torch.testing.assert_close(
            gates[0, 0, :, place].double(), exact, rtol=1e-6, atol=1e-37, msg=str(place)
        )
    torch.testing.assert_close(kept[1][0, 1, :, 0].double(), squashed * g, rtol=2e-6, atol=1e-37)


OF_ONE_STATE = {
    "GRU": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
of_one_state = pytest.mark.parametrize("cell", list(OF_ONE_STATE))


def _of_network(
    scan: Scan | None, network: nn.RNNBase, inputs: Tensor, state: Tensor
) -> dict[str, Tensor]:
    """Outputs of a layer, and the gradients of a loss of theirs; by torch itself in float64 where
    `scan` is None."""
    dtype = torch.float32 if scan else torch.float64
    network = copy.deepcopy(network).to(dtype)
    leaves = [one.detach().to(dtype, copy=True).requires_grad_() for one in (inputs, state)]
    every = list(network.parameters())
    if scan is None:
        hidden, _ = network(*leaves)
    else:
        each = len(every) // len(state)
        weights = [tuple(every[start : start + each]) for start in range(0, len(every), each)]
        taps = [
            torch.zeros(len(state), *inputs.shape[:2], len(every[0])).requires_grad_()
            for _ in range(2)
        ]
        rows = inputs.shape[0] * inputs.shape[1]
        used = [one.view_as(one) for one in (*taps, *leaves, *every)]
        if isinstance(network, nn.GRU):
            gru = PackedGRU.of(scan, weights, rows)
            hidden, _ = CompiledGRU.apply(*used[:4], _flipped, gru, *used[4:])
        else:
            rectifies = network.nonlinearity == "relu"
            plain = PackedPlain.of(scan, weights, rows, rectifies=rectifies)
            hidden, _ = CompiledPlain.apply(used[0], *used[2:4], _flipped, plain, *used[4:])
    scale = 1 + torch.arange(hidden.numel(), dtype=dtype).view(hidden.shape) % 5
    gradients = torch.autograd.grad((hidden * scale).sin().sum(), [*leaves, *every])
    names = ["d_inputs", "d_hidden", *(f"d_{n}" for n in range(len(every)))]
    return {"hidden": hidden} | dict(zip(names, gradients, strict=True))


@of_one_state
@pytest.mark.parametrize("units", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize(("sequences", "steps"), [(1, 1), (5, 3), (6, 1), (13, 4)])
@pytest.mark.parametrize("directions", [1, 2])
def test_cells_of_one_state_compute_what_torch_computes(
    scan: Scan, cell: str, units: int, sequences: int, steps: int, directions: int
) -> None:
    kind, options = OF_ONE_STATE[cell]
    network = kind(3, units, bias=units != 15, bidirectional=directions == 2, **options)
    inputs, state = torch.randn(steps, sequences, 3), torch.randn(directions, sequences, units)
    exact = _of_network(None, network, inputs, state)
    for name, found in _of_network(scan, network, inputs, state).items():
        lost = 1e-5 * max(1.0, float(exact[name].detach().abs().max()))
        torch.testing.assert_close(found.double(), exact[name], rtol=1e-5, atol=lost, msg=name)


@of_one_state
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_neither_the_batch_nor_the_threads_change_one_state(
    scan: Scan, cell: str, threads: int
) -> None:
    kind, options = OF_ONE_STATE[cell]
    network = kind(5, 21, bidirectional=True, **options)
    inputs, state = torch.randn(4, 11, 5), torch.randn(2, 11, 21)
    # One product for all rows may round otherwise than one for each: without inputs there is none.
    for name, weight in network.named_parameters():
        if name.startswith("weight_ih"):
            weight.data.zero_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = _of_network(scan, network, inputs, state)
    finally:
        torch.set_num_threads(before)
    for place in range(11):
        own = slice(place, place + 1)
        alone = _of_network(scan, network, inputs[:, own], state[:, own])
        assert torch.equal(alone["hidden"], together["hidden"][:, own])


@of_one_state
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_one_state_that_is_not_finite_stays_alone(scan: Scan, cell: str, poison: float) -> None:
    kind, options = OF_ONE_STATE[cell]
    network, state = kind(3, 9, bidirectional=True, **options), torch.randn(2, 8, 9)
    inputs = torch.randn(3, 8, 3)
    clean = _of_network(scan, network, inputs, state)
    inputs[1, 4, 0] = poison
    spoilt = _of_network(scan, network, inputs, state)
    others = [place for place in range(8) if place != 4]
    for name in ("hidden", "d_hidden", "d_inputs"):
        assert torch.equal(clean[name][:, others], spoilt[name][:, others]), name
    if math.isnan(poison):
        assert spoilt["hidden"][:, 4].isnan().any() and spoilt["d_hidden"][:, 4].isnan().any()


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
        "import torch; from dpnlu.gradients.recurrent.native import scan_for;"
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
    def __init__(
        self,
        kind: type[nn.RNNBase] = nn.LSTM,
        *,
        packed: bool = False,
        frozen: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.network = kind(5, batch_first=True, **options)
        self.network.weight_hh_l0.requires_grad_(not frozen)
        width = options.get("proj_size") or options["hidden_size"]
        self.head = nn.Linear(width * (1 + self.network.bidirectional), 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.packed:
            outputs, last = self.network(inputs)
        else:
            lengths = torch.arange(len(inputs)) % inputs.shape[1] + 1
            rows = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
            outputs, last = self.network(rows)
            outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        states = last[1] if isinstance(last, tuple) else last
        return self.head(outputs).mean(1) + states.sum(2).mean(0)[:, None]


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
        {"kind": nn.GRU, "hidden_size": 33, "num_layers": 2, "bidirectional": True},
        {"kind": nn.GRU, "hidden_size": 8, "packed": True, "num_layers": 2},
        {"kind": nn.GRU, "hidden_size": 9, "bidirectional": True, "frozen": True},
        {"kind": nn.GRU, "hidden_size": 9, "bias": False},
        {"kind": nn.RNN, "hidden_size": 33, "num_layers": 2, "bidirectional": True},
        {"kind": nn.RNN, "hidden_size": 8, "packed": True, "nonlinearity": "relu"},
        {"kind": nn.RNN, "hidden_size": 9, "bidirectional": True, "frozen": True},
        {"kind": nn.RNN, "hidden_size": 9, "bias": False, "nonlinearity": "relu"},
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
