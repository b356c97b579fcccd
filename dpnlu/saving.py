"""A trained model as a directory, and back. Nothing is pickled.

model.safetensors     the weights
config.json           what to build, and the SHA-256 of every other file
vocabulary.json       how text becomes numbers; for encoders tokenizer/ and encoder/
plan.json             the privacy plan; absent after ordinary training
ledger.jsonl          what was released; likewise
metrics.json          how well it does, and what it took
README.md             the model card, with the ε statement
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dpnlu.classifier import Architecture, Classifier, assemble
from dpnlu.data import vocabulary_from_dict
from dpnlu.encoding import Labels, SubwordEncoding, WordEncoding
from dpnlu.fitting import Recipe
from dpnlu.plan import PrivacyPlan

CONFIG, WEIGHTS, PLAN, LEDGER, METRICS, CARD = (
    "config.json",
    "model.safetensors",
    "plan.json",
    "ledger.jsonl",
    "metrics.json",
    "README.md",
)
# What an unfinished training keeps here; no part of the model.
RUN, CHECKPOINT = "run.json", "checkpoint.safetensors"
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
    """

    classifier: Classifier
    recipe: Recipe
    plan: PrivacyPlan | None
    metrics: dict[str, Any]


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

    The configuration is written last: a directory without one is not a model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in classifier.model.state_dict().items()}
    save_file(weights, directory / WEIGHTS)
    _save_encoding(classifier, directory)
    if plan is not None:
        write_json(directory / PLAN, plan.to_dict())
    write_json(directory / METRICS, metrics)
    (directory / CARD).write_text(card, encoding="utf-8")
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
    return SavedModel(classifier=classifier, recipe=recipe, plan=plan, metrics=metrics)


def is_model(directory: Path) -> bool:
    """Whether a complete model is there."""
    return (directory / CONFIG).exists()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there either as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


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
        encoding.tokenizer.save_pretrained(directory / _TOKENIZER)
        encoder: Any = classifier.model.get_submodule("encoder")
        encoder.config.save_pretrained(directory / _ENCODER)


def _load_encoding(architecture: Architecture, directory: Path) -> dict[str, Any]:
    if not architecture.is_encoder:
        return {"vocabulary": vocabulary_from_dict(read_json(directory / _VOCABULARY))}
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = AutoConfig.from_pretrained(directory / _ENCODER)
    return {
        "encoder": AutoModel.from_config(config),  # type: ignore[no-untyped-call]
        "tokenizer": AutoTokenizer.from_pretrained(directory / _TOKENIZER),
    }


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
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path not in (directory / name for name in (CONFIG, RUN, CHECKPOINT))
    }


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
