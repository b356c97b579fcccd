"""Records that go to files and come back, under names that earlier versions have written."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attacks.farm import load_arrays, save_arrays
from attacks.signals import Signals
from dpnlu.compare.reading import CanaryReading, Reading
from dpnlu.compare.settings import StudySettings
from dpnlu.runs.model_directory import ModelDirectoryError
from dpnlu.runs.results import Results
from dpnlu.runs.settings import TrainSettings, as_begun

ORDINARY = Results(intent_accuracy=0.5, frame_accuracy=0.25, examples=8, train_seconds=1.5, steps=3)
PRIVATE = replace(ORDINARY, slot_f1=0.0, peak_memory_mib=9.5, epsilon=2.0, delta=1e-5)


@pytest.mark.parametrize("results", [ORDINARY, PRIVATE])
def test_results_come_back_and_what_was_not_measured_is_absent(results: Results) -> None:
    content = json.loads(json.dumps(results.to_dict()))
    assert Results.from_dict(content) == results
    assert None not in content.values()
    assert Results.from_dict(content | {"measured by another version": 1}) == results


def test_the_names_in_metrics_json_are_those_that_were_always_there() -> None:
    assert PRIVATE.to_dict() == {
        "intent_accuracy": 0.5,
        "slot_f1": 0.0,
        "frame_accuracy": 0.25,
        "examples": 8,
        "train_seconds": 1.5,
        "steps": 3,
        "peak_memory_mib": 9.5,
        "epsilon": 2.0,
        "delta": 1e-5,
    }


def test_metrics_of_something_else_are_refused() -> None:
    with pytest.raises(ModelDirectoryError, match="without 'frame_accuracy'"):
        Results.from_dict({"bleu": 0.3})


def _reading(*, slots: bool) -> Reading:
    rng = np.random.default_rng(0)
    signals = Signals(
        loss=rng.random(5),
        intent_margin=rng.random(5),
        slot_loss=rng.random(5) if slots else None,
        slot_margin=rng.random(5) if slots else None,
    )
    canaries = {
        name: CanaryReading(losses=rng.random(100), secret=rng.integers(10, size=2))
        for name in (("pin", "call") if slots else ())
    }
    return Reading(
        signals=signals,
        intent_accuracy=0.75,
        canaries=canaries,
        train_seconds=None if slots else 1.5,
    )


@pytest.mark.parametrize("slots", [True, False])
def test_a_reading_comes_back_from_its_file(slots: bool, tmp_path) -> None:
    reading = _reading(slots=slots)
    save_arrays(tmp_path / "m.npz", reading.to_arrays())
    found = Reading.from_arrays(load_arrays(tmp_path / "m.npz"))
    assert found.to_arrays().keys() == reading.to_arrays().keys()
    for name, values in reading.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[name], values)
    assert (found.train_seconds, found.canaries.keys()) == (
        reading.train_seconds,
        reading.canaries.keys(),
    )


def test_the_names_of_arrays_are_those_that_were_always_there() -> None:
    assert set(_reading(slots=True).to_arrays()) == {
        *("loss", "intent_margin", "slot_loss", "slot_margin", "intent_accuracy"),
        *("pin-losses", "pin-secret", "call-losses", "call-secret"),
    }
    assert set(_reading(slots=False).to_arrays()) == {
        *("loss", "intent_margin", "intent_accuracy", "train_seconds"),
    }


@pytest.mark.parametrize("missing", ["loss", "pin-secret"])
def test_a_reading_without_one_of_its_arrays_is_refused(missing: str) -> None:
    arrays = _reading(slots=True).to_arrays()
    del arrays[missing]
    with pytest.raises(ValueError, match="one model's reading"):
        Reading.from_arrays(arrays)


def test_settings_are_recorded_as_they_always_were() -> None:
    """A training or a study of an earlier version is resumed by comparing with this."""
    assert TrainSettings(data="d", epsilon=3.0, epochs=2.0, recipes=1).to_dict() == {
        "data": "d",
        "model": "lstm",
        "epsilon": "3",
        "delta": 1e-05,
        "epochs": 2.0,
        "batch_size": None,
        "learning_rate": None,
        "dropout": None,
        "max_grad_norm": 1.0,
        "vocabulary": "hashed",
        "labels": None,
        "engine": None,
        "physical_batch_size": 64,
        "seed": 0,
    }
    latest = TrainSettings(data="d", epsilon=math.inf).to_dict()
    assert latest["epsilon"] == "inf"
    assert latest["physical_batch_size"] is None  # what is computed at once depends on the model
    assert StudySettings(data="d", references=1, canaries=("pin:2:R=3",), recipes=1).to_dict() == {
        "data": "d",
        "model": "lstm",
        "epsilons": ["eps-inf", "eps-8", "eps-2"],
        "delta": 1e-05,
        "epochs": None,
        "batch_size": None,
        "dropout": None,
        "max_grad_norm": 1.0,
        "attacks": ["loss", "exposure", "extraction", "audit"],
        "canaries": ["pin:2:R=3"],
        "references": 1,
        "audit_examples": 2000,
        "confidence": 0.95,
        "physical_batch_size": 64,
        "seed": 0,
    }


@pytest.mark.parametrize("inside", [True, False], ids=["training", "study"])
def test_what_an_earlier_version_began_goes_on_with_its_recommendations(
    tmp_path: Path, inside: bool
) -> None:
    settings, record = TrainSettings(data="d", epsilon=3.0), tmp_path / "run.json"
    assert settings.to_dict()["recipes"] == 6
    assert as_begun(settings, record) == settings
    for begun in (1, 2, 3, 4, 5, 6):
        content = replace(settings, recipes=begun).to_dict()
        record.write_text(json.dumps({"settings": content} if inside else content))
        assert as_begun(settings, record).to_dict() == content
    asked = replace(settings, recipes=2)
    assert as_begun(asked, record) == asked, "others that are asked for are not passed over"
    for other in ("{", "[]"):
        record.write_text(other)
        assert as_begun(settings, record) == settings
