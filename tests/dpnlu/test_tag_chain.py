"""The chain of slot tags against the sum, and the maximum, over all sequences that are allowed."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.nlu.data.iob import violation
from dpnlu.nlu.tag_chain import TagChain

TAGS = ("B-x", "B-y", "B-z", "I-x", "I-y", "O")
# Another order, two slots that are always of one word.
ODD_TAGS = ("I-y", "O", "B-x", "B-y", "B-w")


def _allowed(tags: tuple[str, ...], length: int) -> Tensor:
    rows = product(range(len(tags)), repeat=length)
    return torch.tensor([row for row in rows if violation([tags[n] for n in row]) is None])


def _scores(logits: Tensor, rows: Tensor) -> Tensor:
    """(T, L) logits, (R, T) sequences -> (R,) their scores."""
    return logits.gather(1, rows.T).sum(0)


def _losses(chain: TagChain, logits: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
    given = chain.conditional(logits, tags, lengths)
    return F.cross_entropy(given.mT, tags, reduction="none", ignore_index=-100).sum(1)


@pytest.mark.parametrize("tags", [TAGS, ODD_TAGS], ids=["sorted", "odd"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_losses_and_gradients_are_those_over_all_sequences(tags, scale: float) -> None:
    """A batch of texts of one to five words, with whatever in the padding."""
    chain, longest = TagChain.of(tags), 5
    lengths = torch.arange(1, longest + 1)
    logits = (
        scale * torch.randn(longest, longest, len(tags), dtype=torch.float64)
    ).requires_grad_()
    labels, expected = torch.full((longest, longest), -100), []
    for row, length in enumerate(lengths.tolist()):
        rows = _allowed(tags, length)
        truth = rows[torch.randint(len(rows), ())]
        labels[row, :length] = truth
        scores = _scores(logits[row, :length], rows)
        expected.append(scores.logsumexp(0) - _scores(logits[row, :length], truth[None])[0])
    found = _losses(chain, logits, labels, lengths)
    oracle = torch.stack(expected)
    torch.testing.assert_close(found, oracle, rtol=1e-10, atol=1e-10)
    for one, other in zip(found, oracle, strict=True):
        gradients = (
            torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (one, other)
        )
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tags", [TAGS, ODD_TAGS], ids=["sorted", "odd"])
def test_the_likeliest_tags_are_those_of_all_sequences(tags) -> None:
    chain, longest, texts = TagChain.of(tags), 5, 40
    lengths = torch.randint(1, longest + 1, (texts,))
    logits = 2 * torch.randn(texts, longest, len(tags))
    found = chain.likeliest(logits, lengths)
    changed = 0
    for row, length in enumerate(lengths.tolist()):
        rows = _allowed(tags, length)
        best = rows[_scores(logits[row, :length], rows).argmax()]
        assert torch.equal(found[row, :length], best)
        changed += not torch.equal(logits[row, :length].argmax(1), best)
    assert changed > texts / 4  # or the test would show nothing


def test_each_conditional_is_a_distribution_over_what_may_follow() -> None:
    chain, length = TagChain.of(TAGS), 4
    logits, rows = torch.randn(1, length, len(TAGS), dtype=torch.float64), _allowed(TAGS, 4)
    weights = _scores(logits[0], rows).softmax(0)
    truth = rows[torch.randint(len(rows), ())]
    found = chain.conditional(logits, truth[None], torch.tensor([length])).softmax(2)[0]
    for word in range(length):
        shares = weights * (rows[:, :word] == truth[:word]).all(1)
        expected = torch.stack([shares[rows[:, word] == n].sum() for n in range(len(TAGS))])
        torch.testing.assert_close(found[word], expected / expected.sum())


def test_behind_an_unknown_tag_any_may_follow() -> None:
    chain = TagChain.of(TAGS)
    tags = torch.tensor([[0, -100, TAGS.index("I-y")]])
    losses = _losses(chain, torch.randn(1, 3, len(TAGS)), tags, torch.tensor([3]))
    assert losses.isfinite().all() and (losses > 0).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_nothing_that_is_given_is_written_to(batch: int, length: int) -> None:
    chain, lengths = TagChain.of(TAGS), torch.full((batch,), length)
    logits = torch.randn(batch, length, len(TAGS), requires_grad=True)
    tags = torch.full((batch, length), TAGS.index("O"))
    before = logits.detach().clone()
    given = chain.conditional(logits, tags, lengths)
    chain.likeliest(logits, lengths)
    upstream = torch.ones_like(given)
    given.backward(upstream)
    assert torch.equal(logits, before) and (upstream == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_texts_with_large_logits_lose_nothing(dtype: torch.dtype) -> None:
    """Near certainty of the truth, and near certainty of something else."""
    chain, length = TagChain.of(TAGS), 200
    labels = torch.tensor([[0, *[3] * (length - 1)], [5] * length])
    said = F.one_hot(labels[:1], len(TAGS)).expand(2, -1, -1)
    logits = (60.0 * said).to(dtype).requires_grad_()
    losses = _losses(chain, logits, labels, torch.tensor([length, length]))
    reference = _losses(chain, logits.detach().double(), labels, torch.tensor([length, length]))
    assert losses.tolist() == pytest.approx([0.0, 60.0 * length], rel=1e-3)
    torch.testing.assert_close(losses.double(), reference, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("tags", "said"), [(("I-x", "O"), "'I-x' without 'B-x'"), (("B-x", "I-x"), "no 'O'")]
)
def test_tags_that_are_not_iob2_are_refused(tags, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TagChain.of(tags)
