"""Users through the commands at toy size: train, compare, attack, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.report import validate
from dpnlu.cli.main import main
from dpnlu.compare.preparation import prepare_study
from dpnlu.compare.settings import StudySettings
from dpnlu.compare.study import Study
from dpnlu.mechanism.ledger import Ledger
from dpnlu.nlu.data import load_corpus
from dpnlu.runs.model_directory import load

USERS = 60

pytestmark = pytest.mark.usefixtures("quick_studies")


def _rows() -> list[dict[str, Any]]:
    """60 users to train on with 1 to 5 texts each, and 20 others to test on; every text is one of
    its own."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS + 20):
        split = "train" if user < USERS else "test"
        for number in range(1 + user % 5):
            word, intent = (("play", "music"), ("wake me at", "alarm"))[int(rng.integers(2))]
            text = f"{word} w{user} x{number} y{rng.integers(9)}"
            rows.append({"text": text, "intent": intent, "split": split, "user": f"u{user}"})
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("data") / "said.jsonl", _rows())


def _train(data: Path, out: Path, *more: str) -> int:
    given = ["--data", str(data), "--out", str(out), "--quiet", "--epsilon", "3"]
    given += ["--delta", "1e-3", "--batch-size", "12", "--epochs", "2", "--unit", "user"]
    return main(["train", *given, *more])


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "model"
    assert _train(data, out, "--examples-per-user", "3") == 0
    return out


def test_a_model_for_users_says_so_everywhere(model: Path) -> None:
    plan = json.loads((model / "plan.json").read_text(encoding="utf-8"))
    assert (plan["unit"], plan["clipping_unit"], plan["examples_per_user"]) == ("user", "user", 3)
    assert plan["num_examples"] == USERS and plan["sample_rate"] == pytest.approx(12 / USERS)
    ledger = Ledger.read(model / "ledger.jsonl")
    assert ledger.plan.to_dict() == plan and len(ledger) == plan["steps"] == 10
    assert load(model).metrics["epsilon"] == pytest.approx(ledger.epsilon())
    assert ledger.epsilon() <= 3
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "presence of one user with all of their examples (unit: one user" in card
    assert "norm at most 1 per user" in card and f"training users, {USERS}," in card
    assert "protected less" not in card


def test_a_user_level_training_is_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """… as one of the same users and at the same cost."""
    import dpnlu.training.steps as steps

    taken, release = [0], steps.Steps._release

    def dies(self: Any, *arguments: Any, **named: Any) -> None:
        release(self, *arguments, **named)
        taken[0] += 1
        if taken[0] == 4:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(steps.Steps, "_release", dies)
        assert _train(data, tmp_path / "m") != 0
    assert _train(data, tmp_path / "m", "--resume", "--unit", "example") == 2
    assert _train(data, tmp_path / "m", "--resume") == 0
    ledger = Ledger.read(tmp_path / "m" / "ledger.jsonl")
    assert len(ledger) == 10 and ledger.epsilon() <= 3


