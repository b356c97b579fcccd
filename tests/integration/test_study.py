"""A whole study at toy size: train, attack, report, interrupt, resume."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from attacks.canaries import all_secrets
from attacks.farm import load_arrays
from attacks.patterns import parse_canary
from attacks.report import validate
from attacks.signals import Signals
from dpnlu.cli.main import main
from dpnlu.compare.attacking import Claim, Findings, attack
from dpnlu.compare.budget import Budget
from dpnlu.compare.reading import Reading, read_canary_losses, read_signals
from dpnlu.compare.settings import StudySettings
from dpnlu.compare.study import Study, canary_example
from dpnlu.compare.training import claimed_study
from dpnlu.mechanism import noise
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Architecture, build
from dpnlu.nlu.data import Example, HashedVocabulary, drop_repeated, synthetic_corpus
from dpnlu.nlu.encoding import Labels, batches, encode_all
from dpnlu.nlu.models import Batch
from dpnlu.runs.directory import claimed
from dpnlu.runs.experiment import Experiment
from dpnlu.training.loop import ComputeConfig, Recipe

# With `--dist loadgroup`, one worker makes the study for all.
pytestmark = [pytest.mark.xdist_group("study"), pytest.mark.usefixtures("quick_studies")]

COMPARE = [
    *("compare", "--data", "synthetic:300", "--epsilons", "inf", "8", "--epochs", "2"),
    *("--batch-size", "60", "--references", "3", "--audit-examples", "120"),
    *("--canaries", "pin:2:R=5", "--quiet"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder


def _report(folder: Path) -> dict[str, object]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def _assert_same_signals(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    """… of a model trained twice, which takes another time."""
    assert set(found) == set(expected)
    for name in set(found) - {"train_seconds"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_report_keeps_its_contract(out: Path) -> None:
    report = _report(out)
    validate(report)
    ordinary, private = report["runs"]
    assert ordinary["target_epsilon"] is None is ordinary["epsilon"]
    assert private["target_epsilon"] == 8
    assert private["epsilon"] <= 8
    assert ordinary["overhead"] == 1
    for run in report["runs"]:
        assert set(run["membership"]) == {"loss", "lira", "rmia"}
        assert run["references"] == 3
        assert run["canary"]["trials"] == len(run["canary"]["ranks"]) == 4
        bits = np.log2(100 / np.array(run["canary"]["ranks"]))
        assert run["canary"]["exposure_bits"] == pytest.approx(bits.mean())
        assert run["canary"]["available_bits"] == pytest.approx(np.log2(100))
    group = private["canary"]["accounted_group_epsilon"]
    assert group > private["epsilon"]
    assert "accounted_group_epsilon" not in ordinary["canary"]
    assert "accounted" in (out / "report.md").read_text(encoding="utf-8")
    # What the audit can refute is shown below: so few coins could not contradict this ε.
    assert private["audit"]["epsilon_lower_bound"] <= private["epsilon"]


def test_everything_promised_is_there(out: Path) -> None:
    for name in ("report.json", "report.md", "report.html", "study.json"):
        assert (out / name).stat().st_size > 0
    assert list((out / "figures").glob("*.svg"))
    target = out / "runs" / "eps-8" / "target"
    assert "must not be published" in (target / "README.md").read_text(encoding="utf-8")


def test_finished_runs_are_not_trained_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dpnlu.compare.budget

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    before = _report(out)
    monkeypatch.setattr(dpnlu.compare.budget, "train", fail)
    assert main([*COMPARE, "--out", str(out)]) == 0
    after = _report(out)
    for run in (*before["runs"], *after["runs"]):
        run.pop("attack_seconds")
    assert before["runs"] == after["runs"]


def test_another_study_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", str(out), "--seed", "3"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_lost_reference_alone_is_trained_again(out: Path) -> None:
    references = out / "runs" / "eps-inf" / "references"
    lost = references / "model-0001.npz"
    before = load_arrays(lost)
    kept = (references / "model-0000.npz").stat().st_mtime_ns
    lost.unlink()
    assert main([*COMPARE, "--out", str(out)]) == 0
    _assert_same_signals(load_arrays(lost), before)
    assert (references / "model-0000.npz").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_references_are_the_same_from_other_processes(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    again = tmp_path / "again"
    assert main([*COMPARE, "--epsilons", "8", "--out", str(again)]) == 0
    references = sorted(again.glob("runs/eps-8/references/*.npz"))
    assert len(references) == 3
    for path in references:
        _assert_same_signals(load_arrays(path), load_arrays(out / path.relative_to(again)))


def test_a_trained_model_can_be_attacked(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    train = ["train", "--data", "synthetic:300", "--epsilon", "8", "--batch-size", "60"]
    assert main([*train, "--epochs", "2", "--out", str(model), "--quiet"]) == 0
    attack = ["attack", str(model), "--data", "synthetic:300", "--references", "3", "--quiet"]
    assert main([*attack, "--out", str(tmp_path / "report")]) == 0
    report = _report(tmp_path / "report")
    validate(report)
    (run,) = report["runs"]
    assert run["epsilon"] <= 8
    assert set(run["membership"]) == {"loss", "lira", "rmia"}
    for options, said in (
        (["--out", str(model / "report")], "outside of the model"),
        (["--audit-examples", "2"], "audit examples >= 20"),
        (["--physical-batch-size", "0"], "`physical_batch_size`"),
        (["--seed", "-1"], "`seed`"),
        (["--references", "1", "--attacks", "lira"], "2 references for the attack lira"),
        (["--confidence", "1"], "confidence"),
        (["--data", str(_other_labels(tmp_path))], "intents of the model"),
    ):
        capsys.readouterr()
        out = tmp_path / "refused"
        assert main([*attack, "--out", str(out), *options]) == 2
        printed = capsys.readouterr().err
        assert said in printed and len(printed.splitlines()) == 1
        assert not out.exists() and not (model / "report").exists()


def test_references_serve_one_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """… also where another of the same name was trained otherwise; and a model may be "."."""
    model = tmp_path / "model"
    train = ["train", "--data", "synthetic:300", "--epsilon", "inf", "--quiet", "--epochs"]
    attack = ["attack", ".", "--data", "synthetic:300", "--attacks", "loss", "--quiet"]
    attack += ["--references", "1", "--out", str(tmp_path / "report")]
    assert main([*train, "1", "--out", str(model)]) == 0
    monkeypatch.chdir(model)
    assert main(attack) == 0
    (run,) = _report(tmp_path / "report")["runs"]
    assert run["name"] == "model" and run["references"] == 1
    assert (tmp_path / "report" / "runs" / "model" / "references" / "model-0000.npz").exists()
    assert main(attack) == 0
    shutil.rmtree(model)
    assert main([*train, "2", "--out", str(model)]) == 0
    monkeypatch.chdir(model)
    capsys.readouterr()
    assert main(attack) == 2
    assert "other settings or of another model" in capsys.readouterr().err


def _other_labels(folder: Path) -> Path:
    """Data that the model was not trained for."""
    rows = [{"text": f"say {n}", "intent": f"intent {n % 2}"} for n in range(200)]
    path = folder / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attacks", "magic"], "magic"),
        (["--canaries", "pin"], "pin:4:R=100"),
        (["--canaries", "pin:2:R=1", "pin:2:R=9"], "different patterns"),
        (["--epsilons", "8", "8"], "different values"),
        (["--references", "-1"], "references >= 0"),
        (["--confidence", "2"], "onfidence"),
        (["--batch-size", "100000"], "batch size"),
        (["--epsilons", "8", "8.0"], "different values"),
        (["--epsilons", "0.1234561", "0.1234562"], "agree in six digits"),
        (["--epsilons", "0"], "ε > 0"),
        (["--epsilons", "nan"], "ε > 0"),
        (["--epsilons", "many"], "ε > 0"),
        (["--epsilons", "8", "--noise"], "--noise"),
        (["--delta", "0", "--epsilons", "inf"], "`delta` in [1e-12, 1)"),
        (["--delta", "nan", "--epsilons", "inf"], "`delta` in [1e-12, 1)"),
        (["--delta", "1e-12", "--epsilons", "1e-9"], "target ε that some noise"),
        (["--epochs", "0"], "`epochs` to be finite and > 0"),
        (["--epochs", "-1", "--epsilons", "inf"], "`epochs` to be finite and > 0"),
        (["--epochs", "nan", "--epsilons", "inf"], "`epochs` to be finite and > 0"),
        (["--epochs", "inf"], "`epochs` to be finite and > 0"),
        (["--epochs", "1e300", "--epsilons", "inf"], "`epochs` to be 1e+06 at most"),
        (["--batch-size", "0"], "`batch_size` to be an integer >= 1"),
        (["--batch-size", "-1", "--epsilons", "inf"], "`batch_size` to be an integer >= 1"),
        (["--physical-batch-size", "0"], "`physical_batch_size` to be an integer >= 1"),
        (["--max-grad-norm", "0", "--epsilons", "inf"], "`max_grad_norm` to be finite and > 0"),
        (["--max-grad-norm", "nan"], "`max_grad_norm` to be finite and > 0"),
        (["--dropout", "1"], "dropout in [0, 1)"),
        (["--dropout", "nan"], "dropout in [0, 1)"),
        (["--seed", "-1"], "`seed` to be an integer >= 0"),
        (["--seed", str(2**63)], "`seed` to be 9.223e+18 at most"),
        (["--confidence", "nan"], "onfidence"),
        (["--audit-examples", "2"], "audit examples >= 20"),
        (["--audit-examples", "0"], "audit examples >= 20"),
        (["--references", "1", "--attacks", "lira"], "2 references for the attack lira"),
        (["--references", "0", "--attacks", "loss", "rmia"], "2 references for the attack rmia"),
        (["--references", "10000000"], "`references` to be 1e+05 at most"),
        (["--attacks", "audit"], "add loss"),
        (["--canaries", "pin:13:R=1"], "a secret of 1 to 12 tokens"),
        (["--canaries", "pin:4:R=0"], "at least one repetition"),
        (["--canaries", "pin:4:R=1000000000000"], "pin:4:R=100"),
        (["--data", "synthetic:20"], "use data with more rows"),
        (["--data", "synthetic:9999999"], "synthetic"),
        (["--model", "encoder:/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "encoder:"], "lstm or encoder:NAME_OR_PATH"),
    ],
)
@pytest.mark.filterwarnings("default:δ = ")
def test_bad_options_are_refused_before_anything_is_written(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", "synthetic:300", "--quiet", "--out", str(tmp_path / "o")]
    try:
        status = main([*command, *options])
    except SystemExit as exit:  # of the parser
        status = int(exit.code or 0)
    assert status == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_attacks_that_were_not_named_are_left_out_without_references(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*COMPARE, "--epsilons", "inf", "--references", "0", "--out", str(out)]) == 0
    (run,) = _report(out)["runs"]
    assert set(run["membership"]) == {"loss"}
    assert run["audit"]["scores"] == "loss"


def test_a_study_whose_start_was_killed_can_be_started(tmp_path: Path) -> None:
    (tmp_path / "study.json.partial").write_text('{"data": ', encoding="utf-8")
    settings = StudySettings(data="synthetic:300", model="lstm", epsilons=(8.0,))
    for _ in range(2):
        with claimed_study(tmp_path, settings.to_dict()):
            assert json.loads((tmp_path / "study.json").read_text()) == settings.to_dict()
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "study.json").unlink()
    with (
        pytest.raises(ValueError, match="something else"),
        claimed_study(tmp_path, settings.to_dict()),
    ):
        pass


def test_a_folder_holds_one_study_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(tmp_path / "out"):
        assert main([*COMPARE, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another training is going on in it" in line
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize("end", ["INT", "TERM", "HUP"])
def test_a_study_that_is_interrupted_says_so_once_and_can_be_resumed(
    end: str, tmp_path: Path
) -> None:
    code = "import os, sys; os.cpu_count = lambda: 2; from dpnlu.cli.main import main; "
    command = [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *COMPARE]
    command += ["--epsilons", "inf", "--epochs", "9", "--out", str(tmp_path / "out")]
    study = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert study.stderr is not None
    with study, study.stderr:
        references = tmp_path / "out" / "runs" / "eps-inf" / "references"
        while not (references / "manifest.json").exists() and study.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        # A terminal sends Ctrl-C to the workers, too.
        to = os.killpg if end == "INT" else os.kill
        to(study.pid, getattr(signal, f"SIG{end}"))
        said = study.stderr.read()  # which ends with the last process that could write there
    assert said == "dpnlu: error: interrupted; to go on, run the same command again\n"
    assert study.returncode == 1
    assert subprocess.run(command).returncode == 0
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_quiet_means_no_progress_of_any_library(tiny_encoder: Path, tmp_path: Path) -> None:
    """`datasets` shows bars when it reads files, transformers when it loads weights, also in the
    processes that train references."""
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    for split, size in (("train", 80), ("test", 20)):
        rows = "".join(f"say {split} {n},{'ab'[n % 2]}\n" for n in range(size))
        (tmp_path / "data" / f"{split}.csv").write_text(f"text,intent\n{rows}", encoding="utf-8")
    code = "import os, sys; os.cpu_count = lambda: 2; from dpnlu.cli.main import main; "
    command = [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", "compare", "--quiet"]
    command += ["--data", f"hf:{tmp_path / 'data'}", "--model", f"encoder:{tiny_encoder}"]
    command += ["--epsilons", "inf", "--epochs", "1", "--references", "2", "--attacks", "loss"]
    command += ["--audit-examples", "60", "--out", str(tmp_path / "out")]
    cache = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=cache, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_signals_that_cannot_be_attacked_cost_their_attack_alone(study: Study) -> None:
    """A model that has diverged, references that are copies: the others' hours are kept."""
    rng = np.random.default_rng(0)
    models = [
        _reading(Signals(loss=rng.random(200), intent_margin=np.ones(200)))
        for _ in study.membership
    ]
    claim = Claim(epsilon=None, delta=1e-5, confidence=0.95)
    found = attack(("loss", "lira", "audit"), models, replace(study, canaries=()), claim)
    assert set(found.membership) == {"loss"}
    assert found.audit is not None and found.audit["scores"] == "loss"
    (warning,) = (text for text in found.warnings if "left out" in text)
    assert warning.startswith("lira was left out: Expected reference signals that vary")
    broken = [_reading(replace(model.signals, loss=np.full(200, np.nan))) for model in models]
    found = attack(("loss", "audit"), broken, replace(study, canaries=()), claim)
    assert found.membership == {}
    assert found.audit is None and "audit" not in found.to_entries()


