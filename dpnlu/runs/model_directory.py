"""A trained model as a directory, and back. Nothing is pickled.

model.safetensors     the weights
config.json           what to build, and the SHA-256 of every other file
vocabulary.json       how text becomes numbers; for encoders tokenizer/ and encoder/
plan.json             the privacy plan; absent after ordinary training
ledger.jsonl          what was released; likewise
selection.json        of which trainings it is the best; absent if there was one
metrics.json          how well it does, and what it took
README.md             the model card, with the ε statement
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dpnlu.mechanism.durable import (
    make_directory,
    remove_partials,
    replacing,
    sync_tree,
    write_json,
    write_text,
)
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.selection import Selection
from dpnlu.nlu.classifier import Architecture, Classifier, assemble
from dpnlu.nlu.data import vocabulary_from_dict
from dpnlu.nlu.encoding import Labels, SubwordEncoding, WordEncoding
from dpnlu.training.loop import Recipe

CONFIG, WEIGHTS, PLAN, LEDGER, METRICS, CARD = (
    "config.json",
    "model.safetensors",
    "plan.json",
    "ledger.jsonl",
    "metrics.json",
    "README.md",
)
SELECTION = "selection.json"
# What an unfinished training keeps here, or a choice among several; no part of the model.
RUN, CHECKPOINT = "run.json", "checkpoint.safetensors"
TRIALS, TRIAL = "trials.json", "trials"
_VOCABULARY, _TOKENIZER, _ENCODER = "vocabulary.json", "tokenizer", "encoder"
_FORMAT = 1


class ModelDirectoryError(ValueError):
    """A directory that holds no model, something else, or a model that was changed."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a model directory holds.

    Attributes:
        plan: None after ordinary training.
        metrics: accuracy, time, and ε if there is one.
        selection: of which trainings it is the best; None: there was one.
    """

    classifier: Classifier
    recipe: Recipe
    plan: PrivacyPlan | None
    metrics: dict[str, Any]
    selection: Selection | None = None


def save(
    classifier: Classifier,
    directory: Path,
    *,
    recipe: Recipe,
    plan: PrivacyPlan | None,
    metrics: Mapping[str, Any],
    card: str,
) -> None:
    """Complete a model directory; the ledger, if any, is there already.

    The configuration is written last, when all else is on disk: a directory without one is not a
    model. What an earlier call left that was killed is written anew.
    """
    make_directory(directory)
    remove_partials(directory)
    weights = {name: tensor.contiguous() for name, tensor in classifier.model.state_dict().items()}
    with replacing(directory / WEIGHTS) as partial:
        save_file(weights, partial)
    _save_encoding(classifier, directory)
    if plan is not None:
        write_json(directory / PLAN, plan.to_dict())
    write_json(directory / METRICS, metrics)
    write_text(directory / CARD, card)
    labels = classifier.encoding.labels
    config = {
        "format": _FORMAT,
        "architecture": classifier.architecture.to_dict(),
        "intents": labels.intents,
        "tags": labels.tags,
        "recipe": asdict(recipe),
        "files": _digests(directory),
    }
    write_json(directory / CONFIG, config | {"digest": _digest(config)})


def load(directory: Path) -> SavedModel:
    """Read a model directory.

    Raises:
        ModelDirectoryError: it holds no model, or a file was changed, added or removed.
    """
    config = _checked_config(directory)
    architecture = Architecture(**config["architecture"])
    labels = Labels(tuple(config["intents"]), tuple(config["tags"]))
    classifier = assemble(architecture, labels, **_load_encoding(architecture, directory))
    classifier.model.load_state_dict(load_file(directory / WEIGHTS))
    plan_file = directory / PLAN
    plan = PrivacyPlan.from_dict(read_json(plan_file)) if plan_file.exists() else None
    recipe = Recipe(**config["recipe"])
    metrics = read_json(directory / METRICS)
    return SavedModel(
        classifier=classifier,
        recipe=recipe,
        plan=plan,
        metrics=metrics,
        selection=_selection(directory),
    )


def _selection(directory: Path) -> Selection | None:
    path = directory / SELECTION
    if not path.exists():
        return None
    content = read_json(path)
    return Selection(trials=content["trials"], number=content["number"])


def export(classifier: Classifier, directory: Path) -> None:
    """Write encoder and tokenizer as transformers loads them, and the heads beside them.

    Args:
        classifier: with an encoder.
        directory: is there, and empty.
    """
    encoding, encoder = classifier.encoding, classifier.model.get_submodule("encoder")
    assert isinstance(encoding, SubwordEncoding)
    written: Any = encoder
    written.save_pretrained(directory)
    encoding.tokenizer.save_pretrained(directory)
    heads = {
        name: tensor.contiguous()
        for name, tensor in classifier.model.state_dict().items()
        if not name.startswith("encoder.")
    }
    save_file(heads, directory / "heads.safetensors")
    labels = {"intents": encoding.labels.intents, "tags": encoding.labels.tags}
    write_json(directory / "heads.json", labels)
    sync_tree(directory)


def is_model(directory: Path) -> bool:
    """Whether a complete model is there."""
    return (directory / CONFIG).exists()


def read_json(path: Path) -> Any:
    """Read a file of a model directory.

    Raises:
        ModelDirectoryError: there is none, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"Expected a JSON file at {path}: {error}") from None


