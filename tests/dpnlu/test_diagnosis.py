"""The ladder between ordinary and private training: each rung changes what it says, and no more."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dpnlu.cli.main import main
from dpnlu.nlu.data import load_corpus
from dpnlu.nlu.metrics import Metrics
from dpnlu.runs import diagnosis
from dpnlu.runs.diagnosis import Diagnosis, diagnose, rungs
from dpnlu.runs.settings import DiagnosisSettings

SETTINGS = DiagnosisSettings(
    data="synthetic:600",
    model="lstm",
    epsilon=8.0,
    epochs=1.0,
    batch_size=64,
    public=True,
    device="cpu",
)


@pytest.fixture(scope="module")
def ladder():
    corpus = load_corpus(SETTINGS.data, seed=0)
    return {rung.name: rung for rung in rungs(SETTINGS, corpus)}


def test_only_bound_and_noise_change_on_the_way_to_the_private_training(ladder):
    private = ladder[diagnosis.PRIVATE]
    bound = private.plan.max_grad_norm
    assert ladder[diagnosis.ORDINARY].plan is None
    wanted = {
        diagnosis.RECIPE: (math.inf, 0.0),
        diagnosis.CLIPPED: (bound, 0.0),
        diagnosis.NOISED: (math.inf, private.plan.noise_std_at(0)),
    }
    for name, (most, noise) in wanted.items():
        rung = ladder[name]
        plan = rung.plan
        assert plan.max_grad_norm == bound if most == bound else plan.max_grad_norm >= 1e5 * bound
        assert plan.noise_std_at(0) == pytest.approx(noise)
        assert rung.experiment == private.experiment
        same = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        assert replace(plan, **same) == replace(private.plan, **same)


def test_larger_batches_and_fewer_weights_keep_to_the_budget(ladder):
    private, larger = ladder[diagnosis.PRIVATE], ladder[diagnosis.LARGER_BATCH]
    assert larger.plan.sample_rate == pytest.approx(4 * private.plan.sample_rate, rel=0.02)
    assert 7 < larger.plan.epsilon() <= 8 and 7 < private.plan.epsilon() <= 8
    assert ladder[diagnosis.FEWER_WEIGHTS].freezes_words
    assert ladder[diagnosis.FEWER_WEIGHTS].plan == private.plan


def test_batches_are_no_larger_than_the_data():
    settings = replace(SETTINGS, batch_size=200)
    corpus = load_corpus(SETTINGS.data, seed=0)
    found = {rung.name: rung for rung in rungs(settings, corpus)}
    assert found[diagnosis.LARGER_BATCH].plan.sample_rate == 1.0


def test_narrower_heads_of_an_encoder_read_less(tiny_encoder: Path):
    settings = replace(SETTINGS, model=f"encoder:{tiny_encoder}")
    corpus = load_corpus(SETTINGS.data, seed=0)
    found = {rung.name: rung for rung in rungs(settings, corpus)}
    wide = found[diagnosis.PRIVATE].experiment.architecture
    narrow = found[diagnosis.FEWER_WEIGHTS].experiment.architecture
    assert wide.freeze_encoder and narrow.freeze_encoder
    assert (narrow.neighbours, narrow.reads_text, narrow.word_layers) == (0, False, (1.0,))
    assert not found[diagnosis.FEWER_WEIGHTS].freezes_words


def _metrics(accuracy: float, f1: float | None = None) -> Metrics:
    return Metrics(intent_accuracy=accuracy, slot_f1=f1, frame_accuracy=0.0, examples=10_000)


def test_the_step_that_loses_most_is_named():
    found = {
        diagnosis.ORDINARY: _metrics(0.95),
        diagnosis.RECIPE: _metrics(0.94),
        diagnosis.CLIPPED: _metrics(0.90),
        diagnosis.NOISED: _metrics(0.70),
        diagnosis.PRIVATE: _metrics(0.60),
        diagnosis.LARGER_BATCH: _metrics(0.80),
        diagnosis.FEWER_WEIGHTS: _metrics(0.605),
    }
    (sentence,) = Diagnosis("valid", found).sentences()
    assert "0.950 without privacy, 0.600 with" in sentence
    assert "+0.010 by its recipe, +0.040 by clipping, +0.300 by noise: most by noise" in sentence
    assert "Batches 4 times as large win 0.200 back." in sentence
    assert "Fewer trained weights" not in sentence, "it is as well chance"


def test_what_may_be_chance_is_not_blamed():
    found = {name: _metrics(0.9, 0.9) for name in (diagnosis.ORDINARY, diagnosis.RECIPE)}
    found |= {name: _metrics(0.899, 0.9) for name in (diagnosis.CLIPPED, diagnosis.PRIVATE)}
    sentences = Diagnosis("valid", found).sentences()
    assert len(sentences) == 2
    assert all("no step loses more than chance may explain" in one for one in sentences)


def test_data_have_to_be_public():
    with pytest.raises(ValueError, match="say --public"):
        diagnose(replace(SETTINGS, public=False))
    with pytest.raises(ValueError, match="finite ε"):
        diagnose(replace(SETTINGS, epsilon=math.inf))


def test_the_command_prints_the_ladder(capsys: pytest.CaptureFixture[str]):
    arguments = "--data synthetic:600 --epsilon 8 --epochs 1 --batch-size 64 --public --quiet"
    assert main(["diagnose", *arguments.split()]) == 0
    printed = capsys.readouterr().out
    for name in (diagnosis.ORDINARY, diagnosis.NOISED, diagnosis.FEWER_WEIGHTS):
        assert f"| {name} | " in printed
    assert "Intent accuracy: " in printed and "Slot F1: " in printed
    assert "Measured on the valid split." in printed
