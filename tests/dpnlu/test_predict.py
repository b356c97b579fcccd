"""A trained model in use: what it says of texts, from Python and from the command line."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dpnlu
from dpnlu.cli.main import main
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Architecture, Classifier, assemble, build
from dpnlu.nlu.data import DataError, Example, HashedVocabulary, WordList
from dpnlu.nlu.encoding import Labels, encode_all
from dpnlu.nlu.prediction import Prediction, Slot, predict, read
from dpnlu.nlu.utterances import utterance, utterance_of_line, utterance_of_tokens
from dpnlu.runs.answering import answers
from dpnlu.runs.exported import heads_in_words
from dpnlu.runs.model_directory import save
from dpnlu.training.loop import Recipe

WORDS = ("call", "anna", "lee", "now", "wake", "me")
TAGS = ("B-name", "I-name", "O")
RECIPE = Recipe(epochs=1, batch_size=8, learning_rate=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BiLSTM that knows: calls, with names of one or two words, and alarms."""
    rows = [
        (["call", "anna", "now"], ["O", "B-name", "O"], "call"),
        (["call", "anna", "lee"], ["O", "B-name", "I-name"], "call"),
        (["wake", "me", "now"], ["O", "O", "O"], "alarm"),
    ]
    examples = [
        Example(
            id=str(n),
            text=" ".join(tokens),
            tokens=tuple(tokens),
            tags=tuple(tags),
            intent=intent,
            split="train",
        )
        for n, (tokens, tags, intent) in enumerate(rows)
    ]
    torch.manual_seed(0)
    words = WordList(words=WORDS, is_public=True)
    made = build(Architecture(name="lstm"), Labels(("alarm", "call"), TAGS), words)
    batch = made.encoding.collate(encode_all(made.encoding, examples))
    optimizer = torch.optim.Adam(made.model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        made.model.per_example_loss(batch).sum().backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("model")
    save(made, out, recipe=RECIPE, plan=None, metrics={}, card="# card")
    return out


def _encoder(folder: Path, labels: Labels) -> Classifier:
    """Random heads: what they say is no matter, but they say something."""
    torch.manual_seed(0)
    made = build(Architecture(name=f"encoder:{folder}"), labels, HashedVocabulary(9))
    for head in (made.model.intent_head, made.model.slot_head):
        if head is not None:
            torch.nn.init.normal_(head.weight)
    return made


# ---- utterances --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Don't  wake\tme at 5:30!", " İstanbul 🙂 ﬁn é", "a\u2028b\x00c"])
def test_tokens_stand_where_they_are_said_to(text: str) -> None:
    found = utterance(text)
    assert found.tokens
    for token, start, end in zip(found.tokens, found.starts, found.ends, strict=True):
        assert text[start:end] == token


def test_tokens_are_found_in_a_text_that_is_given() -> None:
    found = utterance_of_tokens(["a", "a", "b"], text="a, (a) b")
    assert found.starts == (0, 4, 7)
    assert utterance_of_tokens(["New York", "!"]).starts == (0, 9)
    with pytest.raises(DataError, match="'a' is not found behind character 8"):
        utterance_of_tokens(["b", "a"], text="a, (a) b")


GOOD_LINES = {
    b"wake me": "wake me",
    b'{"text": "wake me", "intent": 3}': "wake me",
    b'{"tokens": ["wake", "me"]}': "wake me",
    b'{"text": "wake  me", "tokens": ["wake", "me"]}': "wake  me",
    b"[1]": "[1]",
    b'  {"text": "a"}': "a",
}


@pytest.mark.parametrize("line", GOOD_LINES)
def test_a_line_is_a_text_or_an_object(line: bytes) -> None:
    assert utterance_of_line(line, place="here", is_json=False).text == GOOD_LINES[line]


# ---- from Python -------------------------------------------------------------------------------


def test_a_model_answers_with_places_in_the_text(model: Path) -> None:
    loaded = dpnlu.load(model)
    found = loaded.predict(["call  ANNA   Lee", "wake me now"])
    assert [answer.intent for answer in found] == ["call", "alarm"]
    assert found[0].slots == (Slot(slot="name", text="ANNA   Lee", start=6, end=16),)
    assert found[1].slots == ()
    assert all(0.5 < answer.probability <= 1 for answer in found)
    assert (loaded.plan, loaded.epsilon) == (None, None)
    assert not loaded.model.training
    assert loaded.predict([]) == []


def test_an_answer_does_not_depend_on_the_batch(model: Path) -> None:
    loaded = dpnlu.load(model)
    texts = ["call anna lee now now now", "wake", "me anna", "call zoe"]
    together, alone = loaded.predict(texts), loaded.predict(texts, batch_size=1)
    assert [a.slots for a in together] == [a.slots for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-5)


def test_the_probability_is_that_of_the_intent(model: Path) -> None:
    loaded = dpnlu.load(model)
    (answer,) = loaded.predict(["call anna"])
    encoding = loaded.classifier.encoding
    logits = loaded.model(encoding.collate([encoding.read(("call", "anna"))])).intents[0]
    place = encoding.labels.intents.index(answer.intent)
    assert answer.probability == pytest.approx(float(logits.detach().softmax(0)[place]), rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "error", "said"),
    [
        ("call", TypeError, "one text"),
        (["call", " "], DataError, "Text 2: expected a text"),
        (["\ud800"], DataError, "surrogate"),
        (["a" * 100_001], DataError, "100000 characters"),
    ],
)
def test_no_text_is_refused(model: Path, texts: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        dpnlu.load(model).predict(texts)


def test_epsilon_is_that_of_the_ledger(tmp_path: Path) -> None:
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.1,
        steps=4,
        target_delta=1e-3,
        num_examples=100,
    )
    with Ledger(plan, path=tmp_path / "ledger.jsonl") as ledger:
        for step in range(3):
            ledger.append(plan.event_at(step))
        expected = ledger.epsilon()
    made = build(Architecture(name="lstm"), Labels(("a", "b"), ()), HashedVocabulary(9))
    save(made, tmp_path, recipe=RECIPE, plan=plan, metrics={"epsilon": 99.0}, card="")
    loaded = dpnlu.load(tmp_path)
    assert loaded.plan == plan and loaded.epsilon == expected < plan.epsilon()
    (answer,) = loaded.predict(["hello"])
    assert answer.slots is None and "slots" not in answer.to_dict()


