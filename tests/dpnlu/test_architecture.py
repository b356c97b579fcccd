"""Who may import whom. The table below is the order of the package; there is no other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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
    "runs": ("nlu", "mechanism", "training"),
    "compare": ("accounting", "nlu", "mechanism", "training", "runs"),
    "benchmark": ("gradients", "mechanism", "training", "runs"),
    "cli": ("accounting", "mechanism", "runs", "compare", "benchmark"),
}
MAY_IMPORT_ATTACKS = {"compare", "cli"}


def _imported(path: Path) -> Iterator[str]:
    """The absolute names that a file imports, wherever in the file it does."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*start, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _imports_of(package: str) -> list[tuple[str, str]]:
    """(module, name it imports), the module named by its first part inside the package."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return [
        (path.relative_to(ROOT / package).with_suffix("").parts[0], name)
        for path in files
        for name in _imported(path)
    ]


def _targets(name: str) -> list[str]:
    """["tape"] for "dpnlu.gradients.tape.Tape"; nothing for what is not dpnlu's."""
    parts = name.split(".")
    return parts[1:2] if parts[0] == "dpnlu" else []


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


@pytest.mark.parametrize(
    "module", ["dpnlu.mechanism.plan", "dpnlu.accounting.accountants", "dpnlu.mechanism.ledger"]
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
