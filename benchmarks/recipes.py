"""What each part of the recommended recipe gives, and the whole over several seeds.

    python benchmarks/recipes.py --data snips:DIR --model encoder:NAME --epsilons 8 2 --out DIR
    python benchmarks/recipes.py --data snips:DIR --model encoder:NAME --rows all --out DIR
    python benchmarks/recipes.py --data snips:DIR --texts 500 --recipes 3 --out DIR
    python benchmarks/recipes.py --data hwu64:DIR --model encoder:NAME --rows grid --out DIR
    python benchmarks/recipes.py --data hwu64:DIR --epsilons 8 3 --rows mechanisms --out DIR

Everything but the row's change is as `dpnlu train` recommends it; `grid` are those rows that change
learning rate, batch and epochs, `mechanisms` those that clip or add noise in another way, at the
same ε. A frozen encoder reads the texts once for all rows. What was measured is kept in the JSON
file, and not measured again. Noise comes from the seed: no model here is to be published.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpnlu.cli.benchmark import processor
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, Example, HashedVocabulary, load_corpus
from dpnlu.nlu.encoding import Encoded, Labels, encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.metrics import evaluate
from dpnlu.nlu.models import EncoderClassifier
from dpnlu.nlu.tag_chain import TagChain
from dpnlu.runs.experiment import Experiment, experiment_for, plan_for
from dpnlu.runs.settings import LATEST_RECIPES, TrainSettings
from dpnlu.runs.train import new_classifier
from dpnlu.training.loop import Randomness, fit

SPLITS = ("valid", "test")


# What is changed of the recommended architecture.
ROWS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "words alone, not the text": {"reads_text": False},
    "and no neighbours": {"reads_text": False, "neighbours": 0},
    "and the last layer alone": {"reads_text": False, "neighbours": 0, "word_layers": (1.0,)},
    "each word's tag by itself": {"slot_loss": "words"},
    "no means over words": {"reads_word_means": False},
    "intents from zero, not from their names": {"reads_intent_names": False},
}
# What is changed of the recommended training: settings, and by which factor.
GRID: dict[str, dict[str, float]] = {
    "half the rate": {"learning_rate": 0.5},
    "twice the rate": {"learning_rate": 2.0},
    "half the batch": {"batch_size": 0.5},
    "half the batch, half the rate": {"batch_size": 0.5, "learning_rate": 0.5},
    "half the batch, twice the rate": {"batch_size": 0.5, "learning_rate": 2.0},
    "twice the epochs": {"epochs": 2.0},
    "twice the epochs, half the rate": {"epochs": 2.0, "learning_rate": 0.5},
}
# What is changed of the mechanism: settings, and how many micro-batches are clipped as a whole.
MECHANISMS: dict[str, dict[str, Any]] = {
    "a third of the bound": {"max_grad_norm": 1 / 3},
    "three times the bound": {"max_grad_norm": 3.0},
    "automatic clipping": {"clipping": "automatic"},
    "a bound for each layer": {"clipping": "per_layer"},
    "a bound that adapts": {"clipping": "quantile:0.5"},
    "decaying noise": {"noise_schedule": "exponential:0.97"},
    "eDP-SGD, 16 micro-batches": {"microbatches": 16},
    "eDP-SGD, 128 micro-batches": {"microbatches": 128},
    "eDP-SGD, 16 micro-batches, a tenth of the bound": {"microbatches": 16, "max_grad_norm": 0.1},
    "eDP-SGD, 128 micro-batches, a third of the bound": {
        "microbatches": 128,
        "max_grad_norm": 1 / 3,
    },
    "eDP-SGD, 128 micro-batches, decaying noise": {
        "microbatches": 128,
        "noise_schedule": "exponential:0.97",
    },
}
# The same weights, predicting under the constraints of IOB2 what was trained word by word.
VITERBI = "each word's tag by itself, Viterbi"
OF_ENCODERS = {
    "words alone, not the text",
    "and no neighbours",
    "and the last layer alone",
    "no means over words",
    "intents from zero, not from their names",
}


class Texts:
    """The examples of a corpus as a model reads them; by a frozen encoder once for all."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._read: dict[str, list[Encoded]] = {}

    def examples(self, split: str) -> list[Example]:
        return sorted(self.corpus.split(split), key=lambda example: len(example.tokens))

    def of(self, split: str, classifier: Classifier, widest: Classifier) -> list[Encoded]:
        """What a classifier is trained or measured on."""
        if not classifier.architecture.freeze_encoder:
            return encode_all(classifier.encoding, self.examples(split))
        if split not in self._read:
            assert isinstance(widest.model, EncoderClassifier)
            encoded = encode_all(widest.encoding, self.examples(split))
            self._read[split] = read_once(widest.model, widest.encoding, encoded)
        wide, narrow = widest.architecture, classifier.architecture
        if (narrow.word_layers, narrow.reads_word_means) == (
            wide.word_layers,
            wide.reads_word_means,
        ):
            return self._read[split]
        return [_narrowed(read, classifier) for read in self._read[split]]


