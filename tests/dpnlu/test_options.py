"""Options are made of settings: what a command line says is what the code is given."""

import argparse
import math
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields
from typing import Any

import pytest

from dpnlu.cli.options import add_options, settings_from
from dpnlu.compare.settings import AttackSettings, StudySettings
from dpnlu.runs.setting import setting
from dpnlu.runs.settings import TrainSettings


def _parsed(settings: type, line: str) -> Any:
    parser = argparse.ArgumentParser()
    add_options(parser, settings)
    return settings_from(settings, parser.parse_args(line.split()))


MINIMAL = [
    (
        TrainSettings,
        "--data d --epsilon inf",
        TrainSettings(data="d", model="lstm", epsilon=math.inf),
    ),
    (StudySettings, "--data d", StudySettings(data="d")),
    (AttackSettings, "--data d", AttackSettings(data="d")),
]
FULL = [
    (
        TrainSettings,
        "--data d --model encoder:e --epsilon 3 --delta 1e-4 --epochs 2.5 --batch-size 7 "
        "--learning-rate 0.1 --dropout 0.2 --max-grad-norm 2 --vocabulary fitted --labels f "
        "--weight-decay 0.3 --characters 6 --redact-digits --patience 2 --slot-loss words "
        "--recipes 1 --clipping automatic --noise-schedule step:0.5:3 "
        "--engine opacus --physical-batch-size 5 --device cpu --seed 9 --unit user "
        "--examples-per-user 4 --public p --public-use both --public-weight 0.3 "
        "--noise system",
        TrainSettings(
            data="d",
            model="encoder:e",
            epsilon=3.0,
            delta=1e-4,
            epochs=2.5,
            batch_size=7,
            learning_rate=0.1,
            dropout=0.2,
            max_grad_norm=2.0,
            noise_schedule="step:0.5:3",
            clipping="automatic",
            weight_decay=0.3,
            characters=6,
            redact_digits=True,
            slot_loss="words",
            recipes=1,
            patience=2,
            vocabulary="fitted",
            labels="f",
            engine="opacus",
            physical_batch_size=5,
            device="cpu",
            seed=9,
            unit="user",
            examples_per_user=4,
            public="p",
            noise="system",
            public_use="both",
            public_weight=0.3,
        ),
    ),
    (
        StudySettings,
        "--data d --model encoder:e --epsilons inf 4 --delta 1e-4 --epochs 2.5 --batch-size 7 "
        "--dropout 0.2 --max-grad-norm 2 --attacks loss rmia --canaries pin:2:R=3 call:1:R=2 "
        "--weight-decay 0.3 --characters 6 --redact-digits --patience 2 --slot-loss words "
        "--recipes 1 --clipping automatic --noise-schedule step:0.5:3 --decimals 3 "
        "--searches beam coordinates --audit-canaries 7 --retrainings 2 "
        "--references 4 --audit-examples 33 --confidence 0.9 --physical-batch-size 5 "
        "--device cpu --seed 9 --unit user --examples-per-user 4",
        StudySettings(
            data="d",
            model="encoder:e",
            epsilons=(math.inf, 4.0),
            delta=1e-4,
            epochs=2.5,
            batch_size=7,
            dropout=0.2,
            max_grad_norm=2.0,
            noise_schedule="step:0.5:3",
            clipping="automatic",
            weight_decay=0.3,
            characters=6,
            redact_digits=True,
            slot_loss="words",
            recipes=1,
            patience=2,
            decimals=3,
            searches=("beam", "coordinates"),
            audit_canaries=7,
            retrainings=2,
            attacks=("loss", "rmia"),
            canaries=("pin:2:R=3", "call:1:R=2"),
            references=4,
            audit_examples=33,
            confidence=0.9,
            physical_batch_size=5,
            device="cpu",
            seed=9,
            unit="user",
            examples_per_user=4,
        ),
    ),
    (
        AttackSettings,
        "--data d --attacks loss --references 4 --audit-examples 33 --confidence 0.9 "
        "--physical-batch-size 5 --device cpu --seed 9",
        AttackSettings(
            data="d",
            attacks=("loss",),
            references=4,
            audit_examples=33,
            confidence=0.9,
            physical_batch_size=5,
            device="cpu",
            seed=9,
        ),
    ),
    (
        AttackSettings,
        "--attacks extraction --prefix one two --length 3 --candidates a b --intent i --slot s "
        "--search beam --target labels --public p --decimals 2",
        AttackSettings(
            attacks=("extraction",),
            prefix=("one", "two"),
            length=3,
            candidates=("a", "b"),
            intent="i",
            slot="s",
            search="beam",
            target="labels",
            public="p",
            decimals=2,
        ),
    ),
]


