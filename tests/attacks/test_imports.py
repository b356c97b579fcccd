"""The numeric attacks need arrays only: importing them must load neither torch nor the trainer."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("attacks", ("numpy", "scipy", "sklearn", "torch", "dpnlu")),
        ("attacks.evaluation, attacks.canaries, attacks.membership", ("sklearn", "torch", "dpnlu")),
        ("attacks.blind", ("torch", "dpnlu")),
    ],
)
def test_import_is_light(modules, heavy):
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
