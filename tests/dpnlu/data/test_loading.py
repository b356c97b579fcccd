"""Data SPECs, and what the package may import."""

import ast
import os
import sys
from pathlib import Path

import pytest

import dpnlu.nlu.data
from dpnlu.nlu.data import ACCEPTED_SPECS, DataError, load_corpus

# Each format's own test loads it by its SPEC; here are the SPECs that lead nowhere.


def test_synthetic_sizes() -> None:
    assert len(load_corpus("synthetic").examples) == 2_000
    assert len(load_corpus("synthetic:50").examples) == 50


@pytest.mark.parametrize(
    "spec", ["", ":", "snip:x", "snips", "snips:", "hf:", "a.txt", "synthetics"]
)
def test_an_unknown_spec_is_answered_with_all_forms(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        load_corpus(spec)
    assert all(form in str(caught.value) for form in ACCEPTED_SPECS)
    assert f"got '{spec}'" in str(caught.value)


@pytest.mark.parametrize("size", ["", "x", "-5", "1.5", "²", "٣٠", "9" * 5_000])
def test_a_size_that_is_no_number(size: str) -> None:
    with pytest.raises(DataError, match="synthetic:N with a whole number N"):
        load_corpus(f"synthetic:{size}")


@pytest.mark.parametrize(
    "spec", ["snips:{}", "hwu64:{}", "clinc150:{}", "{}.jsonl", "{}.jsonl.gz", "{}.csv"]
)
def test_a_path_that_does_not_exist(tmp_path: Path, spec: str) -> None:
    with pytest.raises(DataError, match=r"none.*: expected an existing file or folder"):
        load_corpus(spec.format(tmp_path / "none"))


@pytest.mark.parametrize(
    "name",
    ["~nosuchuser/x", "a" * 5_000, "a" * 300, "x\0y", "~x\0y", "\ud800", "~\ud800", "/dev/null/x"],
    ids=lambda name: ascii(name[:20]),
)
@pytest.mark.parametrize("spec", ["snips:{}", "hwu64:{}", "clinc150:{}", "{}.jsonl", "{}.csv"])
def test_a_path_that_cannot_be(name: str, spec: str) -> None:
    with pytest.raises(DataError, match="expected an existing file or folder, got") as caught:
        load_corpus(spec.format(name))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("spec", ["clinc150:{}", "{}.jsonl", "{}.csv"])
def test_a_pipe_where_a_file_is_due(tmp_path: Path, spec: str) -> None:
    given = spec.format(tmp_path / "pipe")
    os.mkfifo(given.removeprefix("clinc150:"))
    with pytest.raises(DataError, match="expected a regular file, got a pipe"):
        load_corpus(given)


def test_a_folder_where_a_file_is_due(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Is a directory"):
        load_corpus(f"clinc150:{tmp_path}")


def _imports(path: Path) -> set[str]:
    """Return the top-level names of all packages that a module imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name if name.startswith("dpnlu") else name.partition(".")[0] for name in names}


def test_the_package_needs_only_the_standard_library_and_itself() -> None:
    for path in Path(dpnlu.nlu.data.__file__).parent.glob("*.py"):
        foreign = {
            name
            for name in _imports(path)
            if name not in sys.stdlib_module_names and not name.startswith("dpnlu.nlu.data")
        }
        assert foreign == ({"datasets"} if path.name == "hub.py" else set()), path.name
