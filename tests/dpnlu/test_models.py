"""The classifiers: their losses, and that nobody else's padding changes them."""

import errno
import os
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

from attacks.inversion import Cloze
from attacks.inversion.objective import TARGETS
from dpnlu.compare.inverting import invertible
from dpnlu.compare.reading import read_signals
from dpnlu.nlu.classifier import Architecture, Classifier, build
from dpnlu.nlu.data import Example, HashedVocabulary
from dpnlu.nlu.data.iob import violation
from dpnlu.nlu.encoding import Labels, encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.models import IGNORED_TAG, EncoderClassifier, Outputs, intent_slot_loss
from dpnlu.nlu.tag_chain import TagChain
from dpnlu.runs.model_directory import load, save
from dpnlu.testing import assert_private_step
from dpnlu.training.loop import Recipe

LABELS = Labels(("ask", "tell"), ("B-x", "I-x", "O"))
TEXTS = ("call 4 7 1", "wake me up at noon please", "no", "a rather long request with many words")


def _example(text: str, number: int) -> Example:
    tokens = tuple(text.split())
    tags = ("B-x", *("I-x",) * (len(tokens) - 1)) if number % 2 else ("O",) * len(tokens)
    return Example(
        id=str(number),
        text=text,
        tokens=tokens,
        tags=tags,
        intent=LABELS.intents[number % 2],
        split="train",
    )


EXAMPLES = tuple(_example(text, number) for number, text in enumerate(TEXTS))


def _classifier(name: str, encoder: Path) -> Classifier:
    names = {
        "lstm": Architecture(name="lstm", embedding_size=7, hidden_size=5),
        "deep lstm": Architecture(name="lstm", embedding_size=7, hidden_size=5, num_layers=2),
        "characters": Architecture(
            name="lstm", embedding_size=7, hidden_size=5, character_filters=4
        ),
        "encoder": Architecture(name=f"encoder:{encoder}"),
        "chain": Architecture(name="lstm", embedding_size=7, hidden_size=5, slot_loss="chain"),
        "words, too": Architecture(
            name="lstm", embedding_size=7, hidden_size=5, slot_loss="chain", word_window=2
        ),
        "encoder, chain": Architecture(
            name=f"encoder:{encoder}",
            slot_loss="chain",
            text_layers=(0, 1),
            word_layers=(0, 0.5, 1),
            neighbours=2,
            reads_text=True,
            reads_word_means=True,
        ),
    }
    torch.manual_seed(0)
    built = build(names[name], LABELS, HashedVocabulary(50))
    built.model.double().eval()
    for head_name, head in built.model.named_children():
        if head_name.endswith("_head"):
            nn.init.normal_(head.weight)  # an encoder's heads start at zero, which hides mistakes
    return built


NAMES = ("lstm", "deep lstm", "characters", "encoder", "chain", "words, too", "encoder, chain")


@pytest.mark.parametrize("name", NAMES)
def test_an_examples_loss_and_gradient_do_not_depend_on_the_batch(
    name: str, tiny_encoder: Path
) -> None:
    classifier = _classifier(name, tiny_encoder)
    encoded = encode_all(classifier.encoding, EXAMPLES)
    together = classifier.model.per_example_loss(classifier.encoding.collate(encoded))
    for number, one in enumerate(encoded):
        alone = classifier.model.per_example_loss(classifier.encoding.collate([one]))
        torch.testing.assert_close(alone[0], together[number], rtol=1e-10, atol=1e-12)
        for here, there in zip(
            _gradients(classifier.model, alone[0]),
            _gradients(classifier.model, together[number]),
            strict=True,
        ):
            torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
