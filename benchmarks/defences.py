"""What stops canary extraction: models trained with each defence, every one with its own secret.

    python benchmarks/defences.py --data snips:DIR --models 10 --minutes 60 --out benchmarks/results
    python benchmarks/defences.py --data snips:DIR --attacks --models 20 --out benchmarks/results

Every cell of the table is a defence or, with --attacks, a length of the secret and a number of
copies. A cell is confirmed by exhaustive scoring wherever there are at most a million secrets: a
defence that only breaks a search is found out by it. One row is written per trained model, and
kept: the same command goes on where it stopped. Noise comes from the seed: no model here is to be
published.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defences_table import document, heat_map

from attacks.canaries import draw_secret, exposure, secret_index
from attacks.inversion import Objective, extract
from attacks.inversion.enumeration import losses_of_all
from attacks.inversion.measures import estimated_exposure
from attacks.patterns import CanarySpec, parse_canary
from dpnlu.accounting import group_epsilon
from dpnlu.compare.extracting import canary_cloze, objective_for
from dpnlu.compare.inverting import invertible
from dpnlu.compare.study import Study
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, HashedVocabulary, drop_repeated, load_corpus
from dpnlu.runs.experiment import experiment_for, plan_for
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import Trained, measure, new_classifier, train

# Of a model with dropout: the likeliest secrets, ranked once more under so many masks.
LIKELIEST, MASKS = 100, 800
# Secrets drawn at random where there are too many to score.
SAMPLE = 5000
# More are ranked by the tags alone: a second ranking takes as long as the first.
MOST_RANKED_TWICE = 10**5

SEARCHES = ("published", "refined")
ALL_SEARCHES = (
    "published",
    "relaxation",
    "refined",
    "coordinates",
    "coordinate_gradient",
    "beam",
    "labels alone",
)
# Without a gradient.
BLACK_BOX = ("coordinates", "beam")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Models that are trained alike.

    Attributes:
        canary: what is planted.
        changes: to the recommended settings.
        rounded: decimals to which an attacker of the same models sees probabilities; None: not.
        searches: besides exhaustive scoring.
    """

    name: str
    canary: str = "pin:4:R=100"
    epsilon: float = math.inf
    changes: Mapping[str, Any] = field(default_factory=dict)
    rounded: int | None = None
    searches: tuple[str, ...] = SEARCHES

    @property
    def names(self) -> list[str]:
        """Of its rows: one per model, and one more where outputs are rounded."""
        return [self.name] if self.rounded is None else [self.name, self._name_if_rounded]

    @property
    def _name_if_rounded(self) -> str:
        return f"probabilities to {self.rounded} decimals"


PAPER: dict[str, Any] = {"dropout": 0.5, "patience": 1, "characters": 50}
DEFENCES = (
    Cell(name="none", changes={"dropout": 0.0}, rounded=2),
    Cell(name="dropout 0.5 (the default)", changes={"dropout": 0.5}),
    Cell(name="early stopping", changes={"dropout": 0.0, "patience": 1}),
    Cell(name="characters", changes={"dropout": 0.0, "characters": 50}),
    Cell(name="weight decay 0.5", changes={"dropout": 0.0, "weight_decay": 0.5}),
    Cell(name="digits redacted", changes={"dropout": 0.0, "redact_digits": True}),
    Cell(name="dropout, early stopping, characters", changes=PAPER),
    Cell(name="these three and weight decay", changes=PAPER | {"weight_decay": 0.5}),
    Cell(name="ε = 8", epsilon=8.0),
    Cell(name="ε = 2", epsilon=2.0),
    Cell(name="ε = 8, one copy", epsilon=8.0, canary="pin:4:R=1"),
)
ATTACKED = tuple(
    Cell(
        name=f"n = {length}, R = {copies}, {'no dropout' if dropout == 0 else 'dropout 0.5'}",
        canary=f"pin:{length}:R={copies}",
        changes={"dropout": dropout},
        searches=ALL_SEARCHES,
    )
    for length, copies in ((4, 100), (4, 10), (4, 1), (6, 100), (9, 100))
    for dropout in (0.0, 0.5)
)


