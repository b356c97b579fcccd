"""What `make demo` shows: without privacy a model that leaks, with it one that is of use."""

import json
import re
import shlex
from math import log2
from pathlib import Path
from statistics import fmean, median

import pytest

from dpnlu.cli.main import main

ROOT = Path(__file__).parents[2]


def _demo() -> list[str]:
    """The command's arguments, as the Makefile has them."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    words = shlex.split(recipe[1].replace("\\\n", " "))
    return words[words.index("compare") :]


@pytest.mark.slow
def test_the_demo_is_useful_with_privacy_and_leaks_without(tmp_path: Path) -> None:
    arguments = _demo()
    arguments[arguments.index("--out") + 1] = str(tmp_path / "demo")
    assert main([*arguments, "--quiet"]) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    ordinary, loose, strict = report["runs"]
    assert [run["target_epsilon"] for run in report["runs"]] == [None, 8, 2]
    assert ordinary["intent_accuracy"] >= 0.97 and ordinary["slot_f1"] >= 0.90
    assert loose["intent_accuracy"] >= 0.90 and loose["slot_f1"] >= 0.50
    assert strict["intent_accuracy"] > 0.60
    assert median(ranks(ordinary)) <= 5
    for private in (loose, strict):
        assert min(ranks(private)) > 5, "a secret is found"
        assert exposure(private) < exposure(ordinary) - 4
        assert private["second_epsilon"] == pytest.approx(private["epsilon"], rel=1e-3)
    assert lowest_area(ordinary) > 0.5
    assert strongest_area(ordinary) > strongest_area(loose) + 0.02


def ranks(run: dict) -> list[float]:
    return run["canary"]["ranks"]


def exposure(run: dict) -> float:
    """In bits, the mean over the models, of secrets among a thousand."""
    return fmean(log2(1000 / rank) for rank in ranks(run))


def lowest_area(run: dict) -> float:
    return max(attack["auc_interval"][0] for attack in run["membership"].values())


def strongest_area(run: dict) -> float:
    return max(attack["auc"] for attack in run["membership"].values())