@pytest.mark.parametrize("name", ["lstm", "characters", "chain"])
def test_the_clipped_sum_is_that_of_a_loop_over_examples(
    name: str, engine: str, tiny_encoder: Path, clipped_sum, per_example_gradients
) -> None:
    """Of the channel of characters, too, whose rows are words and not examples."""
    classifier, bound = _classifier(name, tiny_encoder), 0.3
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))

    def losses_of(model: nn.Module, *values: Tensor) -> Tensor:
        return model.per_example_loss(dict(zip(batch, values, strict=True)))

    found = clipped_sum(
        engine, classifier.model, losses_of, tuple(batch.values()), max_grad_norm=bound
    )
    parameters = list(classifier.model.parameters())
    rows = per_example_gradients(classifier.model.per_example_loss(batch), parameters)
    flat = torch.cat([gradients.flatten(1) for gradients in rows], dim=1)
    norms = flat.norm(dim=1, keepdim=True)
    assert (norms > bound).all()
    torch.testing.assert_close(found, (flat * bound / norms).sum(0), rtol=1e-5, atol=1e-7)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_changes_nothing(name: str, tiny_encoder: Path) -> None:
    classifier = _classifier(name, tiny_encoder)
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES[:3]))
    padding = {"tags": IGNORED_TAG, "last": -1}
    wider = {
        field: values if values.dim() == 1 else _padded(values, padding.get(field, 0))
        for field, values in batch.items()
    }
    torch.testing.assert_close(
        classifier.model.per_example_loss(wider), classifier.model.per_example_loss(batch)
    )


def _padded(values: Tensor, value: int) -> Tensor:
    extra = values.new_full((values.shape[0], 3, *values.shape[2:]), value)
    return torch.cat((values, extra), dim=1)


def test_the_loss_is_the_intents_plus_the_mean_over_the_examples_own_words() -> None:
    outputs = Outputs(torch.randn(2, 3), torch.randn(2, 4, 5))
    assert outputs.tags is not None
    tags = torch.tensor([[1, 2, IGNORED_TAG, IGNORED_TAG], [0, 4, 3, 2]])
    batch = {"intents": torch.tensor([2, 0]), "tags": tags}
    losses = intent_slot_loss(outputs, batch)
    for example, length in ((0, 2), (1, 4)):
        intent = F.cross_entropy(outputs.intents[example], batch["intents"][example])
        slots = F.cross_entropy(outputs.tags[example, :length], tags[example, :length])
        torch.testing.assert_close(losses[example], intent + slots)


def test_with_a_chain_the_loss_is_that_of_all_tags_together() -> None:
    outputs = Outputs(None, torch.randn(2, 4, 3), TagChain.of(LABELS.tags))
    assert outputs.tags is not None
    tags, lengths = torch.tensor([[0, 1, IGNORED_TAG, IGNORED_TAG], [2, 0, 1, 1]]), (2, 4)
    losses = intent_slot_loss(outputs, {"tags": tags, "lengths": torch.tensor(lengths)})
    for row, length in enumerate(lengths):
        scores = {
            path: sum(outputs.tags[row, word, tag] for word, tag in enumerate(path))
            for path in product(range(3), repeat=length)
            if violation([LABELS.tags[tag] for tag in path]) is None
        }
        truth = scores[tuple(tags[row, :length].tolist())]
        expected = torch.stack(list(scores.values())).logsumexp(0) - truth
        torch.testing.assert_close(losses[row], expected / length)


def test_the_likeliest_tags_of_a_chain_follow_iob2() -> None:
    tags = torch.tensor([[[0.0, 3.0, 2.0], [0.0, 3.0, 2.5]]])  # I-x alone, if it were allowed
    lengths = torch.tensor([2])
    assert Outputs(None, tags).likeliest_tags(lengths).tolist() == [[1, 1]]
    # B-x I-x is worth 3, O O is worth 4.5
    chain = TagChain.of(LABELS.tags)
    assert Outputs(None, tags, chain).likeliest_tags(lengths).tolist() == [[2, 2]]


@pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
def test_a_private_step_with_a_chain_does_what_its_plan_says(engine: str, make_plan) -> None:
    architecture = Architecture(name="lstm", embedding_size=7, hidden_size=5, slot_loss="chain")
    classifier = build(architecture, LABELS, HashedVocabulary(50))
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    loss = classifier.model.per_example_loss
    assert_private_step(classifier.model, loss, batch, make_plan(max_grad_norm=0.3), engine=engine)


@pytest.mark.parametrize("name", ["chain", "encoder, chain"])
def test_attacks_read_the_loss_that_was_trained(name: str, tiny_encoder: Path) -> None:
    classifier = _classifier(name, tiny_encoder)
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    expected = classifier.model.per_example_loss(batch)
    signals = read_signals(classifier, EXAMPLES)
    torch.testing.assert_close(torch.from_numpy(signals.loss), expected.detach())
    assert signals.slot_margin is not None and np.isfinite(signals.slot_margin).all()


