"""Progress: whoever asks for quiet hears nothing, of other libraries neither."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import transformers.utils.logging  # noqa: F401  now, and not while another test asks for quiet

from dpnlu.nlu.classifier import pretrained
from dpnlu.runs.progress import bars

VARIABLE = "HF_HUB_DISABLE_PROGRESS_BARS"


def test_bars_of_loading_are_silenced_for_a_while_only(
    tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.environ.get(VARIABLE)

    def shown() -> bool:
        capsys.readouterr()
        pretrained(str(tiny_encoder))
        return "Loading weights" in capsys.readouterr().err

    assert shown()
    with bars(quiet=True):
        assert not shown() and os.environ[VARIABLE] == "1", "for child processes"
    with bars(quiet=False):
        assert shown()
    assert os.environ.get(VARIABLE) == before


def test_bars_of_a_library_that_is_loaded_later_are_silenced_too(tiny_encoder: Path) -> None:
    script = f"""
        from dpnlu.runs.progress import bars
        with bars(quiet=True):
            from dpnlu.nlu.classifier import pretrained
            pretrained({str(tiny_encoder)!r})
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert not run.stderr
