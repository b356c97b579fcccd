"""What the documents say is so: links lead somewhere, commands parse, figures are in the files."""

import argparse
import ast
import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest

import dpnlu
from attacks.membership import ATTACKS
from dpnlu.cli import main as command_line
from dpnlu.nlu.data.loading import ACCEPTED_SPECS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *RESULTS.rglob("*.md")])
README = ROOT / "README.md"
# As published by the Apache Software Foundation, https://www.apache.org/licenses/LICENSE-2.0.txt.
LICENCE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"

# Announced in the documents before they are there: a test fails when one could leave its set.


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _blocks(path: Path, language: str) -> list[str]:
    """What stands between ```language and ```."""
    return re.findall(rf"^```{language}\n(.*?)^```$", _text(path), flags=re.MULTILINE | re.DOTALL)


def _prose(path: Path) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", _text(path), flags=re.MULTILINE | re.DOTALL)


# ---- links -----------------------------------------------------------------------------------


def _links(path: Path) -> list[str]:
    """The targets of links and pictures that lead to files here."""
    found = re.findall(r"\]\(([^()\s]+)\)", _prose(path))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def _anchors(path: Path) -> set[str]:
    """What # may name: each heading in lower case, blanks as hyphens, without punctuation."""
    headings = re.findall(
        r"^#+ +(.+)$", re.sub(r"^```.*?^```$", "", _text(path), flags=re.M | re.S), re.M
    )
    return {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def _broken(path: Path) -> Iterator[str]:
    for link in _links(path):
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or not target.is_relative_to(ROOT):
            yield link
        elif anchor and anchor not in _anchors(target):
            yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    assert list(_broken(path)) == []


def test_a_broken_link_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# It's here\n[a](page.md#its-here) [b](#there) ![c](no.png) [d](../x) `[e](f)`\n"
    )
    assert list(_broken(page)) == ["#there", "no.png", "../x"]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, new = set(), {README}
    while new:
        reached |= new
        pages = {p for p in new if p.suffix == ".md"}
        new = {
            (page.parent / unquote(link).partition("#")[0]).resolve()
            for page in pages
            for link in _links(page)
            if not link.startswith("#")
        } - reached
    assert set(DOCUMENTS) <= reached


# ---- lengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("README.md", 150), ("docs/glossary.md", 25)])
def test_what_is_read_first_is_short(name: str, most: int) -> None:
    assert len(_text(ROOT / name).splitlines()) <= most


# ---- commands and code -----------------------------------------------------------------------


def _commands() -> list[str]:
    """The dpnlu commands of the blocks without a language."""
    lines = [
        line.partition("  #")[0].strip()
        for path in (README, *(ROOT / "docs").glob("*.md"))
        for block in _blocks(path, "")
        for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("dpnlu ")]


def _known_commands() -> set[str]:
    (choices,) = (
        action.choices
        for action in command_line._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return set(choices)


@pytest.mark.parametrize("command", sorted(set(_commands())))
def test_the_commands_in_the_documents_parse(command: str) -> None:
    name, *arguments = shlex.split(command)[1:]
    assert command_line._parser().parse_args([name, *arguments]).command == name


def test_every_command_is_in_the_page_about_the_command_line() -> None:
    titles = re.findall(r"^## dpnlu (\w+)$", _text(ROOT / "docs" / "command-line.md"), re.M)
    assert set(titles) == _known_commands()


def test_the_page_about_data_has_every_form_of_a_spec() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", _text(ROOT / "docs" / "data.md"), re.M)
    assert rows[: len(ACCEPTED_SPECS)] == list(ACCEPTED_SPECS)


def test_the_page_about_the_command_line_has_every_attack() -> None:
    text = _text(ROOT / "docs" / "command-line.md")
    assert [
        name for name in (*ATTACKS, "exposure", "extraction", "audit") if f"`{name}`" not in text
    ] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_in_the_documents_uses_names_that_are_there(path: Path) -> None:
    used = set(re.findall(r"\bdpnlu\.(\w+)\(", _text(path)))
    for block in _blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                if "lightning" in str(node.module):
                    pytest.importorskip("lightning", reason="needs the extra `lightning`")
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
    missing = {name.partition(".")[0] for name in used} - set(dpnlu.__all__)
    assert not missing


def test_the_places_for_additions_are_there() -> None:
    table = re.search(r"\| what \| file \| line \|\n.*?\n\n", _text(README), re.S)
    assert table is not None
    rows = [re.findall(r"`([^`]+)`", row) for row in table[0].strip().splitlines()[2:]]
    assert len(rows) == 4
    for file, name, *register in rows:
        folder = (ROOT / file).parent if "NAME" in file else (ROOT / file)
        assert folder.exists()
        home = ROOT / (register[0] if register else file)
        assert re.search(rf"^{name}\b", _text(home), re.M), f"no {name} in {home}"


# ---- figures ---------------------------------------------------------------------------------


def _rows_with_a_file() -> list[tuple[str, Path, list[str]]]:
    """(name, dated file, figures) of the README's tables."""
    rows = []
    for line in _text(README).splitlines():
        link = re.search(r"\((benchmarks/results/\d[^)]*\.md)\) \|$", line)
        if line.startswith("|") and link:
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")][:-1]
            rows.append((name, ROOT / link[1], [cell for cell in cells if cell]))
    return rows


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.parametrize(("name", "file", "figures"), _rows_with_a_file())
def test_figures_in_the_readme_are_those_of_the_file(
    name: str, file: Path, figures: list[str]
) -> None:
    """As far as they are written out; a lower bound is rounded down."""
    measured = list(_numbers(json.loads(_text(file.with_suffix(".json")))))
    assert figures
    for figure in figures:
        digits = len(figure.partition(".")[2])
        assert digits >= 2, "too few digits to be told from others"
        step = 10.0**-digits
        lower, upper = (0.0, step) if name.startswith("audit") else (-step / 2, step / 2)
        assert any(
            float(figure) + lower - 1e-9 <= value <= float(figure) + upper + 1e-9
            for value in measured
        ), f"{figure} is not in {file.name}"


def test_the_readme_has_figures() -> None:
    assert len(_rows_with_a_file()) >= 5


# ---- what goes with the code -----------------------------------------------------------------


def test_the_licence_is_complete() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == LICENCE


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads(_text(ROOT / "pyproject.toml"))["project"]
    citation = _text(ROOT / "CITATION.cff")
    for key in ("version", "license"):
        assert f"\n{key}: {project[key]}\n" in citation