def test_an_inversion_explains_the_loss_that_was_trained(tiny_encoder: Path) -> None:
    classifier = _classifier("chain", tiny_encoder)
    cloze = Cloze(
        tokens=("call", None, "7"),
        candidates=(("4", "5"),),
        intent=None,
        tags=("B-x", "I-x", "I-x"),
    )
    model = invertible(classifier, [cloze])
    example = _example("call 4 7", 1)
    said = model.predict(model.inputs.vectors, torch.tensor([0]))
    signals = read_signals(classifier, [example])
    assert signals.slot_loss is not None
    torch.testing.assert_close(TARGETS["tags"](said), torch.from_numpy(signals.slot_loss))


def test_an_example_without_any_known_tag_has_the_loss_of_its_intent() -> None:
    outputs = Outputs(torch.randn(1, 3), torch.randn(1, 2, 5))
    batch = {"intents": torch.tensor([1]), "tags": torch.full((1, 2), IGNORED_TAG)}
    expected = F.cross_entropy(outputs.intents, batch["intents"], reduction="none")
    torch.testing.assert_close(intent_slot_loss(outputs, batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_slots_has_no_tag_logits(name: str, tiny_encoder: Path) -> None:
    architecture = (
        Architecture(name=f"encoder:{tiny_encoder}")
        if name == "encoder"
        else Architecture(name="lstm", character_filters=4 if name == "characters" else 0)
    )
    classifier = build(architecture, Labels(("ask", "tell"), ()), HashedVocabulary(50))
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    outputs = classifier.model(batch)
    assert outputs.tags is None
    assert outputs.intents.shape == (4, 2)
    assert classifier.model.per_example_loss(batch).shape == (4,)


def test_the_tag_of_a_word_is_read_at_its_first_sub_word(tiny_encoder: Path) -> None:
    classifier = _classifier("encoder", tiny_encoder)
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    states = classifier.model.get_submodule("encoder")(
        input_ids=batch["subwords"], attention_mask=batch["attention"]
    ).last_hidden_state
    states = F.layer_norm(states, states.shape[-1:])
    head = classifier.model.get_submodule("slot_head")
    tags = classifier.model(batch).tags
    for row, example in enumerate(EXAMPLES):
        place = 1  # after [CLS]
        for word, token in enumerate(example.tokens):
            torch.testing.assert_close(tags[row, word], head(states[row, place]))
            place += len(token)  # the tiny tokenizer spells words out


def test_a_wide_head_reads_the_words_around_and_the_text(tiny_encoder: Path) -> None:
    """Against one linear layer on all of that, one behind the other, in the last two layers."""
    architecture = Architecture(
        name=f"encoder:{tiny_encoder}", word_layers=(0.6, 1), neighbours=1, reads_text=True
    )
    classifier = build(architecture, LABELS, HashedVocabulary(50))
    model = classifier.model.double().eval()
    slots, text = model.get_submodule("slot_head"), model.get_submodule("text_head")
    nn.init.normal_(slots.weight)
    nn.init.normal_(text.weight)
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    found, read = model(batch).tags, model.read(batch)
    hidden = model.get_submodule("encoder")(
        input_ids=batch["subwords"], attention_mask=batch["attention"], output_hidden_states=True
    ).hidden_states
    for row, example in enumerate(EXAMPLES):
        place, states = 1, []  # after [CLS]
        for token in example.tokens:
            means = [layer[row, place : place + len(token)].mean(0) for layer in hidden[-2:]]
            states.append(torch.cat([F.layer_norm(mean, mean.shape) for mean in means]))
            place += len(token)  # the tiny tokenizer spells words out
        before, own, behind = (slots.weight.chunk(3)[k] for k in (0, 1, 2))
        for word, state in enumerate(states):
            expected = own @ state + text.weight @ (0.5 * read["pooled"][row])
            if word > 0:
                expected = expected + before @ states[word - 1]
            if word + 1 < len(states):
                expected = expected + behind @ states[word + 1]
            torch.testing.assert_close(found[row, word], expected)


def test_means_over_words_count_each_word_once(tiny_encoder: Path) -> None:
    """Behind the means over sub-words, in the layers that words are read in; no special ones."""
    architecture = Architecture(
        name=f"encoder:{tiny_encoder}",
        text_layers=(1,),
        word_layers=(0, 1),
        reads_word_means=True,
    )
    classifier = build(architecture, LABELS, HashedVocabulary(50))
    model = classifier.model.double().eval()
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    read = model.read(batch)["pooled"]
    hidden = model.get_submodule("encoder")(
        input_ids=batch["subwords"], attention_mask=batch["attention"], output_hidden_states=True
    ).hidden_states
    for row, example in enumerate(EXAMPLES):
        expected, place = [], 1  # after [CLS]
        ends = [place := place + len(token) for token in example.tokens]  # it spells words out
        for layer in (hidden[0], hidden[-1]):
            words = [
                layer[row, end - len(token) : end].mean(0)
                for end, token in zip(ends, example.tokens, strict=True)
            ]
            mean = torch.stack([F.layer_norm(word, word.shape) for word in words]).mean(0)
            expected.append(F.layer_norm(mean, mean.shape))
        torch.testing.assert_close(read[row, -2 * len(expected[0]) :], torch.cat(expected))


def test_an_encoder_without_hidden_states_is_refused(tiny_encoder: Path, monkeypatch) -> None:
    forward = BertModel.forward

    def silent(self: BertModel, *args: Any, **options: Any) -> Any:
        said = forward(self, *args, **options)
        said.hidden_states = None
        return said

    def demanding(self: BertModel, *args: Any, **options: Any) -> Any:
        raise ValueError("You have to specify pictures\nand more")

    said = {silent: "says what its layers hold", demanding: "an encoder of texts .* pictures$"}
    for other, message in said.items():
        monkeypatch.setattr(BertModel, "forward", other)
        with pytest.raises(ValueError, match=message):
            build(Architecture(name=f"encoder:{tiny_encoder}"), LABELS, HashedVocabulary(50))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"word_layers": (0, 1.5)}, r"shares in \[0, 1\]"),
        ({"text_layers": ()}, "at least one"),
        ({"neighbours": -1}, "`neighbours` >= 0"),
        ({"slot_loss": "crf"}, "one of chain, words"),
        ({"reads_word_means": True}, "Expected `word_layers` with `reads_word_means`"),
    ],
)
def test_a_reading_that_there_is_not_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Architecture(name="encoder:somewhere", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"text_layers": (1,)}, {"word_layers": [0]}, {"neighbours": 1}, {"reads_text": True}],
)
def test_a_bilstm_reads_no_layers_of_an_encoder(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="for an encoder alone, got them for lstm"):
        Architecture(name="lstm", **settings)
    assert Architecture(name="encoder:somewhere", **settings)


