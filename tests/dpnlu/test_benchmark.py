"""The benchmarks run, and what they compare is comparable. How fast it is, is not asked here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpnlu.benchmark import compiled, memory, overhead, sweep
from dpnlu.benchmark.cases import CASES, Case, RecurrentClassifier, RecurrentTagger, named
from dpnlu.benchmark.process import EQUAL_KERNELS, KEEPS_MEMORY
from dpnlu.benchmark.steps import ordinary, private
from dpnlu.cli.main import main

SMALL = replace(
    named("BiLSTM 100/100"),
    build=lambda: RecurrentClassifier(6, 5, vocabulary=50),
    physical=4,
    logical=12,
    vocabulary=50,
)


def test_steps_train_on_the_same_data_with_the_same_accumulation() -> None:
    batches = SMALL.inputs()
    assert [len(ids) for ids, *_ in batches] == [4, 4, 4]
    for make in (ordinary, private):
        torch.manual_seed(0)
        model = SMALL.build().train()
        before = [parameter.clone() for parameter in model.parameters()]
        with make(SMALL, model) as step:
            step()
        changed = [
            not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
        ]
        assert all(changed)
        assert SMALL.losses_of(model, batches[0]).shape == (4,)


def test_sampled_batches_are_drawn_anew_for_every_step_and_of_the_planned_size() -> None:
    case = replace(SMALL, sampled=True)
    assert len(case.examples()) == 120
    for make in (ordinary, private):
        torch.manual_seed(0)
        model, sizes, seen = case.build().train(), [], set()

        def losses_of(model, inputs, sizes=sizes, seen=seen):
            sizes.append(len(inputs[0]))
            seen.update(tuple(ids) for ids in inputs[0].tolist())
            return SMALL.losses_of(model, inputs)

        with make(replace(case, losses_of=losses_of), model) as step:
            for _ in range(10):
                step()
        assert max(sizes) <= 4
        assert len(seen) > 60  # all of them in ordinary training, of Poisson batches 1 - 0.9^10
        assert (len(seen) == 120) == (make is ordinary)


def test_products_are_torchs_own_where_the_environment_says_so() -> None:
    code = "from dpnlu.gradients.kernels import are_those_of_torch as f; print(f())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **EQUAL_KERNELS},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "True"


def test_what_is_timed_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    def run(*arguments: str, environment: dict[str, str]) -> dict[str, Any]:
        environments.append(environment)
        return {"ordinary_ms": 1.0, "private_ms": 2.0, "ratio": 2.0, "ratios": (1.0, 3.0)}

    monkeypatch.setattr(overhead, "result_of", run)
    monkeypatch.setattr(overhead, "are_those_of_torch", lambda: False)
    overhead.measure(SMALL, pairs=3)
    assert environments == [KEEPS_MEMORY, KEEPS_MEMORY | EQUAL_KERNELS]


def test_every_case_is_there_with_its_target() -> None:
    assert {case.name: case.target for case in CASES} == {
        "MiniLM-L6, logical 256": 1.10,
        "MiniLM-L6, logical 32": 1.22,
        "MiniLM-L6, LoRA rank 8": 1.10,
        "BiLSTM 300/256": 1.35,
        "BiLSTM 100/100": 1.50,
        "BiLSTM 100/100, Poisson batches": None,
        "BiLSTM 300/256, packed": None,
        "BiGRU 300/256": 1.35,
        "BiGRU 100/100": 1.35,
        "BiRNN 100/100": 1.35,
        "BiLSTM-CRF 100/100": 1.50,
        "DeBERTa-v2 2 x 128, logical 256": 1.50,
        "DeBERTa-v2 2 x 128, logical 32": 1.50,
        "GroupNorm": 2.0,
        "InstanceNorm": 2.0,
        "PReLU": 2.0,
        "EmbeddingBag": 2.0,
    }


def test_the_losses_of_the_tagger_are_minus_log_probabilities() -> None:
    torch.manual_seed(0)
    model = RecurrentTagger(3, 2, vocabulary=8)
    ids = torch.tensor([[3, 5, 1], [2, 2, 7]])
    for example in ids:
        every = torch.cartesian_prod(*[torch.arange(32)] * 3)
        losses = model(example.expand(len(every), 3), every)
        torch.testing.assert_close(losses.neg().exp().sum(), torch.tensor(1.0))


def test_ragged_texts_end_where_padding_begins() -> None:
    case = named("BiLSTM 300/256, packed")
    for ids, _ in case.inputs():
        lengths = (ids != 0).sum(1)
        assert 6 <= int(lengths.min()) < int(lengths.max()) <= 24
        assert bool(((ids == 0) == (torch.arange(24) >= lengths[:, None])).all())


@pytest.mark.slow
@pytest.mark.parametrize("what", ["overhead", "memory"])
def test_the_command_keeps_its_table(tmp_path: Path, what: str) -> None:
    command = ["benchmark", what, "--cases", "BiGRU 300", "--pairs", "3", "--quiet"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (table,) = tmp_path.glob("*.md")
    (data,) = tmp_path.glob("*.json")
    content = json.loads(data.read_text(encoding="utf-8"))
    (row,) = content["rows"]
    assert row["case"] == "BiGRU 300/256" and row["ratio"] > 0
    assert "BiGRU 300/256" in table.read_text(encoding="utf-8")
    assert content["machine"]["torch"] == torch.__version__


def test_what_was_measured_is_kept_when_the_rest_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(case: Case, *, device: str) -> memory.Memory:
        if measured:
            raise KeyboardInterrupt
        measured.append(case.name)
        return memory.Memory(case=case.name, ordinary_mib=1.0, private_mib=1.5, ratio=1.5)

    monkeypatch.setattr(memory, "measure", measure)
    command = ["benchmark", "memory", "--cases", "BiLSTM 100/100", "--quiet"]
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "dpnlu: error: interrupted; --out has what was measured\n"
    (data,) = tmp_path.glob("*.json")
    assert [row["case"] for row in json.loads(data.read_text())["rows"]] == measured


def test_a_case_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "overhead", "--cases", "nonsense"]) == 2
    assert main(["benchmark", "sweep", "--cases", "BiLSTM 100/100"]) == 2
    assert main(["benchmark", "compiled", "--cases", "BiLSTM 100/100"]) == 2
    assert "BiLSTM 300/256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pairs", "0"], "--pairs >= 3"),
        (["--pairs", "-1"], "--pairs >= 3"),
        (["--pairs", str(10**30)], "`pairs` to be 1e+06 at most"),
        (["--threads", "0"], "`threads` to be an integer >= 1"),
        (["--threads", "-1"], "`threads` to be an integer >= 1"),
        (["--threads", str(10**30)], "`threads` to be 1024 at most"),
    ],
)
def test_numbers_out_of_range_are_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["benchmark", "overhead", "--cases", "BiLSTM 100/100", "--out", str(out), *options]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(overhead, "measure", fail)
    (tmp_path / "file").touch()
    assert main(["benchmark", "overhead", "--quiet", "--out", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_tables_say_what_was_measured() -> None:
    row = overhead.Overhead(
        case="x",
        ordinary_ms=10,
        private_ms=11,
        ratio=1.1,
        ratios=(1.05, 1.15),
        equal_ratio=1.125,
        target=1.2,
    )
    assert "| x | 10.0 | 11.0 | **1.100** | 1.050 – 1.150 | 1.125 | 1.20 |" in overhead.table([row])
    row = memory.Memory(case="x", ordinary_mib=10, private_mib=11, ratio=1.1)
    assert "| x | 10 | 11 | **1.10** | 1.20 |" in memory.table([row])
    row = compiled.Compiled(
        case="x",
        ordinary_ms=10,
        private_ms=12,
        ordinary_compiled_ms=8,
        private_compiled_ms=9,
        ratio=1.2,
        compiled_ratio=1.125,
        compiled_ratios=(1.1, 1.15),
        ordinary_compiled_mib=100,
        private_compiled_mib=110,
    )
    times = "| x | 10.0 | 12.0 | 1.200 | 8.0 | 9.0 | **1.125** | 1.100 – 1.150 |"
    assert f"{times} 100 | 110 | **1.10** |" in compiled.table([row])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch, of Opacus' hooks
def test_a_sweep_measures_both_engines_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_AXES", {"examples": (2, 3), "positions": (2, 40), "width": (8,)})
    monkeypatch.setattr(sweep, "_BASE", {"examples": 2, "positions": 3, "width": 8})
    points = sweep.measure(lambda what, done, total: None, pairs=3)
    assert [point.axis for point in points] == ["examples"] * 2 + ["positions"] * 2 + ["width"]
    assert [point.takes_gram for point in points] == [True, True, True, False, True]
    assert all(point.ratio > 0 and point.opacus_ratio > 0 for point in points)
    sweep.plot(points, tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert sweep.table(points).count("\n") == 1 + len(points)
