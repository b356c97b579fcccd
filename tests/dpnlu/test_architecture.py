"""Who may import whom, and how long things may get.

The first table is the order of the package; there is no other. A list of exceptions holds what does
not meet a limit yet: a test fails when a name could leave it, so that it only gets shorter.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part stands on. Three towers stand on the ground: accounting, gradients and nlu.
PARTS = {
    "accounting": (),
    "gradients": (),
    "nlu": (),
    "mechanism": ("accounting",),
    "engines": ("gradients", "mechanism"),
    "training": ("mechanism", "engines"),
    "testing": ("mechanism", "engines", "training"),
    "runs": ("nlu", "mechanism", "training"),
    "integrations": ("mechanism", "training", "runs"),
    "compare": ("accounting", "nlu", "mechanism", "training", "runs"),
    "benchmark": ("gradients", "mechanism", "training", "runs"),
    "cli": ("accounting", "mechanism", "runs", "compare", "benchmark"),
}
MAY_IMPORT_ATTACKS = {"compare", "cli"}
MOST_PARTS_IN_A_CHAIN = 7

MOST_LINES, MOST_LINES_OF_A_BODY = 400, 40
IN_A_CIRCLE: set[frozenset[str]] = set()


@cache
def _modules() -> Mapping[str, Path]:
    """Dotted name -> file, of both packages."""
    files = [path for package in ("dpnlu", "attacks") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    return {_name(path): path for path in sorted(files)}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(path: Path) -> Iterator[str]:
    """The absolute names that a file imports, wherever in the file it does."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*start, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _imports_of(package: str) -> list[tuple[str, str]]:
    """(part, name it imports), the part being the first name inside the package."""
    return [
        (path.relative_to(ROOT / package).with_suffix("").parts[0], name)
        for path in _modules().values()
        if path.is_relative_to(ROOT / package)
        for name in _imported(path)
    ]


def _targets(name: str) -> list[str]:
    """["gradients"] for "dpnlu.gradients.tape.Tape"; nothing for what is not dpnlu's."""
    parts = name.split(".")
    return parts[1:2] if parts[0] == "dpnlu" else []


def _module_of(name: str) -> str | None:
    """Of "dpnlu.gradients.tape.Tape", "dpnlu.gradients.tape"; None for what is not ours."""
    while name and name not in _modules():
        name = name.rpartition(".")[0]
    return name or None


# ---- parts -----------------------------------------------------------------------------------


def test_attacks_never_import_dpnlu():
    assert not [pair for pair in _imports_of("attacks") if pair[1].split(".")[0] == "dpnlu"]


def test_only_the_study_and_the_command_line_import_attacks():
    importers = {m for m, name in _imports_of("dpnlu") if name.split(".")[0] == "attacks"}
    assert importers <= MAY_IMPORT_ATTACKS


def test_every_module_belongs_to_a_part():
    assert {part for part, _ in _imports_of("dpnlu")} - {"__init__"} == set(PARTS)


def test_a_part_imports_only_those_it_stands_on():
    arrows = {
        (part, target)
        for part, name in _imports_of("dpnlu")
        if part in PARTS
        for target in _targets(name)
        if target != part
    }
    assert arrows == {(part, below) for part, all_below in PARTS.items() for below in all_below}


def test_no_part_stands_on_itself():
    order = list(PARTS)
    for part, below in PARTS.items():
        assert all(order.index(one) < order.index(part) for one in below)


def test_the_house_has_few_floors():
    height: dict[str, int] = {}
    for part, below in PARTS.items():
        height[part] = 1 + max((height[one] for one in below), default=0)
    assert height["cli"] == max(height.values()) <= MOST_PARTS_IN_A_CHAIN


# ---- modules ---------------------------------------------------------------------------------


def test_no_imports_go_in_circles_between_modules():
    """Imports inside functions count: what is put off goes round all the same."""
    graph = {
        name: {
            target
            for imported in _imported(path)
            if (target := _module_of(imported)) is not None and target != name
        }
        for name, path in _modules().items()
    }
    assert _circles(graph) == IN_A_CIRCLE


def _circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The modules of every circle; takes the arrows of each out of the graph to find the next."""
    found = set()
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]  # each is imported by the next
            found.add(frozenset(circle))
            for imported, importer in pairwise(circle):
                graph[importer].discard(imported)
        else:
            return found


def test_a_circle_is_seen():
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    assert _circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


# ---- lengths ---------------------------------------------------------------------------------


def test_no_module_is_too_long_to_be_read_at_once():
    long = {
        path.relative_to(ROOT).as_posix()
        for path in _modules().values()
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    }
    assert not long


def test_no_function_is_too_long_to_be_read_at_once():
    long = {
        f"{name}.{function.name}"
        for name, path in _modules().items()
        for function in ast.walk(_tree(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        if _lines_of_body(function) > MOST_LINES_OF_A_BODY
    }
    assert not long


def _lines_of_body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement after the docstring to the last, comments and blanks included."""
    after = function.body[ast.get_docstring(function) is not None :]
    return after[-1].end_lineno - after[0].lineno + 1 if after else 0


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(): return 1", 1),
        ('def f():\n    """One.\n\n    Two.\n    """', 0),
        ('def f():\n    """One."""\n    a = 1\n\n    # why\n    return (\n        a\n    )', 6),
    ],
)
def test_docstrings_do_not_count_as_body(source, lines):
    (function,) = ast.parse(source).body
    assert _lines_of_body(function) == lines


# ---- what is loaded --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "dpnlu",
        "dpnlu.accounting",
        "dpnlu.accounting.accountants",
        "dpnlu.mechanism.plan",
        "dpnlu.mechanism.ledger",
    ],
)
def test_the_mechanism_as_data_needs_neither_torch_nor_an_accountant(module):
    code = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'dp_accounting', 'opacus', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"