def rows_of(
    cell: Cell, number: int, *, corpus: Corpus, data: str, model: str, seed: int
) -> list[dict[str, Any]]:
    """Train one model of a cell and read it: one row, or one more where outputs are rounded."""
    canary = parse_canary(cell.canary)
    rng = np.random.default_rng([seed, number])
    secret = draw_secret(rng, length=canary.length, candidates=canary.sizes)
    trained, plan = _trained(cell, canary, secret, corpus=corpus, data=data, model=model, rng=rng)
    shared = {
        "model": number,
        "secret": secret.tolist(),
        "combinations": canary.combinations,
        "copies": canary.repetitions,
        "steps": trained.result.steps,
        "train_seconds": trained.result.seconds,
        **measure(trained.classifier, corpus.split("test")).to_dict(),
    }
    if trained.result.epsilon is not None:
        delta = plan.target_delta
        shared |= {"epsilon": trained.result.epsilon, "delta": delta}
        shared["group_epsilon"] = group_epsilon(plan.events(), size=canary.repetitions, delta=delta)
    rows = []
    for name in cell.names:
        decimals = None if name == cell.name else cell.rounded
        searches = cell.searches if decimals is None else BLACK_BOX
        found = read(trained.classifier, canary, secret, searches=searches, decimals=decimals)
        rows.append({"cell": name} | shared | found)
    return rows


def _trained(
    cell: Cell,
    canary: CanarySpec,
    secret: np.ndarray,
    *,
    corpus: Corpus,
    data: str,
    model: str,
    rng: np.random.Generator,
) -> tuple[Trained, Any]:
    study = Study(
        base=corpus.split("train"),
        audit=(),
        membership=np.zeros((1, 0), dtype=bool),
        canaries=(canary,),
        secrets=(secret[None],),
    )
    examples = study.examples(0)
    settings = TrainSettings(data=data, model=model, epsilon=cell.epsilon, **cell.changes)
    experiment = experiment_for(
        settings,
        epsilon=cell.epsilon,
        labels=study.labels(corpus),
        vocabulary=HashedVocabulary(),
        units=len(examples),
    )
    experiment.check_validation(corpus)
    plan = plan_for(settings, experiment.recipe, epsilon=cell.epsilon, num_examples=len(examples))
    seed = int(rng.integers(2**31))
    trained = train(
        new_classifier(experiment, seed=seed),
        examples,
        recipe=experiment.recipe,
        compute=experiment.compute,
        plan=plan,
        seed=seed,
        repeatable_noise=True,
        validation=corpus.split("valid"),
    )
    return trained, plan


def read(
    classifier: Classifier,
    canary: CanarySpec,
    secret: np.ndarray,
    *,
    searches: Sequence[str],
    decimals: int | None,
) -> dict[str, Any]:
    """What a model gives away of its secret: to exhaustive scoring, and to searches."""
    cloze = canary_cloze(classifier, canary)
    objective = objective_for(classifier, [cloze], by_tags=True, decimals=decimals, masks=MASKS)
    whole = torch.tensor(secret)[None]
    true = float(objective.in_evaluation_mode().whole(torch.tensor([0]), whole))
    found: dict[str, Any] = {"true_loss": true}
    attacks: dict[str, Any] = {}
    if canary.is_enumerable:
        started = time.perf_counter()
        ranking, guess = _ranked(objective, canary)
        found |= _ranks(ranking, canary, secret, objective)
        attacks["enumeration"] = _outcome(guess, secret, started)
        found["best_loss"] = float(objective.in_evaluation_mode().whole(*_row(guess)))
    else:
        drawn = np.random.default_rng(0).integers(canary.sizes, size=(SAMPLE, canary.length))
        rows = torch.zeros(SAMPLE, dtype=torch.long)
        losses = objective.in_evaluation_mode().whole(rows, torch.tensor(drawn)).numpy()
        bits = estimated_exposure(true, losses, candidates=canary.combinations)
        found |= {"exposure": bits.bits, "sampled_exposure": bits.sampled_bits}
    by_search = objective_for(classifier, [cloze], by_tags=True, decimals=decimals)
    for name in searches:
        started, rng = time.perf_counter(), torch.Generator().manual_seed(0)
        if name == "labels alone":
            asked = Objective(invertible(classifier, [cloze]), target="labels")
            (best,) = extract(asked, method="coordinates", generator=rng)
        else:
            (best,) = extract(by_search, method=name, generator=rng)
        attacks[name] = _outcome(np.array(best.choices), secret, started)
    return found | {"attacks": attacks}


