"""Canaries of the audit: no two share a word, each is in by a coin, and the audit proves more."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpnlu.cli.main import main
from dpnlu.compare.preparation import Prepared, prepare_study
from dpnlu.compare.settings import StudySettings
from dpnlu.compare.token_canaries import draw_token_canaries
from dpnlu.nlu.classifier import Architecture, build
from dpnlu.nlu.data import HashedVocabulary, load_corpus
from dpnlu.nlu.encoding import Labels

STUDY = ("compare", "--data", "synthetic:300", "--epsilons", "inf", "--references", "0", "--quiet")


def _prepared(**changes: object) -> Prepared:
    fields = {"data": "synthetic:300", "epsilons": (float("inf"),), "references": 2}
    return prepare_study(StudySettings(**fields | {"audit_canaries": 50} | changes))


def test_each_has_an_entry_of_the_vocabulary_to_itself() -> None:
    prepared = _prepared()
    (budget,) = prepared.budgets
    encode = budget.experiment.vocabulary.encode
    used = {i for example in prepared.corpus.examples for i in encode(example.tokens)}
    words = [canary.tokens[-1] for canary in prepared.study.token_canaries]
    entries = [encode([word])[0] for word in words]
    assert len(set(entries)) == 50 and not used & set(entries)
    assert {len(canary.tokens) for canary in prepared.study.token_canaries} == {4}


def test_each_is_in_by_a_coin_of_its_own_and_at_most_once() -> None:
    study = _prepared(audit_canaries=400).study
    assert study.token_membership.shape == (3, 400)
    shares = study.token_membership.mean(axis=1)
    assert (np.abs(shares - 0.5) < 4 * 0.5 / np.sqrt(400)).all()
    for model in range(3):
        ids = [e.id for e in study.examples(model) if e.id.startswith("audit-canary")]
        coins = study.token_membership[model]
        assert ids == [e.id for e, is_in in zip(study.token_canaries, coins, strict=True) if is_in]


def test_labels_are_those_of_the_corpus_drawn_at_random() -> None:
    prepared = _prepared(audit_canaries=400)
    canaries, corpus = prepared.study.token_canaries, prepared.corpus
    assert {canary.intent for canary in canaries} == set(corpus.intents)
    assert {tag for canary in canaries for tag in canary.tags} <= set(corpus.tags)
    assert prepared.study.labels(corpus) == _prepared(audit_canaries=0).study.labels(corpus)


def test_a_study_without_them_draws_what_it_always_drew() -> None:
    with_them, without = _prepared().study, _prepared(audit_canaries=0).study
    assert without.token_canaries == ()
    assert (with_them.membership == without.membership).all()
    assert with_them.audit == without.audit


def _bound(options: list[str], out: Path) -> dict[str, float]:
    assert main([*STUDY, "--attacks", "loss", "audit", *options, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report["runs"][0]["audit"]


@pytest.mark.slow
def test_the_audit_of_an_ordinary_model_proves_more_by_them(tmp_path: Path) -> None:
    same = ["--epochs", "60", "--dropout", "0", "--audit-examples", "200"]
    natural = _bound(same, tmp_path / "natural")
    planted = _bound([*same, "--audit-canaries", "200"], tmp_path / "planted")
    assert planted["canaries"] == 200 and "words of their own" in planted["scores"]
    assert planted["epsilon_lower_bound"] > max(1.0, natural["epsilon_lower_bound"])
    assert planted["epsilon_lower_bound"] <= planted["ceiling"]


@pytest.mark.slow
def test_the_audit_of_a_private_model_does_not_refute_it(tmp_path: Path) -> None:
    options = ["--epsilons", "1", "--epochs", "5", "--audit-canaries", "200"]
    assert _bound(options, tmp_path / "out")["epsilon_lower_bound"] <= 1.0


class TestRefused:
    def test_frozen_embeddings(self, tiny_encoder: Path) -> None:
        corpus = load_corpus("synthetic:300", seed=0)
        frozen = build(
            Architecture(name=f"encoder:{tiny_encoder}", freeze_encoder=True),
            Labels(corpus.intents, corpus.tags),
            HashedVocabulary(),
        )
        with pytest.raises(ValueError, match="trained embeddings for --audit-canaries 5"):
            draw_token_canaries(frozen, corpus, number=5, rng=np.random.default_rng(0))

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--audit-canaries", "-1"], "`audit_canaries`"),
            (["--audit-canaries", "20", "--model", "ENCODER"], "entries of the vocabulary"),
            (
                ["--audit-canaries", "20", "--model", "ENCODER", "--epsilons", "inf", "8"],
                "trained embeddings",
            ),
        ],
    )
    def test_in_one_line_before_training(
        self,
        options: list[str],
        says: str,
        tiny_encoder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = [o.replace("ENCODER", f"encoder:{tiny_encoder}") for o in options]
        assert main([*STUDY, *options, "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1
        assert not (tmp_path / "out").exists()
