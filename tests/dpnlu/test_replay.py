"""Replayed steps on a GPU release what other steps release there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from dpnlu.engines.replay import Replay
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import privatize
from tests.dpnlu.readers import Read

WORDS, POSITIONS = 12, 6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Dense(nn.Module):
    """Padding, dropout, normalization, a linear layer that is used twice."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.twice(torch.tanh(self.twice(self.norm(self.words(ids)))))
        return self.head(self.dropout(states)).mean(1)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
        self.encoder = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(input_ids=ids, attention_mask=(ids > 0).long()).logits


def losses_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    ids, intents = batch
    return F.cross_entropy(model(ids), intents, reduction="none")


def collate(examples: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Texts as long as the longest."""
    ids, intents = (torch.stack(values) for values in zip(*examples, strict=True))
    longest = int((ids > 0).sum(1).max())
    return [ids[:, :longest].cuda(), intents.cuda()]


def _data() -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(1, WORDS, (24, POSITIONS))
    lengths = torch.randint(2, POSITIONS + 1, (24, 1))
    ids[torch.arange(POSITIONS) >= lengths] = 0
    return list(zip(ids, torch.randint(3, (24,)), strict=True))


def released(
    model: nn.Module,
    *,
    replays: bool,
    losses_of: Callable[[nn.Module, list[Tensor]], Tensor] = losses_of,
    precision: torch.dtype | None = None,
    clipping: str = "flat",
    steps: int = 12,
    rate: float = 0.5,
) -> tuple[Tensor, int]:
    """What each step released, (steps, n), and how many examples were left out."""
    plan = PrivacyPlan(
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        sample_rate=0.5,
        steps=steps,
        target_delta=1e-3,
        num_examples=24,
        clipping=clipping,
    )
    torch.manual_seed(1)
    data, found = _data(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with privatize(model, optimizer, plan, sampling_rng=np.random.default_rng(1)) as private:

        def of_batch(batch: list[Tensor]) -> Tensor:
            with torch.autocast("cuda", dtype=precision, enabled=precision is not None):
                return losses_of(model, batch).float() if precision else losses_of(model, batch)

        step = (
            private.compile(of_batch, backend="cudagraphs")
            if replays
            else private.stepper(of_batch)
        )
        for batch in private.loader(
            data, collate_fn=collate, physical_batch_size=5, fixed_size=True
        ):
            if step(batch):
                found.append(torch.cat([g.flatten() for g in private.gradients.values()]))
        return torch.stack(found), private.non_finite_units


def _both(make: Callable[[], nn.Module], **options: object) -> tuple[Tensor, Tensor, int, int]:
    model = make().cuda()
    twin = make().cuda()
    twin.load_state_dict(model.state_dict())
    expected, left_out = released(twin, replays=False, **options)
    found, also_left_out = released(model, replays=True, **options)
    return found, expected, also_left_out, left_out


@pytest.mark.parametrize("clipping", ["flat", "per_layer:size", "quantile:0.3:1"])
@pytest.mark.parametrize("make", [Dense, Read, Bert])
def test_in_double_precision(make: Callable[[], nn.Module], clipping: str) -> None:
    """… to the ninth digit, in batches of several lengths."""
    torch.set_default_dtype(torch.float64)
    found, expected, *_ = _both(make, clipping=clipping)
    assert len(found) == 12 and expected.norm(dim=1).min() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [Dense, Read, Bert])
def test_in_single_precision(make: Callable[[], nn.Module]) -> None:
    found, expected, *_ = _both(make)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [Dense, Bert])
def test_under_autocast(make: Callable[[], nn.Module]) -> None:
    found, expected, *_ = _both(make, precision=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_an_infinite_example_is_left_out() -> None:
    def infinite_for_some(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return torch.where(batch[0][:, 0] == 1, torch.inf, losses_of(model, batch))

    found, expected, also_left_out, left_out = _both(Dense, losses_of=infinite_for_some)
    assert also_left_out == left_out > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_dropout_draws_anew_in_every_replay() -> None:
    model = Dense(dropout=0.5).cuda()

    def of_the_same_texts(model: nn.Module, batch: list[Tensor]) -> Tensor:
        ids = torch.arange(1, 6, device="cuda").expand(len(batch[0]), 5)
        return F.cross_entropy(model(ids), torch.zeros_like(batch[1]), reduction="none")

    found, _ = released(model, replays=True, losses_of=of_the_same_texts, rate=0.0)
    directions = found / found.norm(dim=1, keepdim=True)
    likeness = directions @ directions.mT - 2 * torch.eye(len(found), device="cuda")
    assert likeness.max() < 1 - 1e-3


def test_a_replay_follows_inputs_weights_and_what_it_holds() -> None:
    weight, held = torch.randn(3, 3, device="cuda"), torch.randn(3, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    replay = Replay(lambda values, held: [values @ weight + held], held=[held], pool=pool)
    other = Replay(lambda values: [values * 2, values.sum(0)], pool=pool)
    for _ in range(4):
        values = torch.randn(5, 3, device="cuda")
        (found,) = replay(values)
        doubled, total = other(values)
        torch.testing.assert_close(found, values @ weight + held)
        torch.testing.assert_close(doubled, values * 2)
        torch.testing.assert_close(total, values.sum(0))
        weight.mul_(1.5)
        held.add_(1)