def _ranked(objective: Objective, canary: CanarySpec) -> tuple[np.ndarray, np.ndarray]:
    """What ranks all secrets (C,), and the first of them.

    Those likeliest in evaluation mode come first, in the order of their mean loss under dropout.
    """
    ranking = losses_of_all(objective.in_evaluation_mode(), 0).numpy()
    first = ranking.argsort(kind="stable")[:LIKELIEST]
    choices = np.stack(np.unravel_index(first, canary.sizes), axis=1)
    if objective.has_masks:
        rows = torch.zeros(len(first), dtype=torch.long)
        under = objective.whole(rows, torch.tensor(choices)).numpy()
        # The others follow, in their order.
        ranking = ranking - ranking.min() + under.max() + 1.0
        ranking[first] = under
    return ranking, choices[ranking[first].argmin()]


def _ranks(
    ranking: np.ndarray, canary: CanarySpec, secret: np.ndarray, objective: Objective
) -> dict[str, float]:
    """The rank of the true secret and, where it is quickly found, that by all labels."""
    place = secret_index(secret, candidates=canary.sizes)
    by_tags = exposure(ranking, place)
    found = {"rank": by_tags.rank, "exposure": by_tags.bits}
    if canary.combinations <= MOST_RANKED_TWICE and objective.is_differentiable:
        both = Objective(objective.model, target="joint")
        found["rank_joint"] = exposure(losses_of_all(both, 0).numpy(), place).rank
    return found


def _row(guess: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0]), torch.tensor(guess)[None]


def _outcome(guess: np.ndarray, secret: np.ndarray, started: float) -> dict[str, Any]:
    wrong = float((guess != secret).mean())
    return {
        "guess": guess.tolist(),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 2),
    }


# ---- rows on disk ----------------------------------------------------------------------------


def kept(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there, of the same settings; a last line that was cut off is removed.

    Raises:
        ValueError: the rows are of other settings.
    """
    if not path.exists():
        _append(path, [{"settings": header}])
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        _append(path, [{"settings": header}])
        return []
    if lines[0].get("settings") != dict(header):
        raise ValueError(
            f"Expected rows of {dict(header)} in {path}, got {lines[0].get('settings')}: choose "
            "another --name, or repeat the settings."
        )
    return lines[1:]


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows of a model at once, durably."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="SPEC")
    parser.add_argument("--model", default="lstm")
    parser.add_argument("--attacks", action="store_true", help="lengths and copies, not defences")
    parser.add_argument("--cells", nargs="*", default=[], help="parts of names of cells")
    parser.add_argument("--models", type=int, default=10, help="of each cell")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no model that would end later"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the files (default: the date, and what they hold)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    what = "extraction" if options.attacks else "defences"
    base = options.out / (options.name or f"{datetime.date.today()}-{what}")
    options.out.mkdir(parents=True, exist_ok=True)
    header = {"data": options.data, "model": options.model, "seed": options.seed}
    path = base.with_suffix(".jsonl")
    rows = kept(path, header)
    corpus, _ = drop_repeated(load_corpus(options.data, seed=0))
    cells = [
        cell
        for cell in (ATTACKED if options.attacks else DEFENCES)
        if not options.cells or any(part in cell.name for part in options.cells)
    ]
    started, longest = time.monotonic(), 0.0
    for number in range(options.models):
        for cell in cells:
            done = {row["cell"] for row in rows if row["model"] == number}
            begun = time.monotonic()
            if set(cell.names) <= done or begun - started + longest > 60 * options.minutes:
                continue
            made = rows_of(cell, number, corpus=corpus, **header)
            _append(path, made)
            rows += made
            longest = max(longest, time.monotonic() - begun)
            print(json.dumps(made[0]), flush=True)
    command = shlex.join(["python", "benchmarks/defences.py", *arguments])
    names = [name for cell in cells for name in cell.names]
    base.with_suffix(".md").write_text(document(rows, names, command=command, data=corpus.name))
    heat_map(rows, names, base.with_suffix(".svg"))


if __name__ == "__main__":
    main(sys.argv[1:])
