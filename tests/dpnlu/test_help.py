"""The help of every command: complete, with defaults, and with examples that work."""

import argparse
import io
import re
import shlex
from collections.abc import Iterator

import pytest

from dpnlu.cli import main as command_line
from dpnlu.cli.examples import EXAMPLES

# Not there yet; a test fails when it could leave the set.


def _commands() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action.choices
        for action in command_line._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands)


COMMANDS = sorted(_commands())


def _options(command: str) -> Iterator[argparse.Action]:
    parser = _commands()[command]
    return (a for a in parser._actions if not isinstance(a, argparse._HelpAction))


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def _alternatives(command: str) -> set[str]:
    """Options of which one has to be given."""
    groups = _commands()[command]._mutually_exclusive_groups
    return {_name(action) for group in groups if group.required for action in group._group_actions}


def test_every_command_says_what_it_does():
    (commands,) = (
        action
        for action in command_line._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    told = {action.dest for action in commands._choices_actions if action.help}
    assert told == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command):
    silent = [_name(action) for action in _options(command) if not (action.help or "").strip()]
    assert silent == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_may_be_left_out_says_what_happens_then(command):
    """Flags excepted, whose default is not to be set."""
    shown = _commands()[command]
    formatter = shown._get_formatter()
    silent = [
        _name(action)
        for action in _options(command)
        if action.option_strings
        and not action.required
        and action.nargs != 0
        and _name(action) not in _alternatives(command)
        and "(default: " not in formatter._expand_help(action)
    ]
    assert silent == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_default_that_is_told_is_the_one_that_holds(command):
    """Numbers and words as they are; what is None is told in words."""
    formatter = _commands()[command]._get_formatter()
    for action in _options(command):
        told = formatter._expand_help(action).rpartition("(default: ")[2].removesuffix(")")
        if action.default in (None, False, [], ()) or not action.option_strings:
            continue
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        parts = told.split()
        assert len(parts) == len(values), f"{_name(action)} tells {told}"
        for part, value in zip(parts, values, strict=True):
            assert type(value)(part) == value, f"{_name(action)} tells {told}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_ends_with_its_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main([command, "--help"])
    assert stop.value.code == 0
    _, found, end = capsys.readouterr().out.partition("\nexamples:\n")
    assert found
    shown = [line.strip() for line in end.splitlines() if line.strip()]
    assert shown == [
        line for example in EXAMPLES[command] for line in "\n".join(example).split("\n")
    ]


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_is_shown_where_greek_letters_cannot_be(arguments, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(SystemExit) as stop:
        command_line.main([*arguments, "--help"])
    assert stop.value.code == 0
    assert b"usage: dpnlu" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        line
        for command, examples in EXAMPLES.items()
        for _, text in examples
        for line in text.splitlines()
    ],
)
def test_an_example_parses(line):
    program, command, *arguments = shlex.split(line)
    assert program == "dpnlu"
    assert command_line._parser().parse_args([command, *arguments]).command == command


def test_every_example_is_under_its_command_and_every_command_has_one():
    assert set(EXAMPLES) == set(COMMANDS)
    for command, examples in EXAMPLES.items():
        lines = [line for _, text in examples for line in text.splitlines()]
        assert lines and all(shlex.split(line)[1] == command for line in lines)


def test_the_help_of_the_program_leads_to_that_of_its_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "dpnlu COMMAND --help" in said
    assert all(re.search(rf"^ +{command}\b", said, re.MULTILINE) for command in COMMANDS)