def test_a_model_of_slots_alone_says_no_intent(tiny_encoder: Path) -> None:
    made = _encoder(tiny_encoder, Labels((), TAGS))
    (answer,) = predict(made, [read(made, utterance("call anna"))])
    assert (answer.intent, answer.probability) == (None, None)
    assert answer.to_dict().keys() == {"text", "slots"}


def test_an_inside_without_a_beginning_begins_a_slot(tiny_encoder: Path) -> None:
    """As seqeval counts it."""
    made = _encoder(tiny_encoder, Labels((), TAGS))
    torch.nn.init.zeros_(made.model.slot_head.weight)
    made.model.slot_head.bias.data = torch.tensor([0.0, 1.0, 0.0])
    (answer,) = predict(made, [read(made, utterance("call anna"))])
    assert answer.slots == (Slot(slot="name", text="call anna", start=0, end=9),)


def test_a_word_that_the_encoder_does_not_see_has_no_slot(tiny_encoder: Path) -> None:
    made = _encoder(tiny_encoder, Labels((), TAGS))
    torch.nn.init.zeros_(made.model.slot_head.weight)
    made.model.slot_head.bias.data = torch.tensor([1.0, 0.0, 0.0])
    seen, unseen = predict(made, [read(made, utterance(text)) for text in ("a b", "a \x00 b")])
    assert [slot.text for slot in seen.slots] == ["a", "b"]
    assert [(slot.text, slot.start) for slot in unseen.slots] == [("a", 0), ("b", 4)]


def test_what_an_encoder_has_no_positions_for_is_refused(tiny_encoder: Path) -> None:
    """The tiny one has 64, of which two go to [CLS] and [SEP]; training cuts there."""
    made = _encoder(tiny_encoder, Labels(("a", "b"), ()))
    longest = "a " * 62
    assert predict(made, [read(made, utterance(longest))])
    with pytest.raises(
        DataError, match="at most 64 sub-words, which is what the model reads, got 65"
    ):
        read(made, utterance(longest + "a"))
    example = Example(
        id="1",
        text="x",
        tokens=("a",) * 99,
        tags=None,
        intent="a",
        split="train",
    )
    assert len(made.encoding.encode(example)["subwords"]) == 64


def test_models_like_roberta_have_fewer_positions_than_they_say() -> None:
    """They count from behind the id of the padding on."""
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=50, intermediate_size=8, max_position_embeddings=20, **size)
    encoder = RobertaModel(config).eval()

    class Tokenizer:
        model_max_length = int(1e30)

    made = assemble(
        Architecture(name="encoder:x"), Labels((), TAGS), encoder=encoder, tokenizer=Tokenizer()
    )
    assert made.encoding.longest == 18
    ids = torch.full((1, 18), 7)
    encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    more = torch.full((1, 19), 7)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        encoder(input_ids=more, attention_mask=torch.ones_like(more))


