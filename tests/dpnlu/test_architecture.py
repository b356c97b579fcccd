"""Who may import whom. The table below is the order of the package; there is no other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module, or a package taken as a whole, imports only from those before it.
ORDER = (
    "durable",
    "ranges",
    "privacy_loss",
    "composition",
    "pld",
    "accounting",
    "clipping",
    "plan",
    "ledger",
    "sampling",
    "noise",
    "loader",
    "errors",
    "rounding",
    "products",
    "gradients",
    "uses",
    "layout",
    "packing",
    "trace",
    "signature",
    "operations",
    "provenance",
    "tape",
    "rules",
    "validation",
    "clipped",
    "checks",
    "verification",
    "batches",
    "independence",
    "moment",
    "engines",
    "tracing",
    "compiled",
    "sums",
    "training",
    "progress",
    "resources",
    "data",
    "models",
    "encoding",
    "fingerprint",
    "frozen",
    "classifier",
    "evaluation",
    "checkpoint",
    "fitting",
    "budget",
    "saving",
    "directory",
    "card",
    "experiment",
    "defaults",
    "release",
    "benchmark",
    "compare",
    "cli",
)
# What knows texts, labels and models knows nothing of privacy.
TASK = ("data", "models", "encoding", "classifier", "evaluation")
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


def test_every_module_has_its_place():
    modules = {module for module, _ in _imports_of("dpnlu")} - {"__init__"}
    assert modules <= set(ORDER), "add the new module to ORDER"


def test_a_module_imports_only_from_those_before_it():
    place = {name: index for index, name in enumerate(ORDER)}
    pairs = [
        (module, target)
        for module, name in _imports_of("dpnlu")
        if module in place
        for target in _targets(name)
        if target != module
    ]
    assert ("training", "engines") in pairs  # the search finds something
    assert not [pair for pair in pairs if place.get(pair[1], len(ORDER)) >= place[pair[0]]]


def test_data_and_models_know_nothing_of_privacy():
    engine = set(ORDER[: ORDER.index("data")])
    found = [(m, t) for m, name in _imports_of("dpnlu") if m in TASK for t in _targets(name)]
    assert not [pair for pair in found if pair[1] in engine]


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