def test_an_intent_is_read_from_the_layers_that_are_asked_for(tiny_encoder: Path) -> None:
    """The embeddings of a text, and its last layer."""
    architecture = Architecture(name=f"encoder:{tiny_encoder}", text_layers=(0, 1))
    model = build(architecture, LABELS, HashedVocabulary(50))
    encoded = encode_all(model.encoding, EXAMPLES)
    batch = model.encoding.collate(encoded[:1])
    hidden = (
        model.model.eval()
        .get_submodule("encoder")(
            input_ids=batch["subwords"],
            attention_mask=batch["attention"],
            output_hidden_states=True,
        )
        .hidden_states
    )
    means = [layer[0].mean(0) for layer in (hidden[0], hidden[-1])]
    expected = torch.cat([F.layer_norm(mean, mean.shape) for mean in means])
    found = model.model.read(model.encoding.collate(encoded))["pooled"][0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_encoders_pooler_is_not_trained_by_noise(tiny_encoder: Path) -> None:
    model = _classifier("encoder", tiny_encoder).model
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.pooler.dense.weight", "encoder.pooler.dense.bias"]


def test_a_frozen_encoder_is_trained_in_its_heads_only(tiny_encoder: Path) -> None:
    architecture = Architecture(name=f"encoder:{tiny_encoder}", freeze_encoder=True)
    model = build(architecture, LABELS, HashedVocabulary(50)).model
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"intent_head", "slot_head"}