# ---- for transformers --------------------------------------------------------------------------


def test_transformers_alone_loads_what_is_exported(tmp_path: Path, tiny_encoder: Path) -> None:
    home, out = tmp_path / "m", tmp_path / "out"
    made = _encoder(tiny_encoder, Labels(("a", "b"), TAGS))
    for parameter in made.model.parameters():  # trained, as it were
        parameter.data.add_(0.1)
    save(made, home, recipe=RECIPE, plan=None, metrics={}, card="# what it claims")
    dpnlu.load(home).export(out)
    code = """
        import sys, torch
        from transformers import AutoModel, AutoTokenizer
        folder = sys.argv[1]
        found = AutoTokenizer.from_pretrained(folder)(["call anna"], return_tensors="pt")
        states = AutoModel.from_pretrained(folder).eval()(**found).last_hidden_state
        assert not any(name.split(".")[0] == "dpnlu" for name in sys.modules)
        torch.save(states.detach(), sys.argv[2])
    """
    run = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    subprocess.run([*run, str(out), str(tmp_path / "states.pt")], check=True, env=os.environ)
    batch = made.encoding.collate([made.encoding.read(("call", "anna"))])
    ours = made.model.eval().encoder(input_ids=batch["subwords"], attention_mask=batch["attention"])
    theirs = torch.load(tmp_path / "states.pt", weights_only=True)
    torch.testing.assert_close(theirs, ours.last_hidden_state)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# what it claims\n") and "heads.safetensors" in card
    assert json.loads((out / "heads.json").read_text(encoding="utf-8")) == {
        "intents": ["a", "b"],
        "tags": list(TAGS),
    }
    dpnlu.load(home)  # nothing was added to it


def test_an_export_says_what_its_heads_read(tiny_encoder: Path) -> None:
    plain = Architecture(name=f"encoder:{tiny_encoder}")
    wide = replace(plain, word_layers=(0, 0.5), neighbours=2, reads_text=True, slot_loss="chain")
    assert "first sub-word" in heads_in_words(plain) and "Viterbi" not in heads_in_words(plain)
    assert "means over the words" not in heads_in_words(wide)
    with_means = heads_in_words(replace(wide, reads_word_means=True))
    assert "means over the words" in with_means and "times 0.707107" in with_means
    said = heads_in_words(wide)
    assert "0.333" in heads_in_words(replace(wide, text_layers=(1 / 3, 1)))
    for piece in ("share of 0, 0.5,", "5 pieces", "word 2 behind", "text head", "Viterbi"):
        assert piece in said
    assert "0 for every digit" in heads_in_words(replace(plain, redact_digits=True))


def test_an_export_overwrites_nothing(tmp_path: Path, tiny_encoder: Path, model: Path) -> None:
    home = tmp_path / "m"
    made = _encoder(tiny_encoder, Labels(("a", "b"), ()))
    save(made, home, recipe=RECIPE, plan=None, metrics={}, card="")
    loaded = dpnlu.load(home)
    with pytest.raises(ValueError, match="outside of the model"):
        loaded.export(home / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="new or empty"):
        loaded.export(tmp_path / "thesis")
    with pytest.raises(ValueError, match="got a BiLSTM"):
        dpnlu.load(model).export(tmp_path / "lstm")


# ---- lines -------------------------------------------------------------------------------------