def _save_encoding(classifier: Classifier, directory: Path) -> None:
    encoding = classifier.encoding
    if isinstance(encoding, WordEncoding):
        write_json(directory / _VOCABULARY, encoding.vocabulary.to_dict())
    elif isinstance(encoding, SubwordEncoding):
        encoder: Any = classifier.model.get_submodule("encoder")
        for name, part in ((_TOKENIZER, encoding.tokenizer), (_ENCODER, encoder.config)):
            shutil.rmtree(directory / name, ignore_errors=True)
            part.save_pretrained(directory / name)
            sync_tree(directory / name)


def _load_encoding(architecture: Architecture, directory: Path) -> dict[str, Any]:
    if not architecture.is_encoder:
        return {"vocabulary": vocabulary_from_dict(read_json(directory / _VOCABULARY))}
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    # Never code from the directory: whoever made it would run it here.
    own = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(directory / _ENCODER, **own)
        encoder = AutoModel.from_config(config, **own)  # type: ignore[no-untyped-call]
        tokenizer = AutoTokenizer.from_pretrained(directory / _TOKENIZER, **own)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelDirectoryError(
            f"Expected an encoder and a tokenizer without code of their own in {directory}, but "
            f"they cannot be loaded: {reason}"
        ) from None
    return {"encoder": encoder, "tokenizer": tokenizer}


def _checked_config(directory: Path) -> dict[str, Any]:
    if not is_model(directory):
        raise ModelDirectoryError(
            f"Expected a trained model in {directory}, found no {CONFIG}; train one with "
            "`dpnlu train`."
        )
    config: dict[str, Any] = read_json(directory / CONFIG)
    if not isinstance(config, dict) or config.pop("digest", None) != _digest(config):
        raise ModelDirectoryError(_changed(directory, CONFIG))
    found, expected = _digests(directory), config["files"]
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ModelDirectoryError(_changed(directory, name))
    return config


def _changed(directory: Path, name: str) -> str:
    return (
        f"Expected {directory} as it was saved, but {name} was changed, added or removed since; "
        "its ε statement no longer holds: restore the file, or train again."
    )


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of the model but the configuration."""
    others = [directory / name for name in (CONFIG, RUN, CHECKPOINT, TRIALS)]
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path not in others and directory / TRIAL not in path.parents
    ]
    return {path.relative_to(directory).as_posix(): _digest_of_file(path) for path in files}


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
