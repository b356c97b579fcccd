"""Hugging Face encoders as they come: default inputs, everything trainable, exact."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dpnlu.engines import ENGINES
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.rules import OPERATIONS
from dpnlu.gradients.tape import Tape
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import privatize

pytestmark = pytest.mark.usefixtures("double")

VOCABULARY, WIDTH, CLASSES = 60, 16, 5
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 4,
}
SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}


@dataclass(frozen=True)
class Encoder:
    """A configuration small enough for the loop over examples."""

    name: str
    config: Callable[[], hf.PretrainedConfig]
    model: Callable[[hf.PretrainedConfig], nn.Module] = hf.AutoModel.from_config

    def __str__(self) -> str:
        return self.name


ENCODERS = [
    Encoder("BERT", lambda: hf.BertConfig(**USUAL)),
    Encoder("BERT, eager attention", lambda: hf.BertConfig(**USUAL, attn_implementation="eager")),
    Encoder("RoBERTa", lambda: hf.RobertaConfig(**USUAL)),
    Encoder("XLM-R", lambda: hf.XLMRobertaConfig(**USUAL)),
    Encoder("ELECTRA", lambda: hf.ElectraConfig(**USUAL, embedding_size=8)),
    Encoder("ALBERT", lambda: hf.AlbertConfig(**USUAL, embedding_size=8)),
    Encoder("DeBERTa-v2", lambda: hf.DebertaV2Config(**USUAL)),
    Encoder("DeBERTa-v2, relative", lambda: hf.DebertaV2Config(**USUAL, **RELATIVE)),
    Encoder(
        "DeBERTa-v2, shared key",
        lambda: hf.DebertaV2Config(**USUAL, **RELATIVE, share_att_key=True),
    ),
    Encoder("DeBERTa-v2, convolution", lambda: hf.DebertaV2Config(**USUAL, conv_kernel_size=3)),
    Encoder("ModernBERT", lambda: hf.ModernBertConfig(**USUAL, **SPECIAL)),
    Encoder(
        "DistilBERT",
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24
        ),
    ),
    Encoder(
        "GPT-2",
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=40
        ),
    ),
    Encoder(
        "T5 encoder",
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2
        ),
        hf.T5EncoderModel,
    ),
]
every_encoder = pytest.mark.parametrize("encoder", ENCODERS, ids=str)

# Examples, positions. The number of examples may equal that of the positions, layers, heads, …
SIZES = [(4, 7), (5, 5), (2, 8), (1, 3), (3, 2)]


class Classifier(nn.Module):
    """An encoder with a head for the text and one for its tokens."""

    def __init__(self, encoder: Encoder, config: hf.PretrainedConfig | None = None) -> None:
        super().__init__()
        self.encoder = encoder.model(config or encoder.config())
        self.intent, self.slots = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def hidden(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, **inputs).last_hidden_state

    def sequence_losses(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        logits = self.intent(self.hidden(ids, **inputs)[:, 0])
        return F.cross_entropy(logits, ids[:, 0] % CLASSES, reduction="none")

    def token_losses(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        logits = self.slots(self.hidden(ids, **inputs))
        losses = F.cross_entropy(logits.mT, ids % CLASSES, reduction="none")
        return losses.mean(1)


def _ids(size: tuple[int, int]) -> Tensor:
    return torch.randint(3, VOCABULARY, size)


@every_encoder
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_default_inputs_and_dropout(assert_taped_exactly, encoder, size):
    """Nothing but token ids: positions and types are looked up once for the whole batch."""
    model, ids = Classifier(encoder).train(), _ids(size)
    assert_taped_exactly(model, lambda model: model.sequence_losses(ids))


@every_encoder
@pytest.mark.parametrize("size", [(4, 6), (4, 4)], ids=str)
def test_padded_texts_and_a_loss_on_every_token(assert_taped_exactly, encoder, size):
    model, ids = Classifier(encoder).eval(), _ids(size)
    mask = (torch.arange(size[1]) < torch.tensor([size[1], 1, 2, 3])[:, None]).long()
    assert_taped_exactly(model, lambda model: model.token_losses(ids, attention_mask=mask))


@pytest.mark.parametrize("family", [hf.AutoModelForSequenceClassification, hf.AutoModelForMaskedLM])
@pytest.mark.parametrize("encoder", [e for e in ENCODERS if e.name in ("BERT", "RoBERTa")], ids=str)
def test_heads_as_they_come(assert_taped_exactly, encoder, family):
    """The output layer of the masked language model is tied to the word embedding."""
    model, ids = family.from_config(encoder.config()), _ids((4, 6))
    assert_taped_exactly(model, lambda model: model(input_ids=ids).logits.sin().flatten(1).sum(1))


def test_token_types_and_positions_given_for_each_example(assert_taped_exactly):
    model, ids = Classifier(ENCODERS[0]), _ids((3, 4))
    given = {
        "token_type_ids": torch.randint(0, 2, (3, 4)),
        "position_ids": torch.randint(0, 9, (3, 4)),
    }
    assert_taped_exactly(model, lambda model: model.sequence_losses(ids, **given))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is computed.

    Attributes:
        entries: of that tensor.
    """

    entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.entries = max(self.entries, found.untyped_storage().nbytes() // found.itemsize)
        return found


def test_token_types_take_no_more_memory_where_there_are_as_many_positions_as_examples(
    taped_gradients,
):
    """Each example has rows of its own; written out among the rows of the others they would take
    as many times the memory as there are examples."""

    def largest(size: tuple[int, int]) -> int:
        model = Classifier(ENCODERS[0])
        tape = Tape(model, OPERATIONS)
        try:
            losses = model.sequence_losses(_ids(size))
            with Largest() as mode:
                taped_gradients(tape, losses)
        finally:
            tape.close()
        return mode.entries

    assert largest((12, 12)) <= largest((12, 13))


def test_frozen_embeddings_and_first_layer(assert_taped_exactly):
    model, ids = Classifier(ENCODERS[0]), _ids((3, 4))
    model.encoder.embeddings.requires_grad_(False)
    model.encoder.encoder.layer[0].requires_grad_(False)
    assert_taped_exactly(model, lambda model: model.sequence_losses(ids))


# peft asks transformers in the old way.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("encoder", [e for e in ENCODERS if e.name in ("BERT", "GPT-2")], ids=str)
def test_low_rank_adapters(assert_taped_exactly, encoder):
    peft = pytest.importorskip("peft")
    model, ids = Classifier(encoder), _ids((3, 4))
    targets = ["query", "value"] if encoder.name == "BERT" else ["c_attn"]
    options = {"fan_in_fan_out": encoder.name == "GPT-2"}
    model.encoder = peft.get_peft_model(
        model.encoder, peft.LoraConfig(r=2, target_modules=targets, **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert_taped_exactly(model, lambda model: model.sequence_losses(ids))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("encoder", [e for e in ENCODERS if e.name in ("BERT", "GPT-2")], ids=str)
def test_gradient_checkpointing(assert_taped_exactly, encoder):
    model, ids = Classifier(encoder).train(), _ids((3, 4))
    model.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert_taped_exactly(model, lambda model: model.sequence_losses(ids))


@pytest.mark.slow
@every_encoder
def test_compiled_steps(make_plan, monkeypatch, encoder):
    """What is traced is run as it is; that torch compiles it is tested elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
    texts = list(_ids((6, 7)))

    def released(model: nn.Module, *, compiles: bool, engine: str | None = None) -> Tensor:
        plan = make_plan(
            noise_multiplier=0.0, max_grad_norm=0.3, sample_rate=1.0, steps=1, num_examples=6
        )
        with privatize(model, torch.optim.SGD(model.parameters()), plan, engine=engine) as private:

            def plain(ids: Tensor) -> bool:
                return private.step(model.sequence_losses(ids))

            step = private.compile(model.sequence_losses) if compiles else plain
            for ids in private.loader(texts, physical_batch_size=4, fixed_size=True):
                step(ids)
            return torch.cat([gradient.flatten() for gradient in private.gradients.values()])

    model = Classifier(encoder).eval()
    twin = copy.deepcopy(model)
    expected = released(twin, compiles=False, engine="per_example")
    torch.testing.assert_close(released(model, compiles=True), expected, rtol=1e-9, atol=1e-12)


# ---- the table of the documentation ----------------------------------------------------------

MODELS = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = [e for e in ENCODERS if "," not in e.name]
TASKS = {
    "texts": hf.AutoModelForSequenceClassification,
    "tokens": hf.AutoModelForTokenClassification,
}


class Ready(nn.Module):
    """A ready-made classifier of the library: ids -> losses (B,)."""

    def __init__(self, encoder: Encoder, task: str) -> None:
        super().__init__()
        config = encoder.config()
        config.num_labels = CLASSES
        config.pad_token_id = 0
        if encoder.name == "T5 encoder":  # the library has it for tokens only
            self.model = Classifier(encoder, config) if task == "texts" else None
            self.model = self.model or hf.T5ForTokenClassification(config)
            if task == "texts":
                del self.model.slots
        else:
            self.model = TASKS[task].from_config(config)
        for module in self.modules():  # Opacus works in training mode only
            for name in vars(module):
                if "drop" in name and isinstance(getattr(module, name), float):
                    setattr(module, name, 0.0)
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.model, Classifier):
            return self.model.sequence_losses(ids)
        logits = self.model(input_ids=ids).logits
        labels = ids[:, 0] if logits.dim() == 2 else ids
        losses = F.cross_entropy(logits.movedim(-1, 1), labels % CLASSES, reduction="none")
        return losses.reshape(len(ids), -1).mean(1)


def _support(engine: str, encoder: Encoder, task: str) -> str:
    """How an engine does with a whole model: "exact", "refused", "fails" or "wrong".

    Failing, with an error that names no layer, is for others: ours may be exact or refuse.
    """
    torch.manual_seed(0)
    model, ids = Ready(encoder, task).train(), _ids((4, 7))
    parameters = list(model.parameters())
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        steps=1,
        target_delta=1e-5,
        num_examples=8,
    )
    found = []
    for name in (engine, "per_example"):
        into = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        try:
            with ENGINES[name](model, plan) as made:
                made.clip(model(ids)).total.add_to(into, scale=1.0)
        except UnsupportedLayerError:
            return "refused"
        except (RuntimeError, ValueError, AttributeError):
            if name != "opacus":
                raise
            return "fails"
        found.append(torch.cat([total.flatten() for total in into.values()]))
    return "exact" if float((found[0] - found[1]).norm()) < 1e-9 else "wrong"


@pytest.mark.filterwarnings("ignore")  # the engines' opinions are in the table
def test_the_table_of_the_documentation_says_what_is_so():
    """Everything trainable, default inputs, float64, against the loop over examples."""
    lines = [
        "| Hugging Face family | texts | tokens | Opacus 1.6, texts |",
        "| --- | --- | --- | --- |",
    ]
    for encoder in FAMILIES:
        results = [_support("book_keeping", encoder, task) for task in TASKS]
        results.append(_support("opacus", encoder, "texts"))
        lines.append(f"| {encoder.name} | {' | '.join(results)} |")
    table = "\n".join(lines)
    assert all(row.split(" | ")[1:3] == ["exact", "exact"] for row in lines[2:]), table
    assert table in MODELS.read_text(encoding="utf-8"), f"expected in docs/models.md:\n{table}"
