"""Fixtures shared by the tests of `dpnlu.nlu.data`."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the published data sets, which are no part of the project."""
    beside = Path(__file__).parents[4] / "shared" / "data"
    folder = Path(os.environ.get("DPNLU_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no published data: set DPNLU_DATA to a folder with snips, hwu64, clinc150")
    return folder
