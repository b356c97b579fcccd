"""The command line: what it prints, and one clear line for bad input."""

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpnlu.cli.main import main
from dpnlu.mechanism.plan import PrivacyPlan

ROWS = [
    {"text": f"{word} {number}", "intent": intent, "split": split}
    for split, numbers in (("train", range(12)), ("test", range(12, 16)))
    for number in numbers
    for word, intent in (("play", "music"), ("wake me at", "alarm"))
]


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path / "data.jsonl", ROWS)


TRAIN = ["train", "--epsilon", "inf", "--epochs", "1", "--quiet"]


def _train(data: Path, out: Path, *more: str) -> int:
    return main([*TRAIN, "--data", str(data), "--out", str(out), *more])


# ---- budget ------------------------------------------------------------------------------------


def test_budget_finds_the_noise_of_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "budget --num-examples 13084 --batch-size 256 --epochs 10 --epsilon 8 --json"
    assert main(arguments.split()) == 0
    found = json.loads(capsys.readouterr().out)
    plan = PrivacyPlan.calibrate(
        target_epsilon=8,
        target_delta=1e-5,
        num_examples=13084,
        expected_batch_size=256,
        epochs=10,
        max_grad_norm=1.0,
    )
    assert found["noise_multiplier"] == plan.noise_multiplier
    assert found["epsilon"] == plan.epsilon() <= 8
    assert found["steps"] == 511


