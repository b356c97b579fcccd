"""What public data give a private training, learnt first, beside the private ones, or both.

    python benchmarks/public.py --data snips:DIR --epsilons 2 --seeds 0 1 --out DIR

A random tenth of the training split is taken to be public, and from the private data. All else is
as `dpnlu train` recommends it. What was measured is kept in the JSON file, and not measured again.
Noise comes from the seed: no model here is to be published.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpnlu.cli.benchmark import processor
from dpnlu.nlu.data import Corpus, HashedVocabulary, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.runs.experiment import experiment_for, plan_for
from dpnlu.runs.public_data import PublicData
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import measure, new_classifier, train

SPLITS = ("valid", "test")


@dataclass(frozen=True, kw_only=True)
class Row:
    """How public data are used.

    Attributes:
        use: of `--public-use`; None: not at all.
        is_private: whether there is private training at all.
    """

    use: str | None
    weight: float = 1.0
    clipping: str = "flat"
    is_private: bool = True


def _named() -> dict[str, Row]:
    rows = {
        "private alone": Row(use=None),
        "public alone": Row(use="first", is_private=False),
        "first": Row(use="first"),
    }
    for use in ("beside", "both"):
        for weight in (1.0, 0.3, 0.1, 0.03):
            for clipping in ("flat", "public:0.1", "public:0.5", "public:0.9"):
                bound = "" if clipping == "flat" else f", bound {clipping}"
                name = f"{use}, weight {weight:g}{bound}"
                rows[name] = Row(use=use, weight=weight, clipping=clipping)
    return rows


ROWS = _named()


def divided(corpus: Corpus, seed: int) -> tuple[list[Any], list[Any]]:
    """A random tenth of the training split, and the rest."""
    examples = corpus.split("train")
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    tenth = len(order) // 10
    return [examples[n] for n in order[:tenth]], [examples[n] for n in order[tenth:]]


def measured(corpus: Corpus, spec: str, epsilon: float, row: Row, seed: int) -> dict[str, Any]:
    """Train once, and measure on both splits."""
    settings = TrainSettings(data=spec, epsilon=epsilon, clipping=row.clipping, seed=seed)
    open_ones, private = divided(corpus, seed)
    labels = Labels(corpus.intents, corpus.tags)
    experiment = experiment_for(
        settings, epsilon=epsilon, labels=labels, vocabulary=HashedVocabulary()
    )
    plan = plan_for(settings, experiment.recipe, epsilon=epsilon, num_examples=len(private))
    classifier = new_classifier(experiment, seed=seed)
    started = time.perf_counter()
    public = None
    if row.use is not None:
        public = PublicData(
            spec="a tenth", examples=open_ones, labels=labels, use=row.use, weight=row.weight
        )
        if public.is_first:
            public.teach(classifier, settings, experiment.compute)
    if row.is_private:
        train(
            classifier,
            private,
            recipe=experiment.recipe,
            compute=experiment.compute,
            plan=plan,
            seed=seed,
            repeatable_noise=True,
            public=None if public is None else public.beside(classifier, experiment.compute),
        )
    found: dict[str, Any] = {"seconds": time.perf_counter() - started}
    for split in SPLITS:
        found[split] = measure(classifier, corpus.split(split)).to_dict()
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each row and budget: means over the seeds, with standard errors."""
    lines = [
        "| public data | ε | seeds | valid: intent | slot F1 | test: intent | slot F1 | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, runs in results.items():
        name, epsilon = key.rsplit("@", 1)
        cells = [
            _mean([run[split][measure] for run in runs.values()])
            for split in SPLITS
            for measure in ("intent_accuracy", "slot_f1")
        ]
        seconds = statistics.mean(run["seconds"] for run in runs.values())
        lines.append(f"| {name} | {epsilon} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["private alone"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    corpus = load_corpus(options.data, seed=0)
    options.out.mkdir(parents=True, exist_ok=True)
    title = f"{datetime.date.today()}-public-beside-{options.data.partition(':')[0]}"
    path = options.out / f"{title}.json"
    content = json.loads(path.read_text()) if path.exists() else {"commands": [], "results": {}}
    content["commands"].append(shlex.join(["python", *sys.argv]))
    content["machine"] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for seed in options.seeds:
        for epsilon in options.epsilons:
            for name in options.rows:
                runs = content["results"].setdefault(f"{name}@{epsilon:g}", {})
                if str(seed) in runs:
                    continue
                runs[str(seed)] = measured(corpus, options.data, epsilon, ROWS[name], seed)
                print(name, epsilon, seed, runs[str(seed)], flush=True)
                path.write_text(json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{fact} {value}" for fact, value in content["machine"].items())
    commands = "\n".join(f"    {command}" for command in content["commands"])
    path.with_suffix(".md").write_text(
        "\n\n".join(["# Public data", commands, facts, table(content["results"])]) + "\n"
    )


if __name__ == "__main__":
    main()
