"""Model directories: what is saved comes back, and changes are noticed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpnlu.classifier import Architecture, Classifier, build
from dpnlu.data import Example, HashedVocabulary, fitted_vocabulary
from dpnlu.encoding import Labels, encode_all
from dpnlu.fitting import Recipe
from dpnlu.plan import PrivacyPlan
from dpnlu.saving import ModelDirectoryError, load, save

LABELS = Labels(("ask", "tell"), ("B-x", "O"))
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.01)
PLAN = PrivacyPlan(
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    sample_rate=0.1,
    steps=10,
    target_delta=1e-3,
    num_examples=100,
)
EXAMPLE = Example(
    id="1", text="a b", tokens=("a", "b"), tags=("O", "B-x"), intent="ask", split="train"
)


def _build(kind: str, encoder: Path) -> Classifier:
    if kind == "encoder":
        return build(Architecture(name=f"encoder:{encoder}"), LABELS, HashedVocabulary(9))
    words = HashedVocabulary(9) if kind == "hashed" else fitted_vocabulary([EXAMPLE])
    return build(Architecture(name="lstm", character_filters=2), LABELS, words)


@pytest.fixture(params=["hashed", "fitted", "encoder"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, tiny_encoder: Path) -> Path:
    classifier = _build(request.param, tiny_encoder)
    save(classifier, tmp_path / "m", recipe=RECIPE, plan=PLAN, metrics={"x": 0.5}, card="# card")
    return tmp_path / "m"


@pytest.mark.parametrize("kind", ["hashed", "fitted", "encoder"])
def test_a_model_comes_back_as_it_was(kind: str, tmp_path: Path, tiny_encoder: Path) -> None:
    classifier = _build(kind, tiny_encoder)
    save(classifier, tmp_path, recipe=RECIPE, plan=PLAN, metrics={"x": 0.5}, card="# card")
    loaded = load(tmp_path)
    assert (loaded.plan, loaded.recipe, loaded.metrics) == (PLAN, RECIPE, {"x": 0.5})
    assert loaded.classifier.architecture == classifier.architecture
    losses = [
        built.model.eval().per_example_loss(
            built.encoding.collate(encode_all(built.encoding, [EXAMPLE]))
        )
        for built in (classifier, loaded.classifier)
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_nothing_is_pickled(saved: Path) -> None:
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt", ".jinja"}


def _edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": lambda home: _edit(home / "model.safetensors"),
    "plan": lambda home: _edit(home / "plan.json"),
    "plan removed": lambda home: (home / "plan.json").unlink(),
    "metrics": lambda home: _edit(home / "metrics.json"),
    "card": lambda home: _edit(home / "README.md"),
    "file added": lambda home: (home / "notes.txt").write_text("?", encoding="utf-8"),
    "ledger added": lambda home: (home / "ledger.jsonl").write_text("", encoding="utf-8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_hand_is_refused(change: str, saved: Path) -> None:
    CHANGES[change](saved)
    with pytest.raises(ModelDirectoryError, match="was changed, added or removed"):
        load(saved)


def test_a_changed_configuration_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["intents"].reverse()
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelDirectoryError, match=r"config\.json"):
        load(saved)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDirectoryError, match="train one"):
        load(tmp_path)


def test_a_configuration_that_is_not_json_is_refused(saved: Path) -> None:
    (saved / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelDirectoryError, match=r"JSON file at .*config\.json"):
        load(saved)
