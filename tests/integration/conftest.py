"""What studies at toy size have in common."""

import os
from collections.abc import Iterator

import pytest

from dpnlu.compare import extracting, reading


@pytest.fixture(scope="module")
def quick_studies() -> Iterator[None]:
    """References are trained in this process, as starting others takes longer than training; and
    losses under dropout are means over few masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(reading, "_MASKS", 20)
        patch.setitem(extracting.objective_for.__kwdefaults__, "masks", 5)
        yield