def _narrowed(read: Encoded, classifier: Classifier) -> Encoded:
    """What a model that reads fewer layers of words, or no means over them, reads of a text."""
    architecture = classifier.architecture
    assert architecture.text_layers and architecture.word_layers
    config: Any = classifier.model.get_submodule("encoder").config
    of_text, of_words = (
        config.hidden_size * len(layers)
        for layers in (architecture.text_layers, architecture.word_layers)
    )
    pooled = [read["pooled"][:of_text]]
    if architecture.reads_word_means:
        pooled.append(read["pooled"][-of_words:])
    narrowed = read | {"pooled": torch.cat(pooled)}
    if "states" in read:
        narrowed["states"] = read["states"][:, -of_words:]
    return narrowed


def measured(
    texts: Texts, settings: TrainSettings, row: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Train once, and measure on both splits; of some rows in two ways."""
    recommended = recommended_for(texts.corpus, settings)
    if row in GRID:
        usual, kinds = recommended.recipe, {"batch_size": round}
        changed = {
            name: kinds.get(name, float)(factor * getattr(usual, name))
            for name, factor in GRID[row].items()
        }
        settings = replace(settings, **changed)
        recommended = recommended_for(texts.corpus, settings)
    of_mechanism = dict(MECHANISMS.get(row, {}))
    microbatches = of_mechanism.pop("microbatches", None)
    settings = replace(settings, **of_mechanism)
    architecture = replace(recommended.architecture, **ROWS.get(row, {}))
    experiment = replace(recommended, architecture=architecture)
    classifier = new_classifier(experiment, seed=seed)
    widest = new_classifier(recommended, seed=seed)
    encoded = texts.of("train", classifier, widest)
    plan = plan_for(
        settings, experiment.recipe, epsilon=settings.epsilon, num_examples=len(encoded)
    )
    if plan is not None and microbatches is not None:
        # Their sensitivity is twice the bound, and the noise a multiple of that: ε is the same.
        plan = replace(plan, clipping_unit="microbatch", microbatches=microbatches)
    started = time.perf_counter()
    fit(
        classifier.model,
        encoded,
        loss=classifier.model.per_example_loss,
        collate=classifier.encoding.collate,
        recipe=experiment.recipe,
        plan=plan,
        compute=experiment.compute,
        randomness=Randomness(
            order=np.random.default_rng([seed, 1]),
            noise=torch.Generator(device=experiment.compute.device).manual_seed(seed),
        ),
    )
    seconds = time.perf_counter() - started

    def results() -> dict[str, Any]:
        found: dict[str, Any] = {"seconds": seconds}
        for split in SPLITS:
            data = texts.of(split, classifier, widest)
            metrics = evaluate(classifier.model, classifier.encoding, data, texts.examples(split))
            found[split] = metrics.to_dict()
        return found

    rows = {row: results()}
    if architecture.slot_loss == "words" and experiment.labels.tags:
        classifier.model.chain = TagChain.of(experiment.labels.tags)
        rows[VITERBI] = results()
    return rows


def recommended_for(corpus: Corpus, settings: TrainSettings) -> Experiment:
    """What `dpnlu train` does with these settings."""
    return experiment_for(
        settings,
        epsilon=settings.epsilon,
        labels=Labels(corpus.intents, corpus.tags),
        vocabulary=HashedVocabulary(),
        units=len(corpus.split("train")),
        learning_rate=settings.learning_rate,
    )


def fewer(corpus: Corpus, texts: int | None) -> Corpus:
    """The corpus with so many of its training texts, the same in every run; None: all."""
    train = corpus.split("train")
    if texts is None:
        return corpus
    kept = {train[place].id for place in np.random.default_rng(0).permutation(len(train))[:texts]}
    return replace(
        corpus,
        examples=tuple(e for e in corpus.examples if e.split != "train" or e.id in kept),
    )


def without(corpus: Corpus, intent: str | None) -> Corpus:
    """The corpus without the test texts of an intent, which stay in training; None: as it is.

    Raises:
        ValueError: the corpus has no such intent.
    """
    if intent is None:
        return corpus
    if intent not in corpus.intents:
        raise ValueError(f"Expected an intent of {corpus.name} for --without, got {intent!r}.")
    return replace(
        corpus,
        examples=tuple(e for e in corpus.examples if e.split != "test" or e.intent != intent),
    )


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each recipe and budget: means over the seeds, with standard errors."""
    lines = [
        "| recipe | ε | seeds | valid: intent | slot F1 | test: intent | slot F1 | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, runs in results.items():
        name, epsilon = key.rsplit("@", 1)
        cells = [
            _mean([run[split].get(measure) for run in runs.values()])
            for split in SPLITS
            for measure in ("intent_accuracy", "slot_f1")
        ]
        seconds = statistics.mean(run["seconds"] for run in runs.values())
        lines.append(f"| {name} | {epsilon} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def means(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What documents quote: means over the seeds on the test split."""
    return {
        key: {
            measure: statistics.mean(run["test"][measure] for run in runs.values())
            for measure in ("intent_accuracy", "slot_f1")
            if all(measure in run["test"] for run in runs.values())
        }
        for key, runs in results.items()
    }


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.4f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(known) / len(known) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="lstm")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--rows", nargs="+", default=["recommended"], help="names, all, grid or mechanisms"
    )
    parser.add_argument("--texts", type=int, help="of the training split (default: all)")
    parser.add_argument("--without", metavar="INTENT", help="whose test texts do not count")
    parser.add_argument("--recipes", type=int, default=LATEST_RECIPES, help="their edition")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    kind = "encoder" if options.model.startswith("encoder:") else options.model
    sets = {
        "all": list(ROWS),
        "grid": ["recommended", *GRID],
        "mechanisms": ["recommended", *MECHANISMS],
    }
    rows = [row for name in options.rows for row in sets.get(name, [name])]
    if kind != "encoder":
        rows = [row for row in rows if row not in OF_ENCODERS]
    corpus = without(fewer(load_corpus(options.data, seed=0), options.texts), options.without)
    texts = Texts(corpus)
    name = corpus.name.replace("/", "-")  # of the hub: ORGANISATION/NAME
    title = f"{datetime.date.today()}-recipes-{name}-{kind}"
    if options.texts is not None:
        title += f"-{options.texts}-texts"
    if options.without is not None:
        title += f"-without-{options.without}"
    edition = "" if options.recipes == LATEST_RECIPES else f", edition {options.recipes}"
    options.out.mkdir(parents=True, exist_ok=True)
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
            for row in rows:
                if str(seed) in content["results"].get(f"{row}{edition}@{epsilon:g}", {}):
                    continue
                settings = TrainSettings(
                    data=options.data,
                    model=options.model,
                    epsilon=epsilon,
                    recipes=options.recipes,
                )
                for name, found in measured(texts, settings, row, seed).items():
                    content["results"].setdefault(f"{name}{edition}@{epsilon:g}", {})[str(seed)] = (
                        found
                    )
                    print(name, epsilon, seed, found, flush=True)
                content["means"] = means(content["results"])
                path.write_text(json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{fact} {value}" for fact, value in content["machine"].items())
    commands = "\n".join(f"    {command}" for command in content["commands"])
    heading = f"# Recommended recipe, {corpus.name}, {kind}"
    if options.texts is not None:
        heading += f", {options.texts} training texts"
    if options.without is not None:
        heading += f", without test texts of {options.without}"
    path.with_suffix(".md").write_text(
        "\n\n".join([heading, commands, facts, table(content["results"])]) + "\n"
    )


if __name__ == "__main__":
    main()
