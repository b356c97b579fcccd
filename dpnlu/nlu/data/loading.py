"""From a data SPEC, as given on the command line, to a corpus."""

from collections.abc import Callable
from pathlib import Path

from dpnlu.nlu.data.clinc150 import load_clinc150
from dpnlu.nlu.data.errors import DataError
from dpnlu.nlu.data.hub import load_hub
from dpnlu.nlu.data.hwu64 import load_hwu64
from dpnlu.nlu.data.jsonl import load_jsonl
from dpnlu.nlu.data.records import Corpus
from dpnlu.nlu.data.snips import load_snips
from dpnlu.nlu.data.synthetic import DEFAULT_SIZE, synthetic_corpus
from dpnlu.nlu.data.table import load_table

SYNTHETIC = "synthetic"
HUB = "hf"


def load_corpus(spec: str, *, seed: int = 0) -> Corpus:
    """Load the corpus that `spec` names.

    Args:
        spec: One of `ACCEPTED_SPECS`.
        seed: Decides which synthetic corpus is made; files do not depend on it.

    Raises:
        DataError: `spec` has no known form, or the data it names are absent or damaged.
    """
    scheme, _, rest = spec.partition(":")
    if scheme == SYNTHETIC:
        return synthetic_corpus(_size(rest) if ":" in spec else DEFAULT_SIZE, seed=seed)
    if scheme == HUB and rest:
        return load_hub(rest)
    if scheme in LOADERS and rest:
        return LOADERS[scheme](_existing(rest))
    for suffix, load in LOADERS_BY_SUFFIX.items():
        if spec.endswith(suffix):
            return load(_existing(spec))
    raise DataError(
        f"Expected data as one of {', '.join(ACCEPTED_SPECS)}, got '{spec}'; use one form."
    )


def _size(text: str) -> int:
    """Return the N of `synthetic:N`."""
    # isdecimal alone would let digits of other scripts pass, at any length.
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise DataError(
            f"Expected synthetic:N with a whole number N, got 'synthetic:{text}'; "
            f"write for example synthetic:{DEFAULT_SIZE}."
        )
    return int(text)


def _existing(name: str) -> Path:
    """Return the path, refusing one that does not exist or cannot be."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
        reason = "none"
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home of nobody, no name
        reason = f"'{getattr(error, 'strerror', None) or error}'"
    raise DataError(f"{name}: expected an existing file or folder, got {reason}; check the path.")


LOADERS: dict[str, Callable[[Path], Corpus]] = {
    "snips": load_snips,
    "hwu64": load_hwu64,
    "clinc150": load_clinc150,
}

LOADERS_BY_SUFFIX: dict[str, Callable[[Path], Corpus]] = {
    ".jsonl": load_jsonl,
    ".jsonl.gz": load_jsonl,
    ".csv": load_table,
}

ACCEPTED_SPECS = (
    "synthetic[:N]",
    "snips:DIR",
    "hwu64:DIR",
    "clinc150:FILE",
    "FILE.jsonl[.gz]",
    "FILE.csv",
    "hf:NAME[:CONFIG]",
)
