"""`dpnlu recipe`: what it says is what a training does, and its figures are in the results."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from dpnlu.cli.main import main
from dpnlu.runs.recommendation import MEASURED, recommend
from dpnlu.runs.resumable import prepared
from dpnlu.runs.settings import RecommendationSettings, TrainSettings
from dpnlu.runs.train import train

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KINDS = {"lstm": True, "encoder": False}


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
@pytest.mark.parametrize("data", ["synthetic:60", "synthetic:1500"])
def test_what_is_said_is_what_a_training_does(data: str, epsilon: float) -> None:
    said = recommend(RecommendationSettings(data=data, epsilon=epsilon))
    work = prepared(TrainSettings(data=data, epsilon=epsilon))
    assert said.recipe == work.experiment.recipe
    if work.plan is None:
        assert said.plan is None and "noise" not in "\n".join(said.lines())
        return
    assert said.plan is not None and asdict(said.plan) == asdict(work.plan)
    lines = "\n".join(said.lines())
    assert f"batches        {work.plan.steps} of {said.units // 4} on average" in lines
    assert f"ε = {work.plan.epsilon():.4g} at δ = 1e-05, for one example" in lines


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_as_many_steps_are_said_as_are_taken(epsilon: float) -> None:
    asked = {"data": "synthetic:300", "epsilon": epsilon, "epochs": 0.6}
    work = prepared(TrainSettings(**asked))
    trained = train(
        work.classifier,
        work.corpus.split("train"),
        recipe=work.experiment.recipe,
        compute=work.experiment.compute,
        plan=work.plan,
        seed=0,
    )
    (line,) = (
        line
        for line in recommend(RecommendationSettings(**asked)).lines()
        if line.startswith("batches")
    )
    assert line.split()[1] == str(trained.result.steps)


def test_only_the_measurements_of_such_a_model_near_the_budget_are_named() -> None:
    settings = {"data": "synthetic:60", "model": "encoder:x"}
    near_two = recommend(RecommendationSettings(epsilon=3.9, **settings)).lines()
    near_eight = recommend(RecommendationSettings(epsilon=4.1, **settings)).lines()
    assert any("0.963, slot F1 0.850" in line for line in near_two)
    assert any("0.967, slot F1 0.906" in line for line in near_eight)
    assert not any("0.955" in line for line in near_two + near_eight)


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: f"{one.page}-{one.epsilon:g}")
def test_the_figures_are_in_the_results(one) -> None:
    assert KINDS[one.page.rsplit("-", 1)[1]] == one.is_lstm and one.corpus.lower() in one.page
    content = json.loads((RESULTS / f"{one.page}.json").read_text(encoding="utf-8"))
    means = content["means"][f"recommended@{one.epsilon:g}"]
    assert one.intent_accuracy == pytest.approx(means["intent_accuracy"], abs=6e-4)
    assert one.slot_f1 == pytest.approx(means["slot_f1"], abs=6e-4)


def test_the_command_prints_it_and_refuses_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--data", "synthetic:60", "--epsilon", "8"]) == 0
    assert "learning rate  0.02, falling to 0" in capsys.readouterr().out
    assert main(["recipe", "--data", "synthetic:60", "--epsilon", "8", "--unit", "user"]) == 2
    assert "expected a user" in capsys.readouterr().err
    assert main(["recipe", "--data", "nowhere.jsonl", "--epsilon", "8"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
