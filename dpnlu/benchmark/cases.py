"""The work that is measured: models of the shapes people use, random data of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Inputs = tuple[Tensor, Tensor]  # token ids (B, T), intents (B,)

_INTENTS = 64
_SLOTS = 32


def intent_losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """(B,) cross entropies of intents."""
    ids, intents = inputs
    return F.cross_entropy(model(ids), intents, reduction="none")


def slot_losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """(B,) losses of a model that labels every word; its labels are made of the words."""
    ids, _ = inputs
    losses: Tensor = model(ids, ids % _SLOTS)
    return losses


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table.

    Attributes:
        build: makes the model.
        losses_of: (model, inputs) -> (B,) per-example losses.
        positions: T.
        physical: examples computed at once.
        logical: examples per step.
        vocabulary: number of different ids; 0 is padding.
        ragged: whether texts are of all lengths from a quarter of T on, instead of T.
        sampled: whether batches are drawn anew for every step, and put together from examples: by
            `private.loader` as Poisson batches, in ordinary training as shuffled ones.
        target: the overhead that this work should not exceed; None: none was set.
    """

    name: str
    build: Callable[[], nn.Module]
    losses_of: Callable[[nn.Module, Inputs], Tensor] = intent_losses
    positions: int
    physical: int
    logical: int
    vocabulary: int = 10_000
    ragged: bool = False
    sampled: bool = False
    target: float | None = None

    def inputs(self) -> list[Inputs]:
        """The physical batches of one logical batch."""
        return self._inputs(self.logical // self.physical)

    def examples(self) -> list[Inputs]:
        """Data of ten logical batches, example by example: ids (T,), intents ()."""
        batches = self._inputs(10 * self.logical // self.physical)
        return [one for batch in batches for one in zip(*batch, strict=True)]

    def _inputs(self, count: int) -> list[Inputs]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.physical, self.positions)
        batches = []
        for _ in range(count):
            ids = torch.randint(1, self.vocabulary, shape, generator=generator)
            intents = torch.randint(_INTENTS, (self.physical,), generator=generator)
            if self.ragged:
                least, most = self.positions // 4, self.positions + 1
                lengths = torch.randint(least, most, (self.physical, 1), generator=generator)
                ids = ids.masked_fill(torch.arange(self.positions) >= lengths, 0)
            batches.append((ids, intents))
        return batches


_BERT_VOCABULARY = 30_522


class RecurrentClassifier(nn.Module):
    """Embedding, one bidirectional recurrent layer, maximum over time, linear head."""

    def __init__(
        self,
        embedding_size: int,
        hidden_size: int,
        vocabulary: int = 10_000,
        *,
        kind: type[nn.LSTM] | type[nn.GRU] | type[nn.RNN] = nn.LSTM,
        packed: bool = False,
    ) -> None:
        """Random weights.

        Args:
            kind: of the recurrent layer.
            packed: pack the texts, so that steps past their ends are not taken.
        """
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size, padding_idx=0)
        self.recurrent = kind(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, _INTENTS)
        self.packed = packed

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, K)."""
        embedded = self.embedding(ids)
        states = self._packed_states(embedded, ids) if self.packed else self.recurrent(embedded)[0]
        logits: Tensor = self.head(states.amax(1))
        return logits

    def _packed_states(self, embedded: Tensor, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1)
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, padding_value=-torch.inf
        )
        return states


class ConvolutionClassifier(nn.Module):
    """Embedding, convolution of width 3, a layer of choice, mean over time, linear head."""

    def __init__(self, layer: nn.Module, width: int = 128, vocabulary: int = 10_000) -> None:
        """Random weights.

        Args:
            layer: (B, width, T) -> the same.
        """
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.layer = layer
        self.head = nn.Linear(width, _INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, K)."""
        states = torch.relu(self.layer(self.convolution(self.embedding(ids).mT)))
        logits: Tensor = self.head(states.mean(2))
        return logits


class BagClassifier(nn.Module):
    """The mean of the words' embeddings, and a linear head."""

    def __init__(self, width: int = 128, vocabulary: int = 10_000) -> None:
        """Random weights."""
        super().__init__()
        self.bag = nn.EmbeddingBag(vocabulary, width, padding_idx=0)
        self.head = nn.Linear(width, _INTENTS)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, K)."""
        logits: Tensor = self.head(self.bag(ids))
        return logits


class RecurrentTagger(nn.Module):
    """Embedding, one bidirectional LSTM, and a linear-chain conditional random field over slots."""

    def __init__(self, embedding_size: int, hidden_size: int, vocabulary: int = 10_000) -> None:
        """Random weights."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size, padding_idx=0)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, _SLOTS)
        self.transitions = nn.Parameter(torch.randn(_SLOTS, _SLOTS) / 10)

    def forward(self, ids: Tensor, slots: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B,): minus the log likelihood of the slots, by the forward algorithm
        (Lafferty et al. 2001)."""
        emissions = self.head(self.lstm(self.embedding(ids))[0])
        scores = emissions[:, 0]
        for emission in emissions[:, 1:].unbind(1):
            scores = torch.logsumexp(scores[:, :, None] + self.transitions, 1) + emission
        taken = emissions.gather(2, slots[:, :, None])[:, :, 0].sum(1)
        taken = taken + self.transitions[slots[:, :-1], slots[:, 1:]].sum(1)
        losses: Tensor = torch.logsumexp(scores, 1) - taken
        return losses


class EncoderHead(nn.Module):
    """A Hugging Face encoder for sequence classification, called with ids alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, K)."""
        logits: Tensor = self.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits


def bert(*, layers: int, hidden: int, heads: int) -> nn.Module:
    """A randomly initialised BERT of this shape."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=_BERT_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    config.num_labels = _INTENTS
    return EncoderHead(BertForSequenceClassification(config))