class _Pipe(io.BytesIO):
    """Gives out what it holds piece by piece, and notes how much was asked for."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__()
        self.pieces, self.given = list(pieces), 0

    def read1(self, size: int | None = -1) -> bytes:
        self.given += 1
        return self.pieces.pop(0) if self.pieces else b""


def _answers(model: Path, source: io.BytesIO, **changed: Any) -> Any:
    options = {"name": "in", "is_json": False, "batch_size": 64} | changed
    return answers(dpnlu.load(model), source, **options)


def test_lines_are_answered_before_more_is_waited_for(model: Path) -> None:
    pipe = _Pipe(b"call anna\nwake", b" me\n", b"\xc3", b"\xa9\n", b"last")
    seen = [(pipe.given, [p.text for p in found]) for found in _answers(model, pipe)]
    assert seen == [(1, ["call anna"]), (2, ["wake me"]), (4, ["é"]), (6, ["last"])]


def test_answers_come_in_batches_and_in_order(model: Path) -> None:
    texts = [f"call {n}" for n in range(7)]
    source = io.BytesIO(("\ufeff" + "\r\n".join(texts) + "\r\n").encode())
    found = [[p.text for p in some] for some in _answers(model, source, batch_size=3)]
    assert found == [texts[:3], texts[3:6], texts[6:]]


def test_no_lines_have_no_answers(model: Path) -> None:
    assert list(_answers(model, io.BytesIO(b""))) == []


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_what_stands_before_a_bad_line_is_answered(model: Path, batch_size: int) -> None:
    found: list[Prediction] = []
    source = io.BytesIO(b"a\nb\nc\n\nd\n")
    with pytest.raises(DataError, match="in, line 4: expected a text, got an empty line"):
        for some in _answers(model, source, batch_size=batch_size):
            found += some
    assert [answer.text for answer in found] == ["a", "b", "c"]


def test_a_line_without_an_end_is_no_line(model: Path) -> None:
    class Endless(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return b"a" * 2**20

    with pytest.raises(DataError, match="in, line 1: expected lines of at most"):
        list(_answers(model, Endless()))


# ---- the command -------------------------------------------------------------------------------

BAD_LINES = {
    "empty": (b"call\n\ncall\n", "line 2: expected a text, got an empty line"),
    "blank": (b"call\n \t\n", "line 2: expected a text"),
    "not UTF-8": (b"call\ncaf\xe9\n", "line 2: expected UTF-8 text, got byte 0xe9"),
    "broken JSON": (b'call\n{"text": \n', "line 2: expected JSON, got"),
    "no text": (b'{"words": ["a"]}\n', "line 1: expected {"),
    "number": (b'{"text": 3}\n', "line 1: expected {"),
    "no tokens": (b'{"tokens": []}\n', "line 1: expected tokens"),
    "blank token": (b'{"tokens": ["a", " "]}\n', "line 1: expected tokens"),
    "other tokens": (b'{"text": "a", "tokens": ["b"]}\n', "line 1: expected tokens that follow"),
    "half a character": (b'{"text": "\\ud800"}\n', "line 1: expected valid Unicode"),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: expected JSON that can be read"),
    "long": (b"a" * 100_001 + b"\n", "line 1: expected a text of at most 100000"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_told_in_one_line(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BAD_LINES[case]
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    assert main(["predict", str(model), str(file), "--quiet"]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("dpnlu: error: ") and f"{file}, {said}" in printed.err
    assert len(printed.out.splitlines()) == (1 if content.startswith(b"call") else 0)


def test_every_line_of_a_jsonl_file_is_an_object(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "call"}\n"text": "a"}\n', encoding="utf-8")
    assert main(["predict", str(model), str(file), "--quiet"]) == 2
    assert "line 2: expected JSON" in capsys.readouterr().err


BAD_OPTIONS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no model": (lambda model: [str(model.parent / "none")], "train one"),
    "no file": (lambda model: [str(model), "/nowhere"], "No such file"),
    "a folder": (lambda model: [str(model), str(model)], "Is a directory"),
    "no batch": (lambda model: [str(model), "--batch-size", "0"], "`batch_size`"),
    "no device": (lambda model: [str(model), "--device", "tpu"], "auto, cpu, cuda[:N] or mps"),
    "not here": (lambda model: [str(model), "--device", "cuda:999"], "cuda:999"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_line(
    case: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, said = BAD_OPTIONS[case]
    assert main(["predict", *options(model), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and said in line


def test_a_pipe_sees_answers_before_its_end(model: Path) -> None:
    code = "import sys; from dpnlu.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "predict", str(model), "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stderr is not None
        for text in ("call anna lee", "wake é"):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert answer["text"] == text
            assert answer.keys() == {"text", "intent", "probability", "slots"}
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_answers_are_those_of_the_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with progress: on standard error, and nothing of it among the answers."""
    file = tmp_path / "texts"
    file.write_text('call anna lee\n{"tokens": ["wake", "me"]}\n', encoding="utf-8")
    assert main(["predict", str(model), str(file), "--batch-size", "1"]) == 0
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    expected = dpnlu.load(model).predict(["call anna lee", "wake me"])
    assert [answer["slots"] for answer in found] == [e.to_dict()["slots"] for e in expected]
    assert [answer["intent"] for answer in found] == ["call", "alarm"]
    assert all(math.isfinite(answer["probability"]) for answer in found)
    assert "predicting" in printed.err
