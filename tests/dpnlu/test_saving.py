"""Model directories: what is saved comes back, and changes are noticed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dpnlu.mechanism import durable
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Architecture, Classifier, build
from dpnlu.nlu.data import Example, HashedVocabulary, fitted_vocabulary
from dpnlu.nlu.encoding import Labels, encode_all
from dpnlu.runs import model_directory as saving
from dpnlu.runs.model_directory import ModelDirectoryError, load, save
from dpnlu.training.loop import Recipe

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


def test_what_a_killed_process_left_is_no_part_of_the_model(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """Neither a half-written file nor what is kept of an unfinished training."""
    classifier = _build("encoder", tiny_encoder)
    for name in ("config.json.partial", "tokenizer/half", "run.json", "checkpoint.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{")
    save(classifier, tmp_path, recipe=RECIPE, plan=PLAN, metrics={}, card="")
    assert not {"config.json.partial", "half"} & {path.name for path in tmp_path.rglob("*")}
    load(tmp_path)
    for name in ("run.json", "checkpoint.safetensors"):
        (tmp_path / name).unlink()
    load(tmp_path)


def test_all_of_a_model_is_on_disk_before_its_configuration(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    really = durable.sync

    def sync(path: Path) -> None:
        if path.parent.name == "config.json.partial":
            others = set(tmp_path.rglob("*")) - {path, path.parent}
            assert {place.name for place in others} <= synced
        synced.add(path.name)
        really(path)

    monkeypatch.setattr(durable, "sync", sync)
    classifier = _build("encoder", tiny_encoder)
    save(classifier, tmp_path, recipe=RECIPE, plan=PLAN, metrics={}, card="")
    assert {"config.json", "model.safetensors", "tokenizer.json", "encoder"} <= synced


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


# ---- code in a directory -----------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import BertConfig, BertModel, BertTokenizerFast
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
class OwnTokenizer(BertTokenizerFast):
    pass
"""
MAPS = {
    "config.json": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
}
UNKNOWN = {"config.json": {"model_type": "own"}, "tokenizer_config.json": {"tokenizer_class": "O"}}


@dataclass
class Code:
    """Code that a directory brings along, and whether it was run or asked about."""

    mark: Path
    questions: list[str]

    def put_into(self, folder: Path, file: str, *, is_known: bool) -> None:
        """`is_known`: transformers could do without the code."""
        for place in folder.rglob(file):
            if place == folder / "config.json" and (folder / "encoder").exists():
                continue  # it is ours
            content = json.loads(place.read_text(encoding="utf-8")) | {"auto_map": MAPS[file]}
            content |= {} if is_known else UNKNOWN[file]
            place.write_text(json.dumps(content), encoding="utf-8")
            code = CODE.format(mark=str(self.mark))
            (place.parent / "own.py").write_text(code, encoding="utf-8")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Code:
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or "y")
    return Code(tmp_path / "was-run", questions)


def _sign_again(home: Path) -> None:
    """What somebody who wants the code to be run would do."""
    config = json.loads((home / "config.json").read_text(encoding="utf-8"))
    del config["digest"]
    config["files"] = saving._digests(home)
    config["digest"] = saving._digest(config)
    (home / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("file", MAPS)
def test_code_in_a_model_directory_is_never_run(
    tmp_path: Path, tiny_encoder: Path, code: Code, file: str, is_known: bool
) -> None:
    home = tmp_path / "m"
    classifier = _build("encoder", tiny_encoder)
    save(classifier, home, recipe=RECIPE, plan=PLAN, metrics={}, card="")
    code.put_into(home, file, is_known=is_known)
    _sign_again(home)
    try:
        load(home)
    except ModelDirectoryError as error:
        assert not is_known and "\n" not in str(error)
    assert not code.mark.exists() and not code.questions


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("file", MAPS)
def test_code_that_comes_with_an_encoder_is_never_run(
    tmp_path: Path, tiny_encoder: Path, code: Code, file: str, is_known: bool
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    code.put_into(folder, file, is_known=is_known)
    try:
        _build("encoder", folder)
    except ValueError as error:
        assert not is_known and "\n" not in str(error)
    assert not code.mark.exists() and not code.questions
