"""Text to tensors."""

from pathlib import Path

import pytest
import torch

from dpnlu.nlu.data import DataError, Example, HashedVocabulary
from dpnlu.nlu.encoding import Labels, SubwordEncoding, WordEncoding, batches, encode_all
from dpnlu.nlu.models import IGNORED_TAG

LABELS = Labels(("ask", "tell"), ("B-x", "O"))


def _example(tokens: str, tags: str | None = None, intent: str = "ask") -> Example:
    return Example(
        id="one",
        text=tokens,
        tokens=tuple(tokens.split()),
        tags=None if tags is None else tuple(tags.split()),
        intent=intent,
        split="train",
    )


def test_words_labels_and_lengths() -> None:
    vocabulary = HashedVocabulary(100)
    encoded = WordEncoding(LABELS, vocabulary).encode(_example("call 4 4", "O B-x O", "tell"))
    assert encoded["words"].tolist() == vocabulary.encode(("call", "4", "4"))
    assert encoded["tags"].tolist() == [1, 0, 1]
    assert encoded["intents"].item() == 1
    assert encoded["lengths"].item() == 3


def test_an_unknown_tag_is_ignored_and_an_unknown_intent_refused() -> None:
    encoding = WordEncoding(LABELS, HashedVocabulary(100))
    assert encoding.encode(_example("a b", "B-y O"))["tags"].tolist() == [IGNORED_TAG, 1]
    with pytest.raises(DataError, match=r"one.*'shout'"):
        encoding.encode(_example("a b", "O O", "shout"))


def test_characters_are_bytes_cut_and_padded() -> None:
    encoding = WordEncoding(LABELS, HashedVocabulary(100), characters=True)
    rows = encoding.encode(_example("é " + "x" * 30, "O O"))["characters"]
    assert rows[0].tolist()[:3] == [0xC3 + 1, 0xA9 + 1, 0]
    assert (rows[1] == ord("x") + 1).all()


def test_collate_pads_tags_with_what_losses_ignore() -> None:
    encoding = WordEncoding(LABELS, HashedVocabulary(100))
    batch = encoding.collate(encode_all(encoding, [_example("a", "O"), _example("a b c", "O O O")]))
    assert batch["words"].shape == (2, 3)
    assert batch["words"][0, 1:].tolist() == [0, 0]
    assert batch["tags"][0].tolist() == [1, IGNORED_TAG, IGNORED_TAG]
    assert batch["lengths"].tolist() == [1, 3]


def test_batches_keep_order_and_leave_nothing_out() -> None:
    encoding = WordEncoding(LABELS, HashedVocabulary(100))
    encoded = encode_all(encoding, [_example("a " * n, "O " * n) for n in range(1, 8)])
    found = batches(encoding, encoded, size=3)
    assert [len(batch["lengths"]) for batch in found] == [3, 3, 1]
    assert torch.cat([batch["lengths"] for batch in found]).tolist() == list(range(1, 8))


class TestSubwords:
    @pytest.fixture
    def encoding(self, tiny_encoder: Path) -> SubwordEncoding:
        from transformers import AutoTokenizer

        return SubwordEncoding(LABELS, AutoTokenizer.from_pretrained(tiny_encoder))

    def test_the_first_piece_of_each_word(self, encoding: SubwordEncoding) -> None:
        encoded = encoding.encode(_example("ab c def", "O B-x O"))
        assert encoded["first"].tolist() == [1, 3, 4]  # [CLS] a ##b c d ##e ##f [SEP]
        assert len(encoded["subwords"]) == 8

    def test_words_past_the_cut_have_no_tag(self, encoding: SubwordEncoding) -> None:
        encoded = encoding.encode(_example("abcdefghij " * 20, "O " * 20))
        assert len(encoded["subwords"]) == 128
        known = encoded["tags"] != IGNORED_TAG
        assert known.tolist() == [True] * 13 + [False] * 7

    def test_sub_words_are_padded_as_the_tokenizer_says(self, encoding: SubwordEncoding) -> None:
        encoding.tokenizer.pad_token = "[MASK]"
        batch = encoding.collate(
            encode_all(encoding, [_example("a", "O"), _example("a b c", "O O O")])
        )
        assert (batch["subwords"][0, 3:] == encoding.tokenizer.mask_token_id).all()
        assert batch["attention"][0].tolist() == [1, 1, 1, 0, 0]