def _reading(signals: Signals) -> Reading:
    return Reading(signals=signals, intent_accuracy=0.5, canaries={})


# ---- the audit, of a trainer that keeps its promise and of one that does not ---------------------


@pytest.fixture
def promise() -> Budget:
    """A training that claims ε = 1, on texts without a common word and with random labels: to do
    well on one is to have seen it."""
    coins = np.random.default_rng(0)
    intents = tuple(f"intent {number}" for number in range(8))
    audit = tuple(
        Example(
            id=f"text-{number}",
            text=f"word{number}",
            tokens=(f"word{number}",),
            tags=None,
            intent=intents[coins.integers(8)],
            split="train",
        )
        for number in range(400)
    )
    study = Study(base=(), audit=audit, membership=coins.random((1, 400)) < 0.5)
    size = len(study.examples(0))
    return Budget(
        name="eps-1",
        target_epsilon=1.0,
        study=study,
        experiment=Experiment(
            architecture=Architecture(name="lstm", embedding_size=16, hidden_size=16),
            recipe=Recipe(epochs=30, batch_size=50, learning_rate=2e-2),
            labels=Labels(intents, ()),
            vocabulary=HashedVocabulary(),
            compute=ComputeConfig(),
        ),
        plan=PrivacyPlan.calibrate(
            target_epsilon=1.0,
            target_delta=1e-5,
            num_examples=size,
            expected_batch_size=50,
            epochs=30,
            max_grad_norm=1.0,
        ),
        test=audit[:20],
        seed=0,
    )


