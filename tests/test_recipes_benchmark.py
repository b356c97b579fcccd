"""The benchmark of recipes: what a frozen encoder read once for all rows is what each row reads."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from dpnlu.nlu.data import load_corpus
from dpnlu.nlu.encoding import encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import new_classifier

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "row",
    [
        "recommended",
        "words alone, not the text",
        "and no neighbours",
        "and the last layer alone",
        "no means over words",
        "intents from zero, not from their names",
    ],
)
def test_a_row_is_given_what_its_own_model_reads(
    tiny_encoder: Path, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    recipes = import_module("recipes")
    corpus = load_corpus("synthetic:30", seed=0)
    settings = TrainSettings(data="synthetic:30", model=f"encoder:{tiny_encoder}", epsilon=8.0)
    recommended = recipes.recommended_for(corpus, settings)
    changes: dict[str, Any] = recipes.ROWS[row]
    architecture = replace(recommended.architecture, **changes)
    narrow = new_classifier(replace(recommended, architecture=architecture), seed=0)
    widest = new_classifier(recommended, seed=0)
    texts = recipes.Texts(corpus)
    examples = texts.examples("train")
    expected = read_once(narrow.model, narrow.encoding, encode_all(narrow.encoding, examples))
    found = texts.of("train", narrow, widest)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for field, value in other.items():
            torch.testing.assert_close(one[field], value)
    batch = narrow.encoding.collate(found[:3])
    assert narrow.model.per_example_loss(batch).isfinite().all()
