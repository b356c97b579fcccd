"""The script that makes the table of a GPU runs, at a size that tells nothing, on a CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("gpu")


def _is_whole(rows: list[dict[str, object]]) -> None:
    """Three models, two precisions, and every kind of step that a CPU has."""
    seen = {(row["case"], row["precision"], row["kind"]) for row in rows}
    assert len(seen) == len(rows) == 3 * 2 * 5
    assert {row["kind"] for row in rows} == {
        "ordinary",
        "dpnlu",
        "Opacus hooks",
        "Opacus ghost",
        "FastDP",
    }


def test_what_there_is_no_time_for_is_named(gpu: ModuleType) -> None:
    cells = list(gpu.all_cells(gpu.cases(toy=True), "cpu", pace=gpu.TOY_PACE, seconds=-1))
    _is_whole([vars(cell) for cell in cells])
    assert {cell.reason for cell in cells} == {"no time was left"}
    assert gpu.table(cells).count("no time was left") == len(cells)


def test_a_failing_step_has_a_reason_and_the_script_fails_if_it_is_ours(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What else was measured is kept."""

    def fail(*_: object) -> None:
        raise RuntimeError("it broke")

    # Not the recurrent case, for which some processors have no kernel in bfloat16.
    encoder = gpu.cases(toy=True)[1:2]
    monkeypatch.setattr(gpu, "cases", lambda *, toy: encoder)
    for kind, status in (("FastDP", None), ("dpnlu", "a step of ours failed; see above")):
        with monkeypatch.context() as patch:
            patch.setitem(gpu.KINDS, kind, fail)
            arguments = ["--device", "cpu", "--toy", "--out", str(tmp_path), "--kinds", kind]
            patch.setattr(sys, "argv", ["gpu.py", *arguments])
            assert _status(gpu.main) == status
        (kept,) = tmp_path.glob("*.json")
        rows = json.loads(kept.read_text(encoding="utf-8"))["rows"]
        assert sorted(row["kind"] for row in rows) == sorted(["ordinary", kind] * 2)
        for row in rows:
            failed = row["kind"] == kind
            assert (row["step_ms"] is None) == failed
            assert row["reason"] == ("RuntimeError: it broke" if failed else "")


def _status(main: Callable[[], None]) -> object:
    try:
        main()
    except SystemExit as end:
        return end.code
    return None


def test_ratios_are_to_the_ordinary_step_of_the_same_row(gpu: ModuleType) -> None:
    shape = {"case": "a", "quartiles_ms": (1.0, 2.0)}
    cells = [
        gpu.Cell(precision=precision, kind=kind, step_ms=ms, **shape)
        for precision, kind, ms in (
            ("float32", "ordinary", 4.0),
            ("bfloat16", "ordinary", 2.0),
            ("float32", "dpnlu", 5.0),
            ("bfloat16", "dpnlu", 3.0),
        )
    ]
    printed = gpu.table(cells)
    assert "| a | float32 | dpnlu | 5.00 | 1.00 – 2.00 | **1.25** | – |" in printed
    assert "| a | bfloat16 | dpnlu | 3.00 | 1.00 – 2.00 | **1.50** | – |" in printed


def test_on_a_gpu_recurrent_layers_are_timed_without_cudnn_and_others_compiled(
    gpu: ModuleType,
) -> None:
    first, _, recurrent = gpu.cases(toy=True)
    more = {"no cuDNN", *gpu.COMPILED, *gpu.REPLAYED}
    assert more & set(gpu.kinds_of(recurrent, "cuda:1")) == {"no cuDNN", *gpu.REPLAYED}
    assert more & set(gpu.kinds_of(first, "cuda:1")) == {*gpu.COMPILED, *gpu.REPLAYED}
    assert not more & set(gpu.kinds_of(recurrent, "cpu"))
    assert not more & set(gpu.kinds_of(first, "cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_steps_can_be_timed(gpu: ModuleType, precision: str) -> None:
    case = gpu.cases(toy=True)[0]
    for kind in gpu.COMPILED:
        cell = gpu.measure(case, precision, kind, "cpu", gpu.TOY_PACE)
        assert cell.step_ms is not None and not cell.reason, cell.reason


@pytest.mark.slow
def test_the_script_keeps_its_table(tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    refused = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 2 and "--toy" in refused.stderr
    run = subprocess.run(
        [*script, "--toy", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (data,), (text,) = tmp_path.glob("*-gpu-toy.json"), tmp_path.glob("*-gpu-toy.md")
    content = json.loads(data.read_text(encoding="utf-8"))
    _is_whole(content["rows"])
    assert content["command"].endswith(f"--toy --out {tmp_path}")
    assert content["machine"]["torch"] and content["machine"]["processor"]
    unmeasured = {row["kind"] for row in content["rows"] if row["step_ms"] is None}
    assert unmeasured <= {"FastDP"}
    assert run.stdout.strip() in text.read_text(encoding="utf-8")