@pytest.mark.parametrize("engine", ["per_example", "opacus"])
def test_other_engines_train_users_or_say_why_not(
    data: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = _train(data, tmp_path / "m", "--engine", engine)
    said = capsys.readouterr().err
    assert status == (0 if engine == "per_example" else 2)
    assert ("Expected layers that Opacus supports" in said) is (engine == "opacus")


def _without_one_user(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "user"} if n == 5 else row
        for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("change", "more", "says"),
    [
        (lambda rows: [{**row, "user": None} for row in rows], [], "expected a user"),
        (_without_one_user, [], "Example train-00005: expected a user"),
        (lambda rows: [{**row, "user": " "} for row in rows], [], "expected a user"),
        (lambda rows: rows, ["--examples-per-user", "0"], "`examples_per_user`"),
        (lambda rows: rows, ["--unit", "example", "--examples-per-user", "2"], "--unit user"),
        (lambda rows: rows, ["--unit", "person"], "`unit` to be one of example, user"),
        (lambda rows: rows, ["--batch-size", "61"], "between 1 and the number of users, 60"),
        (lambda rows: rows, ["--engine", "microbatch"], "clipping unit, 'user'"),
    ],
)
def test_what_does_not_name_users_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, more: list[str], says: str
) -> None:
    data = _write(tmp_path / "said.jsonl", change(_rows()))
    assert _train(data, tmp_path / "m", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and says in line, line
    assert not (tmp_path / "m").exists()


def test_ordinary_training_beside_it_needs_users_too(data: Path, tmp_path: Path) -> None:
    """… so that a study compares like with like; it takes all examples."""
    assert _train(data, tmp_path / "m", "--epsilon", "inf") == 0
    assert not (tmp_path / "m" / "plan.json").exists()


# ---- studies ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    given = ["--data", str(data), "--epsilons", "inf", "8", "--epochs", "2", "--delta", "1e-3"]
    given += ["--batch-size", "20", "--references", "3", "--unit", "user", "--quiet"]
    given += ["--audit-examples", "40", "--canaries", "pin:2:R=5"]
    assert main(["compare", *given, "--out", str(folder)]) == 0
    return folder


def test_a_study_of_users_judges_users(out: Path) -> None:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    validate(report)
    assert report["study"]["unit"] == "user"
    assert report["data"]["audit_users"] == 40 < report["data"]["audit_examples"]
    ordinary, private = report["runs"]
    assert private["unit"] == "user" and private["examples_per_user"] == 8
    assert private["epsilon"] <= 8
    for run in (ordinary, private):
        for attack in run["membership"].values():
            assert attack["members"] == report["data"]["member_users"]
            assert attack["members"] + attack["non_members"] == 40
        assert run["audit"]["canaries"] == 40
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "ε protects one user" in text and "protected less" not in text
    target = json.loads((out / "runs" / "eps-8" / "target" / "plan.json").read_text("utf-8"))
    members = report["data"]["member_users"]
    assert target["num_examples"] == USERS - 40 + members + 1  # and the canary's


def test_a_model_for_users_is_attacked_by_users(model: Path, data: Path, tmp_path: Path) -> None:
    given = ["--data", str(data), "--references", "2", "--quiet", "--audit-examples", "30"]
    assert main(["attack", str(model), *given, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    validate(report)
    assert report["data"]["audit_users"] == 30 and report["data"]["member_users"] == 15
    assert report["runs"][0]["unit"] == "user"


@pytest.fixture
def study(data: Path) -> Study:
    return Study.draw(
        load_corpus(str(data), seed=0),
        audit_examples=50,
        references=200,
        canaries=[],
        rng=np.random.default_rng(0),
        by_user=True,
    )


class TestStudyOfUsers:
    def test_a_user_is_in_a_model_with_everything_or_nothing(self, study: Study) -> None:
        assert study.users is not None and len(study.users) == 50
        names = [example.user for example in study.audit]
        for model in range(3):
            inside = {example.user for example in study.examples(model)}
            for place, name in enumerate(names):
                assert (name in inside) == study.membership[model, place]
        assert not {example.user for example in study.base} & set(names)
        assert len(study.base) + len(study.audit) == sum(r["split"] == "train" for r in _rows())

    def test_coins_of_users_are_fair_and_their_own(self, study: Study) -> None:
        coins = study.members
        assert coins.shape == (201, 50)
        assert abs(coins.mean() - 0.5) < 5 * 0.5 / np.sqrt(coins.size)
        together = np.corrcoef(coins.T)
        assert np.abs(together[~np.eye(50, dtype=bool)]).max() < 0.4

    def test_a_user_s_score_is_the_mean_of_those_of_the_examples(self, study: Study) -> None:
        scores = np.random.default_rng(1).normal(size=len(study.audit))
        names = [example.user for example in study.audit]
        for number, name in enumerate(dict.fromkeys(names)):
            own = [s for s, other in zip(scores, names, strict=True) if other == name]
            assert study.of_units(scores)[number] == pytest.approx(np.mean(own))
            texts = [e.text for e in study.audit if e.user == name]
            assert study.texts()[number] == " ".join(texts)


def test_a_study_without_users_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data = _write(tmp_path / "said.jsonl", _without_one_user(_rows()))
    with pytest.raises(ValueError, match="expected a user"):
        prepare_study(StudySettings(data=str(data), unit="user", delta=1e-3))


def test_studies_of_examples_are_what_they_were() -> None:
    """Their settings name no unit, so that what earlier versions began is resumed."""
    content = StudySettings(data="synthetic:100").to_dict()
    assert not {"unit", "examples_per_user"} & set(content)
    assert StudySettings(data="x", unit="user").to_dict()["unit"] == "user"