def minilm() -> nn.Module:
    """The shape of all-MiniLM-L6: 6 layers of 384, 30 522 words, 22.7 M parameters."""
    return bert(layers=6, hidden=384, heads=12)


def deberta() -> nn.Module:
    """A DeBERTa-v2 with relative positions as in its published models, 2 layers of 128."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    shape: dict[str, Any] = {
        "vocab_size": _BERT_VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    }
    positions: dict[str, Any] = {
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    }
    config = DebertaV2Config(**shape, **positions)
    config.num_labels = _INTENTS
    return EncoderHead(DebertaV2ForSequenceClassification(config))


def minilm_lora() -> nn.Module:
    """The same with LoRA of rank 8 on query and value; the head is trained as well."""
    from peft import LoraConfig, get_peft_model

    model = minilm()
    config = LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(model, config)  # type: ignore[no-any-return]


_RECURRENT = Case(
    name="BiLSTM 100/100",
    build=lambda: RecurrentClassifier(100, 100),
    positions=24,
    physical=64,
    logical=256,
)
CASES = (
    Case(
        name="MiniLM-L6, logical 256",
        build=minilm,
        positions=32,
        physical=32,
        logical=256,
        vocabulary=_BERT_VOCABULARY,
        target=1.10,
    ),
    Case(
        name="MiniLM-L6, logical 32",
        build=minilm,
        positions=32,
        physical=32,
        logical=32,
        vocabulary=_BERT_VOCABULARY,
        target=1.22,
    ),
    Case(
        name="MiniLM-L6, LoRA rank 8",
        build=minilm_lora,
        positions=32,
        physical=32,
        logical=256,
        vocabulary=_BERT_VOCABULARY,
        target=1.10,
    ),
    replace(
        _RECURRENT,
        name="BiLSTM 300/256",
        build=lambda: RecurrentClassifier(300, 256),
        target=1.35,
    ),
    replace(_RECURRENT, target=1.5),
    replace(_RECURRENT, name="BiLSTM 100/100, Poisson batches", sampled=True),
    replace(
        _RECURRENT,
        name="BiLSTM 300/256, packed",
        build=lambda: RecurrentClassifier(300, 256, packed=True),
        ragged=True,
    ),
    replace(
        _RECURRENT,
        name="BiGRU 300/256",
        build=lambda: RecurrentClassifier(300, 256, kind=nn.GRU),
        target=1.35,
    ),
    replace(
        _RECURRENT,
        name="BiGRU 100/100",
        build=lambda: RecurrentClassifier(100, 100, kind=nn.GRU),
        target=1.35,
    ),
    replace(
        _RECURRENT,
        name="BiRNN 100/100",
        build=lambda: RecurrentClassifier(100, 100, kind=nn.RNN),
        target=1.35,
    ),
    replace(
        _RECURRENT,
        name="BiLSTM-CRF 100/100",
        build=lambda: RecurrentTagger(100, 100),
        losses_of=slot_losses,
        target=1.5,
    ),
    Case(
        name="DeBERTa-v2 2 x 128, logical 256",
        build=deberta,
        positions=32,
        physical=32,
        logical=256,
        vocabulary=_BERT_VOCABULARY,
        target=1.5,
    ),
    Case(
        name="DeBERTa-v2 2 x 128, logical 32",
        build=deberta,
        positions=32,
        physical=32,
        logical=32,
        vocabulary=_BERT_VOCABULARY,
        target=1.5,
    ),
    Case(
        name="GroupNorm",
        build=lambda: ConvolutionClassifier(nn.GroupNorm(8, 128)),
        positions=32,
        physical=32,
        logical=256,
        target=2.0,
    ),
    Case(
        name="InstanceNorm",
        build=lambda: ConvolutionClassifier(nn.InstanceNorm1d(128, affine=True)),
        positions=32,
        physical=32,
        logical=256,
        target=2.0,
    ),
    Case(
        name="PReLU",
        build=lambda: ConvolutionClassifier(nn.PReLU(128)),
        positions=32,
        physical=32,
        logical=256,
        target=2.0,
    ),
    Case(
        name="EmbeddingBag",
        build=BagClassifier,
        positions=32,
        physical=32,
        logical=256,
        target=2.0,
    ),
)


def named(name: str) -> Case:
    """The case of this name."""
    return next(case for case in CASES if case.name == name)
