"""What an interrupted training leaves is recognised, and resumed, started anew or refused."""

import fcntl
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpnlu.cli.main import main
from dpnlu.mechanism import noise
from dpnlu.mechanism.ledger import Ledger
from dpnlu.runs import physical_size, probing
from dpnlu.runs.model_directory import load
from dpnlu.training.handle import PrivateTraining

ROWS = [
    {"text": f"{word} {number}", "intent": intent, "split": split}
    for split, numbers in (("train", range(12)), ("test", range(12, 16)))
    for number in numbers
    for word, intent in (("play", "music"), ("wake me at", "alarm"))
]
TRAIN = [row for row in ROWS if row["split"] == "train"]
WORDS = ["play", "wake", "me", "at"]
STEPS = 6
FILES = {
    *("README.md", "config.json", "ledger.jsonl", "metrics.json"),
    *("model.safetensors", "plan.json", "vocabulary.json"),
}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Training:
    """`dpnlu train` into a folder, of a small private model unless other options are given."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out = folder, folder / "m"
        self.ledger, self.run = self.out / "ledger.jsonl", self.out / "run.json"
        self.checkpoint = self.out / "checkpoint.safetensors"
        self._capsys = capsys
        _write(folder / "data.jsonl", ROWS)
        self.write_words(WORDS)

    def write_words(self, words: list[str]) -> None:
        (self.folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")

    def __call__(self, *more: str) -> int:
        given = ["--data", str(self.folder / "data.jsonl"), "--out", str(self.out), "--quiet"]
        given += ["--vocabulary", str(self.folder / "words.txt"), "--epsilon", "3"]
        given += ["--delta", "1e-3", "--batch-size", "8", "--epochs", "2"]
        self._capsys.readouterr()
        return main(["train", *given, *more])

    def assert_refused(self, says: str, *more: str, status: int = 2) -> None:
        """… in one line, and nothing in the folder has changed."""
        before = self.content()
        assert self(*more) == status
        (line,) = self._capsys.readouterr().err.splitlines()
        assert line.startswith("dpnlu: error: ") and says in line, line
        assert self.content() == before

    def assert_finished(self, *, steps: int = STEPS) -> None:
        assert load(self.out).metrics["epsilon"] <= 3
        recorded = Ledger.read(self.ledger)
        assert len(recorded) == steps and recorded.epsilon() <= 3
        assert {path.name for path in self.out.rglob("*")} == FILES

    def content(self) -> dict[str, bytes]:
        if not self.out.exists():
            return {}
        return {path.name: path.read_bytes() for path in self.out.rglob("*") if path.is_file()}


@pytest.fixture
def training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Training:
    return Training(tmp_path, capsys)


@pytest.fixture
def interrupted(training: Training, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    """A training that was interrupted when its fourth release was recorded, but not applied."""
    _interrupt(training, monkeypatch, after=4)
    return training


def _interrupt(training: Training, monkeypatch: pytest.MonkeyPatch, *more: str, after: int) -> None:
    really = Ledger.append

    def append(ledger: Ledger, release: Any) -> None:
        really(ledger, release)
        if len(ledger) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", append)
        assert training(*more) == 1


# ---- resumed -----------------------------------------------------------------------------------


def test_an_interrupted_training_is_resumed(interrupted: Training) -> None:
    assert len(Ledger.read(interrupted.ledger)) == 4
    interrupted.assert_refused("add --resume")
    assert interrupted("--resume") == 0
    interrupted.assert_finished()


def test_a_training_with_the_system_s_noise_is_resumed_with_it(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    really = noise.system_gaussian

    def draw(count: int) -> torch.Tensor:
        drawn.append(count)
        return really(count)

    monkeypatch.setattr(noise, "system_gaussian", draw)
    _interrupt(training, monkeypatch, "--noise", "system", after=4)
    of_a_step = sum(drawn) / 4
    training.assert_refused("Expected the settings", "--resume")
    assert training("--resume", "--noise", "system") == 0
    training.assert_finished()
    weights = sum(p.numel() for p in load(training.out).classifier.model.parameters())
    assert of_a_step == 4 * weights and sum(drawn) == STEPS * of_a_step


AUTO = ("--physical-batch-size", "auto")


def test_a_size_that_was_found_is_kept_recorded_and_printed(
    training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """… and used, though another would be found when training is resumed."""
    largest: list[int] = []
    really = PrivateTraining.loader

    def loader(private: PrivateTraining, *given: Any, **named: Any) -> Any:
        largest.append(named["physical_batch_size"])
        return really(private, *given, **named)

    monkeypatch.setattr(PrivateTraining, "loader", loader)
    monkeypatch.setattr(probing, "physical_batch_size", lambda *_, **__: 3)
    _interrupt(training, monkeypatch, *AUTO, after=4)
    assert json.loads(training.run.read_text())["physical_batch_size"] == 3
    monkeypatch.setattr(probing, "physical_batch_size", lambda *_, **__: 5)
    training.assert_refused("Expected the settings", "--resume", "--physical-batch-size", "3")
    assert training("--resume", *AUTO) == 0
    assert "physical batch size: 3\n" in capsys.readouterr().out
    training.assert_finished()
    assert load(training.out).metrics["physical_batch_size"] == 3
    assert "| physical batch size | 3 |" in (training.out / "README.md").read_text()
    assert largest == [3, 3]


@pytest.mark.parametrize("epsilon", ["3", "inf"])
def test_a_size_is_found_on_random_texts_and_leaves_no_trace(
    training: Training, epsilon: str
) -> None:
    """No more than a logical batch has: 8 are expected; or what there is, in ordinary training."""
    assert training("--epsilon", epsilon, *AUTO) == 0
    found = load(training.out).metrics["physical_batch_size"]
    assert found == (len(TRAIN) if epsilon == "inf" else 8 + math.ceil(5 * 8**0.5))
    assert {path.name for path in training.out.rglob("*")} <= FILES


def test_where_memory_is_unknown_a_number_is_asked_for(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(physical_size, "_available", lambda: None)
    training.assert_refused("Expected a number for --physical-batch-size on cpu", *AUTO)
    monkeypatch.setattr(physical_size, "_limit", lambda *_: 1.0)
    training.assert_refused("to hold the step of one example", *AUTO)
    monkeypatch.undo()
    assert training() == 0, "nothing of it is left"


@pytest.mark.parametrize("command", ["compare", "diagnose"])
def test_a_size_is_found_by_train_alone(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--out", str(tmp_path / "c")] if command == "compare" else ["--public"]
    given = ["--data", "synthetic:200", *AUTO, "--quiet", *more]
    given += ["--epsilons" if command == "compare" else "--epsilon", "3"]
    assert main([command, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "got auto, which `dpnlu train` alone finds out" in line
    assert not (tmp_path / "c").exists()


def test_a_torn_line_does_not_raise_epsilon_above_the_target(interrupted: Training) -> None:
    """Batches are all drawn by the loader, and the ledger says so."""
    interrupted.ledger.write_bytes(interrupted.ledger.read_bytes()[:-9])
    assert interrupted("--resume") == 0
    interrupted.assert_finished()


def _tear_in_format_1(training: Training) -> None:
    """A torn line, in a ledger that does not say what it may have stood for."""
    first, *lines = training.ledger.read_text(encoding="utf-8").splitlines()
    old = json.dumps({"ledger": 1, "plan": json.loads(first)["plan"]})
    training.ledger.write_text("\n".join([old, *lines])[:-9], encoding="utf-8")


def test_a_torn_line_of_a_ledger_that_does_not_say_so_leaves_fewer_steps(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = ("--epochs", "20")
    _interrupt(training, monkeypatch, *longer, after=4)
    _tear_in_format_1(training)
    assert training(*longer, "--resume") == 0
    made = len(Ledger.read(training.ledger))
    assert 4 < made < 60
    training.assert_finished(steps=made)


def test_a_torn_line_that_may_have_cost_more_than_all_is_refused(interrupted: Training) -> None:
    _tear_in_format_1(interrupted)
    assert interrupted("--resume") == 2
    interrupted.assert_refused("more may have been spent", "--resume")


def test_a_training_that_was_started_before_data_were_fingerprinted_is_resumed(
    interrupted: Training,
) -> None:
    run = json.loads(interrupted.run.read_text(encoding="utf-8"))
    interrupted.run.write_text(json.dumps(run["settings"]), encoding="utf-8")
    interrupted.checkpoint.unlink()  # it had no name of its training in it
    assert interrupted("--resume") == 0
    interrupted.assert_finished()


def test_an_older_checkpoint_costs_what_was_learnt_since_and_nothing_else(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(training, monkeypatch, after=2)
    older = training.checkpoint.read_bytes()
    _interrupt(training, monkeypatch, "--resume", after=5)
    assert training.checkpoint.read_bytes() != older
    training.checkpoint.write_bytes(older)
    assert training("--resume") == 0
    training.assert_finished()


def test_a_training_is_resumed_elsewhere(interrupted: Training) -> None:
    moved = interrupted.out.with_name("moved")
    interrupted.out.rename(moved)
    interrupted.out, interrupted.ledger = moved, moved / "ledger.jsonl"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert interrupted("--resume") == 0
    finally:
        torch.set_num_threads(before)
    interrupted.assert_finished()


def test_partial_files_are_no_part_of_the_model(interrupted: Training) -> None:
    for name in ("config.json", "model.safetensors", "checkpoint.safetensors", "run.json"):
        (interrupted.out / f"{name}.partial").mkdir()
        (interrupted.out / f"{name}.partial" / ".tmpHalf").write_bytes(b"half")
    (interrupted.out / "ledger.jsonl.partial").write_bytes(b"half")
    assert interrupted("--resume") == 0
    interrupted.assert_finished()


def test_a_model_that_was_written_and_not_tidied_up_is(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dpnlu.runs.resumable

    with monkeypatch.context() as patched:
        patched.setattr(dpnlu.runs.resumable, "tidy", lambda directory: os.kill(os.getpid(), 15))
        assert training() == 1
    assert training.run.exists() and training.checkpoint.exists()
    load(training.out)
    training.assert_refused("finished")
    training.assert_refused("settings", "--resume", "--seed", "5")
    (training.out / "notes.txt").touch()
    training.assert_refused("notes.txt was changed, added", "--resume")
    (training.out / "notes.txt").unlink()
    assert training("--resume") == 0
    training.assert_finished()
    training.assert_refused("finished", "--resume")


# ---- started anew ------------------------------------------------------------------------------

ABORTED: dict[str, Callable[[Training], object]] = {
    "after mkdir": lambda training: [path.unlink() for path in training.out.iterdir()],
    "while run.json was written": lambda training: [
        (training.out / "run.json.partial").mkdir(),
        training.run.rename(training.out / "run.json.partial" / "run.json"),
        training.ledger.unlink(),
    ],
    "before the ledger": lambda training: training.ledger.unlink(),
    "before the ledger's first line": lambda training: os.truncate(training.ledger, 0),
    "within the ledger's first line": lambda training: os.truncate(training.ledger, 20),
    "before the first release": lambda training: None,
}


@pytest.mark.parametrize("how", [(), ("--resume",)], ids=["begin", "resume"])
@pytest.mark.parametrize("death", ABORTED)
def test_what_an_aborted_start_leaves_is_started_anew(
    training: Training, monkeypatch: pytest.MonkeyPatch, death: str, how: tuple[str, ...]
) -> None:
    """Also by a training with other settings: nothing was spent."""
    import dpnlu.runs.resumable

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dpnlu.runs.resumable, "train", dies)
        assert training("--seed", "5") == 1
    assert set(training.content()) == {"run.json", "ledger.jsonl"}
    ABORTED[death](training)
    assert training(*how) == 0
    training.assert_finished()


BAD_SETTINGS = {
    "no epochs": (["--epochs", "0"], "`epochs`"),
    "epochs below 0": (["--epochs=-1"], "`epochs`"),
    "epochs no number": (["--epochs", "nan"], "`epochs`"),
    "endless epochs": (["--epochs", "inf"], "`epochs`"),
    "no batch": (["--batch-size", "0"], "`batch_size`"),
    "batch below 0": (["--batch-size=-8"], "`batch_size`"),
    "rate 0": (["--learning-rate", "0"], "`learning_rate`"),
    "rate below 0": (["--learning-rate=-1"], "`learning_rate`"),
    "rate infinite": (["--learning-rate", "inf"], "`learning_rate`"),
    "rate no number": (["--learning-rate", "nan"], "`learning_rate`"),
    "noise from nowhere": (["--noise", "dice"], "`noise`"),
}


@pytest.mark.parametrize("epsilon", ["3", "inf"])
@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_an_invalid_setting_is_refused_before_anything_is_written(
    training: Training, case: str, epsilon: str
) -> None:
    options, says = BAD_SETTINGS[case]
    training.assert_refused(says, "--epsilon", epsilon, *options)
    assert not training.out.exists()


def test_an_engine_of_another_plan_is_refused_before_anything_is_written(
    training: Training,
) -> None:
    training.assert_refused("clipping unit", "--engine", "microbatch")
    assert not training.out.exists()


def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_written(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dpnlu.nlu.classifier

    class Normalized(dpnlu.nlu.classifier.BiLSTMClassifier):
        def __init__(self, **sizes: Any) -> None:
            super().__init__(**sizes)
            self.normalization = torch.nn.BatchNorm1d(3)

    monkeypatch.setattr(dpnlu.nlu.classifier, "BiLSTMClassifier", Normalized)
    training.assert_refused("batch normalisation")
    assert not training.out.exists()


# ---- refused -----------------------------------------------------------------------------------


def _rename_intent(training: Training) -> None:
    _write(
        training.folder / "data.jsonl",
        [row | {"intent": {"music": "songs"}.get(row["intent"], row["intent"])} for row in ROWS],
    )


OTHER_DATA: dict[str, Callable[[Training], None]] = {
    "other texts": lambda training: _write(
        training.folder / "data.jsonl", [ROWS[0] | {"text": "play 99"}, *ROWS[1:]]
    ),
    "an intent renamed": _rename_intent,
    "a word list in another order": lambda training: training.write_words(WORDS[::-1]),
}


@pytest.mark.parametrize("change", OTHER_DATA)
def test_other_data_are_refused(interrupted: Training, change: str) -> None:
    OTHER_DATA[change](interrupted)
    interrupted.assert_refused("Expected the data", "--resume")


def _edited_ledger(change: Callable[[list[str]], list[str]]) -> Callable[[Training], None]:
    def edit(training: Training) -> None:
        lines = training.ledger.read_text(encoding="utf-8").splitlines()
        training.ledger.write_text("\n".join(change(lines)) + "\n", encoding="utf-8")

    return edit


def _with_noise(line: str) -> str:
    entry = json.loads(line)
    (entry.get("plan") or entry)["noise_multiplier"] = 50.0
    return json.dumps(entry)


CHANGED: dict[str, tuple[Callable[[Training], None], str]] = {
    "more noise in one line": (
        _edited_ledger(lambda lines: [*lines[:2], _with_noise(lines[2]), *lines[3:]]),
        "as the plan has it",
    ),
    "more noise in plan and lines": (
        _edited_ledger(lambda lines: [_with_noise(line) for line in lines]),
        "begin with the plan of this training",
    ),
    "more steps": (
        _edited_ledger(lambda lines: [lines[0].replace('"steps": 6', '"steps": 60'), *lines[1:]]),
        "begin with the plan of this training",
    ),
    "a line removed": (_edited_ledger(lambda lines: [*lines[:2], *lines[3:]]), "line removed"),
    "the last lines cut off": (
        _edited_ledger(lambda lines: lines[:2]),
        "the 3 releases of the checkpoint at least, got 1",
    ),
    "all lines cut off": (
        _edited_ledger(lambda lines: lines[:1]),
        "the 3 releases of the checkpoint at least, got 0",
    ),
    "an empty ledger": (lambda training: os.truncate(training.ledger, 0), "begin with the plan"),
    "no ledger": (lambda training: training.ledger.unlink(), "No such file"),
    "a checkpoint of something else": (
        lambda training: training.checkpoint.write_bytes(b"?"),
        "checkpoint of this model",
    ),
}


def test_another_budget_is_refused_however_near(interrupted: Training) -> None:
    interrupted.assert_refused("settings", "--resume", "--epsilon", "2.9999999")


def test_noise_that_another_version_calibrated_is_kept(interrupted: Training) -> None:
    first, *lines = interrupted.ledger.read_text(encoding="utf-8").splitlines()
    noise = json.loads(first)["plan"]["noise_multiplier"]
    edited = [line.replace(str(noise), str(noise * 1.001)) for line in (first, *lines)]
    interrupted.ledger.write_text("\n".join(edited) + "\n", encoding="utf-8")
    assert interrupted("--resume") == 0
    interrupted.assert_finished()
    assert Ledger.read(interrupted.ledger).plan.noise_multiplier == noise * 1.001


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_record_is_refused(interrupted: Training, change: str) -> None:
    edit, says = CHANGED[change]
    edit(interrupted)
    interrupted.assert_refused(says, "--resume")


def test_a_checkpoint_of_another_training_is_refused(
    interrupted: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has learnt was never recorded here."""
    stranger = interrupted.checkpoint.read_bytes()
    shutil.rmtree(interrupted.out)
    _interrupt(interrupted, monkeypatch, after=4)
    assert interrupted.checkpoint.read_bytes() != stranger
    interrupted.checkpoint.write_bytes(stranger)
    interrupted.assert_refused("another training", "--resume")


