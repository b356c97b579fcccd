"""Accuracy of a default recipe over several seeds: of weights, order, sampling and noise.

    python benchmarks/seeds.py --data snips:DIR --model lstm --epsilon 8 --out benchmarks/results

The whole training split is used, without repeated texts. What a seed gave is kept in the JSON
file, and not trained again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

import torch

from dpnlu.cli.benchmark import processor
from dpnlu.nlu.data import HashedVocabulary, drop_repeated, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.runs.experiment import experiment_for, plan_for
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import measure, new_classifier, train

KEPT = ("intent_accuracy", "slot_f1")


def accuracy(data: str, model: str, epsilon: float, seed: int) -> dict[str, float]:
    """Train once and measure on the test split. Noise comes from the seed: not to be published."""
    corpus, _ = drop_repeated(load_corpus(data, seed=0))
    examples = corpus.split("train")
    settings = TrainSettings(data=data, model=model, epsilon=epsilon)
    experiment = experiment_for(
        settings,
        epsilon=epsilon,
        labels=Labels(tuple(sorted(corpus.intents)), tuple(sorted(corpus.tags))),
        vocabulary=HashedVocabulary(),
        units=len(examples),
    )
    plan = plan_for(settings, experiment.recipe, epsilon=epsilon, num_examples=len(examples))
    classifier = new_classifier(experiment, seed=seed)
    train(
        classifier,
        examples,
        recipe=experiment.recipe,
        compute=experiment.compute,
        plan=plan,
        seed=seed,
        repeatable_noise=True,
    )
    found = measure(classifier, corpus.split("test")).to_dict()
    return {name: found[name] for name in KEPT if name in found}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A line per seed, and the means with their standard errors."""
    names = [name for name in KEPT if all(name in row for row in rows.values())]
    lines = [f"| seed | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for seed, row in rows.items():
        lines.append(f"| {seed} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |")
    if len(rows) > 1:
        means = []
        for name in names:
            values = [row[name] for row in rows.values()]
            error = statistics.stdev(values) / len(values) ** 0.5
            means.append(f"{statistics.mean(values):.4f} ± {error:.4f}")
        lines.append(f"| mean | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="lstm")
    parser.add_argument("--epsilon", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    what = "encoder" if options.model.startswith("encoder:") else options.model
    name = f"{datetime.date.today()}-seeds-{what}-eps-{options.epsilon:g}"
    options.out.mkdir(parents=True, exist_ok=True)  # before hours of training, not after
    path = options.out / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for seed in map(str, range(options.seeds)):
        if seed not in content["rows"]:
            content["rows"][seed] = accuracy(
                options.data, options.model, options.epsilon, int(seed)
            )
        content |= {
            "command": " ".join(["python", *sys.argv]),
            "machine": {
                "processor": processor(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(seed, content["rows"][seed], flush=True)
    facts = ", ".join(f"{fact} {value}" for fact, value in content["machine"].items())
    title = f"{what} at ε = {options.epsilon:g}, several seeds"
    parts = [f"# {title}", f"`{content['command']}`", facts, table(content["rows"])]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