def _audited(budget: Budget) -> Findings:
    trained = budget.train(0)
    assert trained.result.epsilon is not None and trained.result.epsilon <= 1
    claim = Claim(epsilon=trained.result.epsilon, delta=1e-5, confidence=0.95)
    models = [budget.read(trained.classifier, 0)]
    return attack(("loss", "audit"), models, budget.study, claim)


def _audit(found: Findings) -> dict[str, Any]:
    assert found.audit is not None
    return found.audit


def test_the_audit_does_not_refute_a_training_that_keeps_its_promise(promise: Budget) -> None:
    found = _audited(promise)
    assert _audit(found)["epsilon_lower_bound"] <= 1 < _audit(found)["ceiling"] / 3
    assert not any("refuted" in warning for warning in found.warnings)


def test_the_audit_refutes_a_training_whose_noise_was_removed(
    promise: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = []

    def nothing(near: torch.Tensor, *, std: float, generator: object) -> None:
        draws.append(std)
        near.zero_()

    monkeypatch.setattr(noise, "_fill", nothing)
    found = _audited(promise)
    assert draws and min(draws) > 0, "the training did not ask for noise where it was removed"
    assert _audit(found)["epsilon_lower_bound"] > 3
    assert any("the claim is refuted" in warning for warning in found.warnings)


@pytest.fixture(scope="module")
def study() -> Study:
    corpus, _ = drop_repeated(synthetic_corpus(400))
    return Study.draw(
        corpus,
        audit_examples=200,
        references=30,
        canaries=[parse_canary("pin:4:R=7"), parse_canary("call:3:R=2")],
        rng=np.random.default_rng(0),
    )


class TestStudy:
    def test_each_model_trains_on_the_base_its_members_and_its_canaries(self, study: Study) -> None:
        for model in (0, 7):
            ids = {example.id for example in study.examples(model)}
            members = {e.id for e, m in zip(study.audit, study.membership[model], strict=True) if m}
            canaries = {name for name in ids if name.startswith("canary-")}
            assert ids == {e.id for e in study.base} | members | canaries
            assert len(canaries) == 9

    def test_base_and_audit_examples_are_the_training_split(self, study: Study) -> None:
        corpus, _ = drop_repeated(synthetic_corpus(400))
        together = sorted(e.id for e in (*study.base, *study.audit))
        assert together == sorted(e.id for e in corpus.split("train"))

    def test_membership_is_drawn_fairly_and_independently(self, study: Study) -> None:
        assert study.membership.shape == (31, 200)
        assert abs(study.membership.mean() - 0.5) < 4 * 0.5 / np.sqrt(study.membership.size)
        per_model = study.membership.sum(axis=1)
        # balanced halves would always be 100: not drawn independently
        assert per_model.std() > 3

    def test_each_model_has_a_secret_of_its_own(self, study: Study) -> None:
        assert [secrets.shape for secrets in study.secrets] == [(31, 4), (31, 3)]
        assert len({tuple(secret) for secret in study.secrets[0]}) > 25

    def test_canary_labels_are_among_the_labels(self, study: Study) -> None:
        corpus, _ = drop_repeated(synthetic_corpus(400))
        labels = study.labels(corpus)
        assert "canary" in labels.intents
        assert {"B-canary", "I-canary"} <= set(labels.tags)


@pytest.mark.parametrize(("slot", "tags"), [("canary", True), (None, True), ("canary", False)])
def test_a_secret_is_ranked_by_its_tags_where_it_has_some(slot: str | None, tags: bool) -> None:
    canary = parse_canary("pin:2:R=1")
    canary = replace(canary, pattern=canary.pattern.with_labels(intent="canary", slot=slot))
    labels = Labels(("ask", "canary"), ("B-canary", "I-canary", "O") if tags else ())
    classifier = build(Architecture(name="lstm"), labels, HashedVocabulary(100))
    examples = [
        canary_example(canary, secret, name="one", with_slots=tags) for secret in all_secrets(2)
    ]
    signals = read_signals(classifier, examples)
    expected = signals.slot_loss if slot and tags else signals.loss
    np.testing.assert_allclose(read_canary_losses(classifier, canary), expected)
    assert len(np.unique(expected)) == 100


def test_the_likeliest_secrets_of_a_model_with_dropout_are_ranked_under_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the BiLSTM taken apart, with the masks multiplied in by hand."""
    monkeypatch.setattr("dpnlu.compare.reading._LIKELIEST", 30)
    monkeypatch.setattr("dpnlu.compare.reading._MASKS", 5)
    canary = parse_canary("pin:2:R=1")
    labels = Labels(("ask", "canary"), ("B-canary", "I-canary", "O"))
    torch.manual_seed(0)
    classifier = build(Architecture(name="lstm", dropout=0.5), labels, HashedVocabulary(100))
    examples = [
        canary_example(canary, secret, name="one", with_slots=True) for secret in all_secrets(2)
    ]
    plain = read_signals(classifier, examples).slot_loss
    assert plain is not None
    likeliest = plain.argsort()[:30]
    (batch,) = batches(
        classifier.encoding,
        encode_all(classifier.encoding, [examples[place] for place in likeliest]),
        size=30,
    )
    losses = _tag_losses_under_masks(classifier.model.eval(), batch, masks=5)

    found = read_canary_losses(classifier, canary)

    np.testing.assert_allclose(found[likeliest], losses, rtol=1e-5)
    others = plain.argsort()[30:]
    assert found[others].min() > losses.max()
    assert (np.diff(found[others]) > 0).all(), "the others keep their order"
    assert (losses.argsort() != np.arange(30)).any(), "the test would not see a missing mask"


def _tag_losses_under_masks(model: Any, batch: Batch, *, masks: int) -> NDArray[np.float64]:
    """(B,) means over masks, each drawn as (1, T, d) uniform numbers before the layer and after."""
    generator = torch.Generator().manual_seed(0)

    def masked(states: torch.Tensor) -> torch.Tensor:
        return states * (torch.rand(1, *states.shape[1:], generator=generator) < 0.5) * 2

    total = np.zeros(len(batch["intents"]))
    with torch.no_grad():
        for _ in range(masks):
            states = masked(model.embedding(batch["words"]))
            states = masked(model.layers[0](states, batch["lengths"]))
            logits = model.slot_head(states).double()
            by_word = F.cross_entropy(logits.mT, batch["tags"], reduction="none")
            total += by_word.mean(1).numpy()
    return total / masks