def test_budget_finds_the_epsilon_of_a_schedule_and_its_constant_equal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    schedule = "--noise-multiplier 2 --noise-schedule exponential:0.8 --json"
    arguments = f"budget --num-examples 4000 --batch-size 400 --epochs 4 {schedule}"
    assert main(arguments.split()) == 0
    found = json.loads(capsys.readouterr().out)
    constant = found["constant_noise_multiplier_of_equal_epsilon"]
    assert 2 * 0.8**3 < constant < 2
    equal = f"budget --num-examples 4000 --batch-size 400 --epochs 4 --noise-multiplier {constant}"
    assert main([*equal.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == pytest.approx(
        found["epsilon"], rel=0.01
    )


def test_budget_prints_the_same_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("budget --num-examples 999 --batch-size 9 --epochs 1 --epsilon 1".split()) == 0
    printed = capsys.readouterr().out
    assert "adjacency: add-remove-one" in printed
    assert "noise multiplier: " in printed


def test_budget_prints_what_was_published_beside_epsilon_and_that_it_is_no_guarantee(
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--noise-multiplier", "0.5", "--microbatches", "4", "--as-published"]
    assert main([*SMALL_BUDGET, *more, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*SMALL_BUDGET, "--noise-multiplier", "1", "--json"]) == 0
    examples = json.loads(capsys.readouterr().out)
    assert found["epsilon_as_published"] == examples["epsilon"] < found["epsilon"] / 2
    assert main([*SMALL_BUDGET, *more]) == 0
    printed = capsys.readouterr().out
    assert "epsilon as published is: no guarantee: it takes C for the sensitivity" in printed


def test_budget_compares_batch_sizes_at_one_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL_BUDGET, "--epsilon", "3", "--plan"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [choice["batch_size"] for choice in found] == [1, 2, 5, 10, 20, 40, 80]
    assert main(arguments) == 0
    heads, *rows, note = capsys.readouterr().out.splitlines()
    assert len(rows) == 7 and "noise multiplier" in heads and "signal to noise:" in note
    assert len({len(row) for row in [heads, *rows]}) == 1


def test_budget_prices_tuning_and_finds_its_noise(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "budget --num-examples 1000 --batch-size 100 --epochs 2 --trials 9 --json".split()
    assert main([*asked, "--epsilon", "4"]) == 0
    noises = json.loads(capsys.readouterr().out)
    found = [noises[f"noise_multiplier_{way}"] for way in ("logarithmic", "geometric", "fixed")]
    assert found == sorted(found) and noises["epsilon"] == 4
    assert main([*asked, "--noise-multiplier", str(noises["noise_multiplier_geometric"])]) == 0
    epsilons = json.loads(capsys.readouterr().out)
    assert 3.9 < epsilons["epsilon_geometric"] <= 4 < epsilons["epsilon_fixed"]


SMALL_BUDGET = "budget --num-examples 1000 --batch-size 10 --epochs 3".split()


def test_budget_writes_an_infinite_epsilon_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL_BUDGET, "--noise-multiplier", "0", "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["epsilon"] is None
    assert found["noise_multiplier"] == 0
    assert main([*SMALL_BUDGET, "--noise-multiplier", "0"]) == 0
    assert "epsilon: inf" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["constant", "exponential:0.99"])
@pytest.mark.parametrize("noise", ["1e6", "1e100", "1e308"])
def test_budget_answers_for_any_noise(
    noise: str, schedule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--noise-multiplier", noise, "--noise-schedule", schedule, "--json"]
    assert main([*SMALL_BUDGET, *more]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == 0


BAD_BUDGETS = {
    "--epochs 1e300": "1e+09 steps at most",
    "--epochs 1e12": "1e+09 steps at most",
    "--epochs 0": "`epochs` > 0",
    "--epochs nan": "`epochs` > 0",
    "--num-examples 0": "`num_examples`",
    f"--num-examples {10**400}": "1e+12 at most",
    "--batch-size 0": "batch size between 1 and",
    "--delta nan": "`target_delta`",
    "--epsilon 0": "`target_epsilon` > 0",
    "--epsilon nan": "`target_epsilon` > 0",
    "--noise-multiplier nan": "`noise_multiplier` to be finite",
    "--noise-multiplier inf": "`noise_multiplier` to be finite",
    "--noise-multiplier -1": "`noise_multiplier` to be finite and >= 0",
    "--microbatches 0": "`microbatches`",
    "--as-published --epsilon 3": "leave `as_published` out",
    "--plan --noise-multiplier 1": "Expected --epsilon with --plan",
    "--plan --epsilon inf": "finite ε > 0",
    "--trials 0 --epsilon 3": "trials >= 1",
    "--trials inf --epsilon 3": "trials >= 1",
    "--trials 3 --epsilon inf": "finite ε > 0",
    "--trials 3 --plan --epsilon 3": "got --plan and --trials",
    "--trials 3 --as-published --microbatches 2 --epsilon 3": "got --trials and --as-published",
    "--trials 3 --accountant rdp --epsilon 3": "Expected --accountant pld with --trials",
    "--plan --accountant prv --epsilon 3": "Expected --accountant pld with --plan",
    "--noise-schedule fast": "`noise_schedule`",
    "--noise-schedule list:1,0": "list:1,0 reaches zero after 1 of 3",
}


@pytest.mark.parametrize("options", BAD_BUDGETS)
def test_a_bad_budget_is_one_line(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    noise = [] if "--epsilon" in options or "multiplier" in options else ["--epsilon", "3"]
    assert main([*SMALL_BUDGET, *noise, *options.split()]) == 2
    _is_one_line(capsys.readouterr().err, BAD_BUDGETS[options])


MAIN = "import sys; from dpnlu.cli.main import main; sys.exit(main(sys.argv[1:]))"
RUN_MAIN = [sys.executable, "-c", MAIN]
BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}


@pytest.mark.parametrize("arguments", [[*SMALL_BUDGET, "--epsilon", "3"], ["--help"]])
def test_a_reader_that_has_seen_enough_is_no_failure(arguments: list[str]) -> None:
    """As in `dpnlu budget … | head -1`."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*RUN_MAIN, *arguments], stdout=pipe, stderr=pipe, env=BUFFERED
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_output_that_cannot_be_written_is_a_failure() -> None:
    command = [*RUN_MAIN, *SMALL_BUDGET, "--epsilon", "3"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED
        )
    assert process.returncode == 1
    assert process.stderr == "dpnlu: error: No space left on device\n"


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], int]:
    """Runs a command that does this and nothing else."""

    def run(work: Callable[[], None]) -> int:
        monkeypatch.setattr("dpnlu.cli.budget.run", lambda options: work())
        return main([*SMALL_BUDGET, "--epsilon", "3"])

    return run


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_every_signal_to_end_interrupts_and_only_once(
    number: int,
    running: Callable[[Callable[[], None]], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tidied = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            for impatient in SIGNALS:
                os.kill(os.getpid(), impatient)
            time.sleep(0.01)
            tidied.append(True)

    before = [signal.getsignal(number) for number in SIGNALS]
    assert running(work) == 1
    assert tidied
    _is_one_line(capsys.readouterr().err, "interrupted; to go on, run the same command again")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_is_ignored_stays_ignored(
    running: Callable[[Callable[[], None]], int],
) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert running(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_a_command_leaves_signals_alone(
    running: Callable[[Callable[[], None]], int],
) -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(running, lambda: None).result() == 0


def test_budget_loads_no_torch_and_no_other_accountant() -> None:
    script = """
        import sys
        from dpnlu.cli.main import main
        main("budget --num-examples 999 --batch-size 9 --epochs 1 --epsilon 1".split())
        assert not {"torch", "dp_accounting", "opacus"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.filterwarnings("default")
def test_a_warning_comes_with_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "budget --num-examples 99 --batch-size 9 --epochs 1 --noise-multiplier 1 --delta 0.1"
    assert main(asked.split()) == 0
    assert capsys.readouterr().err.count("not below 1 / 99") == 1


# ---- train -------------------------------------------------------------------------------------


def test_train_writes_a_model_directory(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert _train(data, out, "--epsilon", "3", "--delta", "1e-3", "--batch-size", "8") == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "vocabulary.json",
        "plan.json",
        "ledger.jsonl",
        "metrics.json",
        "README.md",
    }
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["epsilon"] <= 3
    card = (out / "README.md").read_text(encoding="utf-8")
    for said in ("ε = ", "δ = 0.001", "presence of one training example", "Poisson", "one example"):
        assert said in card
    assert "label set was read from the data" in card
    assert "(Mironov 2012), against which there is --noise system." in card


def test_declared_labels_are_not_flagged(data: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('{"intents": ["music", "alarm", "other"]}', encoding="utf-8")
    more = ("--epsilon", "3", "--delta", "1e-3", "--batch-size", "8", "--labels", str(labels))
    assert _train(data, tmp_path / "m", *more, "--noise", "system") == 0
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert "label set was read from the data" not in card
    assert "--noise system" not in card


def test_the_card_of_an_ordinary_model_claims_nothing(data: Path, tmp_path: Path) -> None:
    assert _train(data, tmp_path / "m") == 0
    assert "No privacy guarantee" in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "m" / "plan.json").exists()


def test_an_interrupted_training_is_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dpnlu.runs.resumable

    out = tmp_path / "m"
    more = ("--epsilon", "3", "--delta", "1e-3", "--batch-size", "8", "--epochs", "3")
    results_of = dpnlu.runs.resumable.results_of

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dpnlu.runs.resumable, "results_of", interrupt)
    assert _train(data, out, *more) == 1
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(dpnlu.runs.resumable, "results_of", results_of)
    assert _train(data, out, *more) == 2
    assert _train(data, out, *more, "--resume", "--seed", "5") == 2
    assert _train(data, out, *more, "--resume") == 0
    assert not (out / "run.json").exists()
    assert not (out / "checkpoint.safetensors").exists()
    lines = (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 9  # the plan, and 3 epochs of 24 / 8 steps


# ---- bad input ---------------------------------------------------------------------------------


def _bad(rows: list[object]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        path = folder / "bad.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def _row(**changed: object) -> dict[str, object]:
    return {"text": "a b", "intent": "x", "tokens": ["a", "b"], "tags": ["O", "O"]} | changed


def _not_json(folder: Path) -> str:
    (folder / "bad.jsonl").write_text('{"text": \n', encoding="utf-8")
    return str(folder / "bad.jsonl")


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "bad.jsonl")
    return str(folder / "bad.jsonl")


def _written(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


BAD_DATA: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing file": (lambda folder: str(folder / "none.jsonl"), "existing file"),
    "unknown spec": (lambda folder: "atis:somewhere", "snips:DIR"),
    "not JSON": (_not_json, "line 1"),
    "no intent": (_bad([{"text": "a"}]), "intent"),
    "no text": (_bad([{"intent": "a"}]), "text"),
    "tags of another length": (_bad([_row(tags=["O"])]), "tag"),
    "invalid IOB": (_bad([_row(tags=["O", "I-x"])]), "I-x"),
    "one class": (_bad([_row(text=f"t {n}", tokens=["t", str(n)]) for n in range(60)]), "intent"),
    "no such user": (lambda folder: "~nosuchuser/x.jsonl", "home directory"),
    "no hub name": (lambda folder: "hf::", "hf:NAME"),
    "device": (lambda folder: "clinc150:/dev/zero", "regular file"),
    "pipe": (_pipe, "regular file"),
    "null label": (_bad([{"text": "a", "intent": None}]), "line 1: expected a row with 'intent'"),
    "number as label": (_bad([{"text": "a", "intent": 1}]), "got int"),
    "deep": (_written("deep.jsonl", b"[" * 100_000), "line 1: expected JSON that can be read"),
    "half a character": (_bad([_row(intent="\ud800")]), "line 1: "),
    "not UTF-8": (_written("latin.jsonl", b'{"text": "caf\xe9"}\n'), "line 1: expected UTF-8"),
    "cut off": (_written("cut.jsonl.gz", gzip.compress(b"x" * 99)[:-9]), "expected gzip data"),
    "empty": (_written("empty.jsonl", b""), "expected at least one row in train"),
    "header only": (_written("header.csv", b"text,intent\n"), "expected at least one row in train"),
    "open quote": (_written("quote.csv", b'text,intent\n"a,b\n'), "line 2: "),
    "long name": (lambda folder: "a" * 5_000 + ".jsonl", "File name too long"),
    "empty split": (
        _bad([_row(split="train"), _row(intent="y", text="c d", split="train")]),
        "test",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_nothing_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, said = BAD_DATA[case]
    spec = write(tmp_path)
    assert main([*TRAIN, "--data", spec, "--out", str(tmp_path / "m")]) == 2
    _is_one_line(capsys.readouterr().err, said)
    assert not (tmp_path / "m").exists()


BAD_OPTIONS = {
    "epsilon 0": (["--epsilon", "0"], "ε > 0"),
    "epsilon below 0": (["--epsilon", "-1"], "ε > 0"),
    "epsilon no number": (["--epsilon", "nan"], "ε > 0"),
    "delta 0": (["--epsilon", "1", "--delta", "0"], "target_delta"),
    "delta 1": (["--epsilon", "1", "--delta", "1"], "target_delta"),
    "batch above the data": (["--epsilon", "1", "--batch-size", "1000"], "batch size"),
    "unknown model": (["--model", "gru"], "lstm or encoder:NAME_OR_PATH"),
    "no such encoder": (["--model", "encoder:/nowhere/at/all"], "/nowhere/at/all"),
    "unknown engine": (["--epsilon", "1", "--batch-size", "4", "--engine", "warp"], "book_keeping"),
    "no such labels": (["--labels", "/nowhere"], "/nowhere"),
    "no such words": (["--vocabulary", "/nowhere"], "/nowhere"),
    "words of an encoder": (
        ["--model", "encoder:e", "--vocabulary", "fitted"],
        "--vocabulary with --model lstm, got it with encoder:e",
    ),
    "dropout 1": (["--dropout", "1"], "dropout in [0, 1)"),
    "unknown option": (["--speed", "9"], "--speed"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line_and_nothing_written(
    case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, said = BAD_OPTIONS[case]
    try:
        status = _train(data, tmp_path / "m", *options)
    except SystemExit as exit:
        status = int(exit.code or 0)
    assert status == 2
    _is_one_line(capsys.readouterr().err, said)
    assert not (tmp_path / "m").exists()


def _is_one_line(printed: str, said: str) -> None:
    lines = [line for line in printed.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("dpnlu: error: ")
    assert said in lines[0]


def test_arguments_that_no_report_can_hold_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(data, tmp_path / "caf\udce9") == 2
    _is_one_line(capsys.readouterr().err, "Expected arguments in UTF-8")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.filterwarnings("default")
def test_a_delta_above_one_over_n_warns(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        _train(data, tmp_path / "m", "--epsilon", "3", "--delta", "0.1", "--batch-size", "8") == 0
    )
    assert capsys.readouterr().err.count("dpnlu: warning: δ = 0.1") == 1


def test_a_folder_that_holds_something_else_is_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "thesis.tex").write_text("precious", encoding="utf-8")
    assert _train(data, out) == 2
    _is_one_line(capsys.readouterr().err, "something else")
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    more = ("--epsilon", "3", "--delta", "1e-3", "--batch-size", "8")
    assert _train(data, tmp_path / "m", *more) == 2
    _is_one_line(capsys.readouterr().err, "No space left on device")
    assert not (tmp_path / "m" / "config.json").exists()


def test_an_internal_failure_has_status_1(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dpnlu.runs.resumable

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(dpnlu.runs.resumable, "train", fail)
    assert _train(data, tmp_path / "m") == 1
    _is_one_line(capsys.readouterr().err, "RuntimeError: it broke")
