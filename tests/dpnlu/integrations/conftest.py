"""What all tests of trainers share."""

from collections.abc import Iterator

import pytest
import transformers


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging = transformers.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    if has_bars:
        logging.enable_progress_bar()