def test_an_untrained_model_is_never_saved(interrupted: Training) -> None:
    """All releases made and no checkpoint: only the initial weights are there."""
    plan = Ledger.read(interrupted.ledger).plan
    with Ledger.resume(interrupted.ledger) as ledger:
        for step in range(len(ledger), STEPS):
            ledger.append(plan.event_at(step))
    interrupted.checkpoint.unlink()
    interrupted.assert_refused("train anew", "--resume")


def test_a_short_training_is_saved_before_it_ends(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dpnlu.runs.resumable

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dpnlu.runs.resumable, "results_of", dies)
        assert training("--epochs", "0.6") == 1
    assert training.checkpoint.exists()
    assert training("--epochs", "0.6", "--resume") == 0
    training.assert_finished(steps=2)


def test_a_folder_is_trained_in_by_one_process(training: Training) -> None:
    """… whether it starts or is resumed; ordinary training has no ledger that would be locked."""
    training.out.mkdir()
    file = os.open(training.out, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    for options in ((), ("--resume",), ("--epsilon", "inf")):
        training.assert_refused("another training is going on in it", *options)
    os.close(file)
    assert training() == 0


STRANGE: dict[str, Callable[[Path], object]] = {
    "a file": lambda out: out.touch(),
    "a thesis": lambda out: (out.mkdir(), (out / "thesis.tex").touch()),
    "somebody's run.json": lambda out: (
        out.mkdir(),
        (out / "run.json").write_text('{"speed": 3}', encoding="utf-8"),
    ),
    "no JSON": lambda out: (out.mkdir(), (out / "run.json").write_text("{", encoding="utf-8")),
    "a list": lambda out: (out.mkdir(), (out / "run.json").write_text("[]", encoding="utf-8")),
    "a ledger": lambda out: (out.mkdir(), (out / "ledger.jsonl").touch()),
    "a download": lambda out: (out.mkdir(), (out / "film.mp4.partial").touch()),
}


@pytest.mark.parametrize("how", [(), ("--resume",)], ids=["begin", "resume"])
@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_not_ours_is_left_alone(
    training: Training, kind: str, how: tuple[str, ...]
) -> None:
    STRANGE[kind](training.out)
    training.assert_refused("found something else", *how)


# ---- while it runs -----------------------------------------------------------------------------


def _at_release(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    really = Ledger.append

    def append(ledger: Ledger, release: Any) -> None:
        if len(ledger) == number:
            act()
        really(ledger, release)

    monkeypatch.setattr(Ledger, "append", append)


@pytest.mark.parametrize("how", ["removed", "cut off", "written to"])
def test_a_ledger_that_is_touched_stops_training(
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    def touch() -> None:
        if how == "removed":
            training.ledger.unlink()
        elif how == "cut off":
            os.truncate(training.ledger, 0)
        else:
            training.ledger.write_bytes(training.ledger.read_bytes() + b"\n")

    _at_release(monkeypatch, 3, touch)
    assert training() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "as this training left it" in line
    assert "model.safetensors" not in training.content()


def test_a_ledger_that_is_edited_in_place_costs_the_model(
    training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit() -> None:
        content = training.ledger.read_bytes()
        place = content.rindex(b'"noise_multiplier": ') + len(b'"noise_multiplier": ')
        with training.ledger.open("r+b") as file:
            file.seek(place)
            file.write(b"9")

    _at_release(monkeypatch, 4, edit)
    assert training() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "as the plan has it" in line
    assert not (training.out / "config.json").exists()


def test_termination_is_an_interruption(
    training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        _at_release(patched, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert training() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: interrupted") and "--resume" in line
    assert signal.getsignal(signal.SIGTERM) == before
    assert training("--resume") == 0
    training.assert_finished()


@pytest.mark.parametrize("epsilon", ["3", "inf"])
def test_a_diverged_model_is_not_saved(
    training: Training, capsys: pytest.CaptureFixture[str], epsilon: str
) -> None:
    assert training("--epsilon", epsilon, "--learning-rate", "1e38", "--epochs", "4") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and "diverged" in line
    assert not {"config.json", "model.safetensors"} & set(training.content())
