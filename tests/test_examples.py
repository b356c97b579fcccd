"""Every example runs, and says what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAYS = {
    "private_loop.py": "ε = ",
    "user_level.py": "for each user",
    "huggingface_trainer.py": "ε = ",
    "accelerate_loop.py": "ε = ",
    "two_processes.py": "ε = ",
    "lightning_trainer.py": "ε = ",
    "attack_your_model.py": "LiRA: AUC",
}
# What not everybody has; its own warnings are no errors of ours.
NEEDS = {"lightning_trainer.py": "lightning"}


def test_no_example_is_forgotten() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str) -> None:
    if (needed := NEEDS.get(name)) is not None:
        pytest.importorskip(needed, reason=f"needs the extra `{needed}`")
    run = subprocess.run(
        [sys.executable, *(["-W", "error"] if name not in NEEDS else []), ROOT / "examples" / name],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert SAYS[name] in run.stdout