@pytest.mark.parametrize("in_memory", [2**30, 0], ids=["in memory", "mapped"])
@pytest.mark.parametrize("name", ["encoder", "encoder, chain"])
def test_what_a_frozen_encoder_says_once_is_what_it_always_says(
    name: str, in_memory: int, tiny_encoder: Path
) -> None:
    classifier = _classifier(name, tiny_encoder)
    model, encoding = classifier.model, classifier.encoding
    assert isinstance(model, EncoderClassifier)
    encoded = encode_all(encoding, EXAMPLES)
    expected = model.per_example_loss(encoding.collate(encoded))
    once = read_once(model.train(), encoding, encoded, in_memory=in_memory)
    assert model.training and "subwords" not in once[0]
    torch.testing.assert_close(model.eval().per_example_loss(encoding.collate(once)), expected)
    tags = [model(encoding.collate(some)).tags for some in (once[:1], encoded[:1])]
    torch.testing.assert_close(*tags)


def test_a_mapped_cache_leaves_no_file_and_needs_room(tiny_encoder: Path, tmp_path: Path) -> None:
    classifier = _classifier("encoder", tiny_encoder)
    assert isinstance(classifier.model, EncoderClassifier)
    encoded = encode_all(classifier.encoding, EXAMPLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        once = read_once(classifier.model, classifier.encoding, encoded, in_memory=0)
        assert once and not list(tmp_path.iterdir())

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ValueError, match="No space left on device; set TMPDIR"):
            read_once(classifier.model, classifier.encoding, encoded, in_memory=0)


def test_a_wide_model_comes_back_and_an_earlier_one_is_as_it_was(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    wide = _classifier("encoder, chain", tiny_encoder)
    recipe = Recipe(epochs=1, batch_size=2, learning_rate=0.1)
    save(wide, tmp_path, recipe=recipe, plan=None, metrics={}, card="")
    back = load(tmp_path).classifier
    assert back.architecture == wide.architecture
    batch = wide.encoding.collate(encode_all(wide.encoding, EXAMPLES))
    expected, found = wide.model(batch), back.model.double().eval()(batch)
    torch.testing.assert_close(found.tags, expected.tags, rtol=1e-4, atol=1e-5)  # in float32
    assert found.chain == expected.chain
    later = {"slot_loss", "text_layers", "word_layers", "neighbours", "reads_text"}
    later |= {"reads_word_means", "reads_intent_names"}
    kept = {name: v for name, v in wide.architecture.to_dict().items() if name not in later}
    assert Architecture(**kept) == Architecture(name=f"encoder:{tiny_encoder}")
    assert _classifier("encoder", tiny_encoder).model(batch).chain is None


@pytest.mark.parametrize("intents, tags", [(("ask", "tell"), ()), ((), ("B-x", "I-x", "O"))])
def test_only_what_is_read_of_an_encoder_is_computed(
    tiny_encoder: Path, intents: tuple[str, ...], tags: tuple[str, ...]
) -> None:
    """Intents alone: no states of words, but their means. Slots alone: no means over words."""
    architecture = Architecture(
        name=f"encoder:{tiny_encoder}",
        text_layers=(0, 1),
        word_layers=(0, 0.5, 1),
        reads_text=True,
        reads_word_means=True,
        reads_intent_names=True,
    )
    classifier = build(architecture, Labels(intents, tags), HashedVocabulary(50))
    batch = classifier.encoding.collate(encode_all(classifier.encoding, EXAMPLES))
    width = classifier.model.encoder.config.hidden_size
    read = classifier.model.read(batch)
    assert ("states" in read) == bool(tags)
    assert read["pooled"].shape == (len(EXAMPLES), width * (2 + 3 * bool(intents)))
    assert classifier.model.per_example_loss(batch).isfinite().all()
    plain = Architecture(name=f"encoder:{tiny_encoder}")
    old = build(plain, Labels(("ask", "tell"), ()), HashedVocabulary(50)).model
    without_words = {k: v for k, v in batch.items() if k not in ("first", "last")}
    assert set(old.read(without_words)) == {"pooled"}
