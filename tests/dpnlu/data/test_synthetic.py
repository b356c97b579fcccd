"""Properties that the synthetic corpus promises."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from dpnlu.nlu.data import Corpus, DataError, load_corpus, normalized, synthetic_corpus
from dpnlu.nlu.data.grammar import AMBIGUITIES, CLOSINGS, INTENTS, OPENINGS, PHRASES, SLOTS
from dpnlu.nlu.data.iob import spans

DIGEST_PROGRAM = """
import hashlib
from dpnlu.nlu.data import synthetic_corpus
print(hashlib.sha256(repr(synthetic_corpus(300, seed=5).examples).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The corpus of the default size."""
    return load_corpus("synthetic")


@pytest.fixture(scope="module")
def large() -> Corpus:
    """A corpus in which chance alone would repeat texts."""
    return synthetic_corpus(20_000)


def test_the_same_in_another_process_with_another_hash_seed() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DIGEST_PROGRAM],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = hashlib.sha256(repr(synthetic_corpus(300, seed=5).examples).encode()).hexdigest()
    assert result.stdout.strip() == here


def test_another_seed_gives_another_corpus() -> None:
    texts = [
        {row.text for row in load_corpus("synthetic:300", seed=seed).examples} for seed in (0, 1)
    ]
    assert len(texts[0] & texts[1]) < 60


@pytest.mark.parametrize("size", [20, 21, 99, 100, 1234])
@pytest.mark.parametrize("seed", [0, 1])
def test_size_splits_and_intents(size: int, seed: int) -> None:
    corpus = synthetic_corpus(size, seed=seed)
    assert len(corpus.examples) == size
    assert len(corpus.split("valid")) == len(corpus.split("test")) == size // 10
    assert {row.intent for row in corpus.split("train")} == set(INTENTS)


def test_no_text_occurs_twice(large: Corpus) -> None:
    assert len({normalized(row.text) for row in large.examples}) == 20_000


def test_labels_are_declared_and_all_occur(corpus: Corpus) -> None:
    assert corpus.labels_are_public
    assert corpus.intents == tuple(sorted(INTENTS))
    used = {span.slot for row in corpus.examples for span in spans(row.tags or ())}
    assert used == set(SLOTS) == set(corpus.slots)


def test_slots_have_many_values(large: Corpus) -> None:
    values: dict[str, set[tuple[str, ...]]] = {slot: set() for slot in SLOTS}
    for row in large.examples:
        for span in spans(row.tags or ()):
            values[span.slot].add(row.tokens[span.start : span.end])
    open_ended = ("person", "artist", "track", "playlist", "city", "restaurant", "task", "message")
    assert all(len(values[slot]) > 700 for slot in open_ended)
    assert all(len(found) > 50 for found in values.values())


def test_notation_is_balanced_and_all_names_exist() -> None:
    carriers = [
        *(text for intent in INTENTS.values() for text in (*intent.common, *intent.rare)),
        *(text for ambiguity in AMBIGUITIES for text in ambiguity.carriers),
        *OPENINGS,
        *CLOSINGS,
    ]
    phrases = [text for alternatives in PHRASES.values() for text in alternatives]
    for text in [*carriers, *phrases]:
        for brackets in ("{}", "[]", "<>"):
            assert text.count(brackets[0]) == text.count(brackets[1]), text
        assert set(re.findall(r"<(\w+)>", text)) <= PHRASES.keys(), text
    assert {slot for text in carriers for slot in re.findall(r"\[(\w+)\]", text)} == set(SLOTS)
    assert not any("[" in text for text in phrases)
    assert {name for ambiguity in AMBIGUITIES for name in ambiguity.intents} <= INTENTS.keys()


def test_texts_hold_no_notation(corpus: Corpus) -> None:
    assert not [row.text for row in corpus.examples if re.search(r"[{}<>\[\]|]", row.text)]


def test_a_linear_model_learns_it_well_but_not_perfectly(corpus: Corpus) -> None:
    train, test = corpus.split("train"), synthetic_corpus(2_000, seed=1).examples
    counts = CountVectorizer(token_pattern=r"\S+")
    inputs = counts.fit_transform([row.text for row in train])
    model = LogisticRegression(max_iter=300).fit(inputs, [row.intent for row in train])
    accuracy = model.score(
        counts.transform([row.text for row in test]), [row.intent for row in test]
    )
    assert 0.85 < accuracy < 0.97


def test_some_labels_are_wrong(large: Corpus) -> None:
    # These words stand in the phrases of one intent only, and in no slot.
    cues = {
        "umbrella": "weather_ask",
        "reservation": "table_book",
        "thermostat": "heating_set",
        "reminder": "reminder_set",
    }
    met = [
        (cues[token], row.intent) for row in large.examples for token in row.tokens if token in cues
    ]
    assert len(met) > 500
    assert 0.005 < sum(meant != given for meant, given in met) / len(met) < 0.05


def test_more_than_the_grammar_can_say_is_refused() -> None:
    with pytest.raises(DataError, match="at most 1000000 rows, got 999999999"):
        synthetic_corpus(999_999_999)


@pytest.mark.parametrize("size", [-1, 0, 19])
def test_too_small_a_corpus_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"at least 20 rows, got {size}"):
        synthetic_corpus(size)
