"""How many weights of a pretrained encoder to train privately: weights against accuracy.

    python benchmarks/frontier.py --data snips:DIR --model encoder:NAME --epsilons 8 2 --out DIR

In every row heads are trained as `dpnlu train` recommends them, which read the encoder's layers; in
all but the first some of the encoder's own weights are trained with them, at a tenth of the rate.
Epochs and batch are the same in all rows and fewer than recommended for heads alone, whose texts an
encoder reads but once. What was measured is kept in the JSON file, and not measured again. Noise
comes from the seed: no model here is to be published.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from recipes import SPLITS, recommended_for
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import dpnlu
from dpnlu.cli.benchmark import processor
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, load_corpus
from dpnlu.nlu.encoding import encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.metrics import evaluate
from dpnlu.nlu.models import EncoderClassifier
from dpnlu.runs.experiment import plan_for
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import new_classifier
from dpnlu.training.loop import Recipe

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MEASURES = {"intent_accuracy": "intent accuracy", "slot_f1": "slot F1"}
# Of the rate of the heads, which start at zero: what is pretrained learns slower.
ENCODER_RATE = 0.1
PHYSICAL = 64
# So much of an accuracy's scale is shown at least: one seed moves it by a hundredth.
LEAST_SHOWN = 0.1


def _nothing(encoder: nn.Module) -> None:
    encoder.requires_grad_(False)


def _named(*parts: str) -> Callable[[nn.Module], None]:
    """Train the weights whose names have one of the parts; never the embeddings."""

    def choose(encoder: nn.Module) -> None:
        for name, parameter in encoder.named_parameters():
            is_read = not name.startswith(("embeddings", "pooler"))
            parameter.requires_grad_(is_read and any(part in name for part in parts))

    return choose


def _last_layer(encoder: nn.Module) -> None:
    config: Any = encoder.config
    _named(f"layer.{config.num_hidden_layers - 1}.")(encoder)


def _lora(encoder: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    _nothing(encoder)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=["query", "value"]), encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


# What of the encoder is trained beside the heads.
ROWS: dict[str, Callable[[nn.Module], None]] = {
    "heads alone": _nothing,
    "biases and normalisations": _named("bias", "LayerNorm"),
    "LoRA of rank 8": _lora,
    "the last layer": _last_layer,
    "all layers": _named(""),
}


def measured(corpus: Corpus, settings: TrainSettings, row: str, seed: int) -> dict[str, Any]:
    """Train once, and measure on both splits."""
    experiment = recommended_for(corpus, settings)
    architecture = replace(experiment.architecture, freeze_encoder=False)
    classifier = new_classifier(replace(experiment, architecture=architecture), seed=seed)
    assert isinstance(classifier.model, EncoderClassifier)
    ROWS[row](classifier.model.encoder)
    started = time.perf_counter()
    _train(classifier, corpus, settings, experiment.recipe, seed)
    parameters = [p for p in classifier.model.parameters() if p.requires_grad]
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "weights": sum(p.numel() for p in parameters),
    }
    for split in SPLITS:
        examples = corpus.split(split)
        encoded = encode_all(classifier.encoding, examples)
        found[split] = evaluate(classifier.model, classifier.encoding, encoded, examples).to_dict()
    return found


def _train(
    classifier: Classifier, corpus: Corpus, settings: TrainSettings, recipe: Recipe, seed: int
) -> None:
    model, encoding = classifier.model, classifier.encoding
    assert isinstance(model, EncoderClassifier)
    examples = sorted(corpus.split("train"), key=lambda example: len(example.tokens))
    encoded = encode_all(encoding, examples)
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        encoded = read_once(model, encoding, encoded)
    plan = plan_for(settings, recipe, epsilon=settings.epsilon, num_examples=len(encoded))
    assert plan is not None
    optimizer = _optimizer(model, recipe.learning_rate)
    schedule = LambdaLR(
        optimizer, lambda done: recipe.rate_at(done / plan.steps) / recipe.learning_rate
    )
    torch.manual_seed(seed)
    model.train()
    with dpnlu.privatize(
        model,
        optimizer,
        plan,
        noise=torch.Generator().manual_seed(seed),
        sampling_rng=np.random.default_rng([seed, 1]),
    ) as private:
        for batch in private.loader(
            encoded, collate_fn=encoding.collate, physical_batch_size=PHYSICAL
        ):
            if private.step(model.per_example_loss(batch)):
                schedule.step()
                print(f"\rstep {len(private.ledger)} of {plan.steps}", end="", flush=True)
    print()


def _optimizer(model: EncoderClassifier, rate: float) -> torch.optim.Optimizer:
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("encoder.")].append(parameter)
    rates = {False: rate, True: ENCODER_RATE * rate}
    return torch.optim.AdamW(
        [
            {"params": found, "lr": rates[of_encoder]}
            for of_encoder, found in groups.items()
            if found
        ],
        weight_decay=0.0,
    )


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each row and budget."""
    lines = [
        "| trained beside the heads | ε | weights in all | valid: intent | slot F1 | "
        "test: intent | slot F1 | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, found in results.items():
        row, epsilon = key.rsplit("@", 1)
        cells = [f"{found[split][measure]:.3f}" for split in SPLITS for measure in MEASURES]
        name = "nothing" if row == "heads alone" else row
        lines.append(
            f"| {name} | {epsilon} | {found['weights']:,} | {' | '.join(cells)} | "
            f"{found['seconds']:.0f} |"
        )
    return "\n".join(lines)


def figure(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy on the validation split, from the fewest trained weights to the most."""
    weights = {key.rsplit("@", 1)[0]: found["weights"] for key, found in results.items()}
    rows = sorted(weights, key=weights.__getitem__)
    epsilons = sorted({key.rsplit("@", 1)[1] for key in results}, key=float, reverse=True)
    drawn, axes = plt.subplots(1, len(MEASURES), figsize=(10, 4.2), layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for epsilon in epsilons:
            known = [row for row in rows if f"{row}@{epsilon}" in results]
            heights = [results[f"{row}@{epsilon}"]["valid"][measure] for row in known]
            axis.plot([rows.index(row) for row in known], heights, "o-", label=f"ε = {epsilon}")
        names = [f"{row}\n{weights[row]:,}" for row in rows]
        axis.set_xticks(range(len(rows)), names, rotation=30, ha="right", fontsize=8)
        axis.set(xlabel="trained weights", ylabel=f"{label}, validation split")
        axis.grid(alpha=0.3)
        low, high = axis.get_ylim()
        spare = max(0.0, LEAST_SHOWN - (high - low)) / 2
        axis.set_ylim(low - spare, min(1.0, high + spare))
        axis.legend()
    drawn.savefig(path)
    plt.close(drawn)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="SPEC")
    parser.add_argument("--model", required=True, metavar="encoder:NAME_OR_PATH")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    corpus = load_corpus(options.data, seed=0)
    base = options.out / f"{datetime.date.today()}-frontier-{options.data.partition(':')[0]}"
    options.out.mkdir(parents=True, exist_ok=True)
    path = base.with_suffix(".json")
    content = json.loads(path.read_text()) if path.exists() else {"results": {}}
    content["command"] = shlex.join(["python", "benchmarks/frontier.py", *arguments])
    for epsilon in options.epsilons:
        for row in options.rows:
            key = f"{row}@{epsilon:g}"
            if key in content["results"]:
                continue
            settings = TrainSettings(
                data=options.data,
                model=options.model,
                epsilon=epsilon,
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
            )
            content["results"][key] = measured(corpus, settings, row, options.seed)
            path.write_text(json.dumps(content, indent=1) + "\n")
            print(key, content["results"][key], flush=True)
    facts = (
        f"processor {processor()}, threads {torch.get_num_threads()}, python "
        f"{platform.python_version()}, torch {torch.__version__}; expected batch "
        f"{options.batch_size}, {options.epochs:g} epochs, one seed"
    )
    figure(content["results"], base.with_suffix(".svg"))
    base.with_suffix(".md").write_text(
        f"# Trained weights of an encoder, {corpus.name}\n\n`{content['command']}`\n\n{facts}\n\n"
        f"{table(content['results'])}\n\n![frontier]({base.name}.svg)\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