@pytest.mark.parametrize(("settings", "line", "expected"), [*MINIMAL, *FULL])
def test_a_command_line_and_code_ask_for_the_same(
    settings: type, line: str, expected: object
) -> None:
    assert _parsed(settings, line) == expected


def test_a_number_may_be_left_to_be_found() -> None:
    line = "--data d --epsilon 3 --physical-batch-size auto"
    expected = TrainSettings(data="d", epsilon=3.0, physical_batch_size="auto")
    assert _parsed(TrainSettings, line) == expected
    assert _parsed(TrainSettings, line.replace("auto", "12")).number_at_once == 12
    with pytest.raises(ValueError, match="Expected a number for --physical-batch-size, got auto"):
        assert expected.number_at_once


@pytest.mark.parametrize("settings", [TrainSettings, StudySettings, AttackSettings])
def test_the_full_lines_leave_no_setting_as_it_is_by_default(settings: type) -> None:
    asked = [expected for kind, _, expected in FULL if kind is settings]
    for field in fields(settings):
        values = [getattr(expected, field.name) for expected in asked]
        assert field.default is MISSING or any(value != field.default for value in values)


@pytest.mark.parametrize("settings", [TrainSettings, StudySettings, AttackSettings])
def test_every_option_says_what_it_means_and_its_default(settings: type) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, settings)
    for action in parser._actions[1:]:  # the first is --help
        assert action.help
        assert action.required or "(default: " in action.help, action.dest
    parser.format_help()


@pytest.mark.parametrize(
    ("settings", "line", "says"),
    [
        (TrainSettings, "--data d", "--epsilon"),
        (TrainSettings, "--data d --epsilon none", "expected ε > 0 or inf, got none"),
        (TrainSettings, "--data d --epsilon 3 4", "unrecognized arguments: 4"),
        (StudySettings, "--data d --epsilons", "at least one argument"),
        (StudySettings, "--data d --epsilons 3 -1", "expected ε > 0 or inf, got -1"),
        (StudySettings, "--epsilons 3", "--data"),
        (TrainSettings, "--data d --physical-batch-size all", "a whole number or auto, got all"),
        (AttackSettings, "--data d --seed 1.5", "--seed: invalid int value"),
    ],
)
def test_what_cannot_be_parsed_is_refused(
    settings: type, line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parsed(settings, line)
    assert says in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A dataclass of another kind than the commands have so far."""

    shares: tuple[int, ...] | None = setting("100 % in parts", default=None)
    names: tuple[str, ...] = setting("who gets them", default=("a", "b"))


def test_a_tuple_may_be_absent_and_a_help_may_hold_a_percent_sign(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _parsed(Shares, "") == Shares()
    assert _parsed(Shares, "--shares 60 40 --names x") == Shares(shares=(60, 40), names=("x",))
    with pytest.raises(SystemExit):
        _parsed(Shares, "--help")
    printed = capsys.readouterr().out
    assert "100 % in parts" in printed and "(default: a b)" in printed


@pytest.mark.parametrize("command", ["train", "compare", "attack"])
def test_help_loads_neither_torch_nor_attacks(command: str) -> None:
    code = f"""if True:
        import sys
        from dpnlu.cli.main import main
        try:
            main([{command!r}, "--help"])
        except SystemExit:
            print(sorted({{"torch", "scipy", "attacks"}} & set(sys.modules)))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
