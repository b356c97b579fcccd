"""Intents begin with their names: as said, whatever the names, and never for a BiLSTM."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.nlu.classifier import Architecture, Classifier, build
from dpnlu.nlu.data import Example, HashedVocabulary
from dpnlu.nlu.encoding import Labels, SubwordEncoding
from dpnlu.nlu.label_names import SCALE, begin_with_names, words_of

NAMES = ("AddToPlaylist", "get_weather", "alarm/set")


@pytest.mark.parametrize(
    "name, words",
    [
        ("SearchCreativeWork", ["search", "creative", "work"]),
        ("alarm/set_HTTPTimer2", ["alarm", "set", "http", "timer", "2"]),
        ("what's.up: now|then", ["what's", "up", "now", "then"]),
        ("meaning_of-life42x", ["meaning", "of", "life", "42", "x"]),
        ("2nd", ["2", "nd"]),
        ("समय_बताओ", ["समय", "बताओ"]),
        ("时间", ["时间"]),
        ("  ", []),
        ("_/-", []),
        ("", []),
    ],
)
def test_the_words_of_a_name(name: str, words: list[str]) -> None:
    assert words_of(name) == words


def _built(encoder: Path, *, intents: tuple[str, ...] = NAMES, **reading: object) -> Classifier:
    architecture = Architecture(
        name=f"encoder:{encoder}", freeze_encoder=True, reads_intent_names=True, **reading
    )
    classifier = build(architecture, Labels(intents, ("B-x", "I-x", "O")), HashedVocabulary(50))
    classifier.model.double().eval()
    return classifier


def _last_layer(classifier: Classifier, text: str) -> Tensor:
    """(d,) the standardised mean over the sub-words of a text, told by the encoder alone."""
    tokens = classifier.encoding.tokenizer(
        text.split(), is_split_into_words=True, return_tensors="pt"
    )
    said = classifier.model.encoder(**tokens).last_hidden_state[0].mean(0)
    return F.layer_norm(said, said.shape)


@pytest.mark.parametrize("layers", [None, (1.0,), (0.0, 1.0), (1.0, 0.5)])
def test_the_first_logits_are_correlations_with_the_names(
    tiny_encoder: Path, layers: tuple[float, ...] | None
) -> None:
    """But for what all intents share, which no prediction depends on."""
    classifier = _built(tiny_encoder, text_layers=layers)
    text = "call me at noon"
    words = tuple(text.split())
    example = Example(
        id="0", text=text, tokens=words, tags=("O",) * 4, intent=NAMES[0], split="train"
    )
    encoding = classifier.encoding
    found = classifier.model(encoding.collate([encoding.encode(example)])).intents[0]
    said = _last_layer(classifier, text)
    names = [_last_layer(classifier, " ".join(words_of(name))) for name in NAMES]
    expected = torch.stack([SCALE * torch.corrcoef(torch.stack([said, n]))[0, 1] for n in names])
    torch.testing.assert_close(
        found - found.mean(), expected - expected.mean(), rtol=1e-3, atol=1e-4
    )
    assert found.std() > 1e-3  # the names differ, or the test would say nothing


def test_means_over_words_begin_with_half_of_the_names(tiny_encoder: Path) -> None:
    """One-word names of one-word texts: two correlations, each with half of the scale."""
    classifier = _built(
        tiny_encoder,
        intents=("ask", "tell", "call"),
        text_layers=(0.5, 1.0),
        word_layers=(1.0, 0.0),
        reads_word_means=True,
    )
    encoding, width = classifier.encoding, classifier.model.encoder.config.hidden_size
    read = [
        classifier.model.read(encoding.collate([encoding.encode(_one_word(word))]))["pooled"][0]
        for word in ("ask", "tell", "call", "wake")
    ]
    parts = [slice(width, 2 * width), slice(2 * width, 3 * width)]
    expected = torch.stack(
        [SCALE / 2 * sum(name[p] @ read[3][p] / width for p in parts) for name in read[:3]]
    )
    found = classifier.model.intent_head((2 / 4) ** 0.5 * read[3])  # two means in place of four
    torch.testing.assert_close(
        found - found.mean(), expected - expected.mean(), rtol=1e-4, atol=1e-5
    )
    assert found.std() > 1e-3


def _one_word(word: str) -> Example:
    return Example(id="0", text=word, tokens=(word,), tags=("O",), intent="ask", split="train")


def test_names_without_a_word_begin_with_zero(tiny_encoder: Path) -> None:
    head = _built(tiny_encoder, intents=("ask", "_/", "tell")).model.intent_head
    assert head.weight[1].count_nonzero() == 0
    assert head.weight[0].count_nonzero() > 0
    nothing = _built(tiny_encoder, intents=("_", "/")).model.intent_head
    assert nothing.weight.count_nonzero() == 0


def test_names_without_a_sub_word_begin_with_zero(tiny_encoder: Path) -> None:
    """… where the tokenizer has no special ones either."""

    class Silent(SubwordEncoding):
        def _subwords(self, tokens, **options):
            found = super()._subwords(tokens, **options)
            return found | {field: found[field][:0] for field in ("subwords", "attention")}

    classifier = _built(tiny_encoder)
    head = classifier.model.intent_head
    nn.init.zeros_(head.weight)
    silent = Silent(classifier.encoding.labels, classifier.encoding.tokenizer)
    begin_with_names(classifier.model, silent)
    assert head.weight.count_nonzero() == 0


def test_names_of_any_length_are_taken(tiny_encoder: Path) -> None:
    head = _built(tiny_encoder, intents=("ask " * 500, "tell")).model.intent_head
    assert head.weight.isfinite().all() and head.weight.count_nonzero() > 0


def test_without_intents_there_is_nothing_to_begin(tiny_encoder: Path) -> None:
    assert _built(tiny_encoder, intents=()).model.intent_head is None


def test_nothing_but_the_rows_of_intents_changes(tiny_encoder: Path) -> None:
    named = _built(tiny_encoder)
    plain = build(
        replace(named.architecture, reads_intent_names=False),
        named.encoding.labels,
        HashedVocabulary(50),
    )
    expected = plain.model.double().state_dict()
    for name, value in named.model.state_dict().items():
        assert torch.equal(value, expected[name]) == (name != "intent_head.weight")
    assert not named.model.training and not any(
        parameter.requires_grad for parameter in named.model.encoder.parameters()
    )


def test_a_bilstm_reads_no_names() -> None:
    with pytest.raises(ValueError, match="`reads_intent_names` for an encoder alone"):
        Architecture(name="lstm", reads_intent_names=True)
