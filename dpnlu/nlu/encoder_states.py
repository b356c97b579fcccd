"""What heads read of an encoder: its layers, pooled over a text and word by word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pooled(
    layers: Sequence[Tensor], attention: Tensor, *, shares: Sequence[float] | None
) -> Tensor:
    """The means over the sub-words in several layers, one behind the other, (B, n * d).

    Args:
        layers: (B, S, d), the embeddings first.
        attention: (B, S), 1 for sub-words of the text.
        shares: (n,) which layers, as shares of the depth; None: the last and the middle one.
    """
    weights = attention.to(layers[-1].dtype)[:, :, None]
    chosen = [layers[-1], layers[len(layers) // 2]] if shares is None else _at(layers, shares)
    means = [(layer * weights).sum(1) / weights.sum(1) for layer in chosen]
    return torch.cat([standardized(mean) for mean in means], dim=1)


def first_sub_words(layers: Sequence[Tensor], first: Tensor) -> Tensor:
    """Each word's first sub-word in the last layer, (B, T, d).

    Args:
        first: (B, T) where it stands.
    """
    width = layers[-1].shape[2]
    return standardized(layers[-1].gather(1, first[:, :, None].expand(-1, -1, width)))


def words(
    layers: Sequence[Tensor], first: Tensor, last: Tensor, *, shares: Sequence[float]
) -> Tensor:
    """Each word's mean over its sub-words, in several layers one behind the other, (B, T, n * d).

    Args:
        first, last: (B, T) the places of its first and its last one; a word whose last comes before
            its first has none, and is all 0.
        shares: (n,) which layers, as shares of the depth.
    """
    places = torch.arange(layers[0].shape[1], device=first.device)
    belongs = (places >= first[:, :, None]) & (places <= last[:, :, None])
    weights = belongs.to(layers[0].dtype)
    weights = weights / weights.sum(2, keepdim=True).clamp(min=1)
    return torch.cat([standardized(weights @ layer) for layer in _at(layers, shares)], dim=2)


def means_of_words(states: Tensor, lengths: Tensor, *, layers: int) -> Tensor:
    """The mean over a text's words in each layer, (B, n * d).

    A word with many sub-words counts once, and special ones do not count, unlike in `pooled`.

    Args:
        states: (B, T, n * d), as `words` reads them: 0 past an example's end.
        lengths: (B,) words of each example.
        layers: n.
    """
    means = states.sum(1) / lengths.clamp(min=1)[:, None]
    return torch.cat([standardized(mean) for mean in means.chunk(layers, dim=1)], dim=1)


def intent_scale(*, text_layers: int, mean_layers: int) -> float:
    """By which an intent head scales what it reads: means over sub-words in so many layers, and
    means over words in so many.

    It is as long as the means over sub-words alone would be. Or gradients of intents would be
    longer, and those of slots lose room within the clipping bound.
    """
    return float((text_layers / (text_layers + mean_layers)) ** 0.5)


def standardized(states: Tensor) -> Tensor:
    """(…, d), each vector with mean 0 and variance 1."""
    return F.layer_norm(states, states.shape[-1:])


def zero_linear(width: int, classes: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer that begins with zeros, so that noise has little to spoil before there is
    something learnt."""
    head = nn.Linear(width, classes, bias=bias)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def with_neighbours(logits: Tensor, present: Tensor, *, neighbours: int) -> Tensor:
    """What words say of their own tag and of those around them, added up at each word.

    It is what a linear layer says of a word's state and its neighbours' one behind the other, but
    states are read once and not copied.

    Args:
        logits: (B, T, (2n + 1) L), what each word says of the word n behind it, …, of itself, …, of
            the word n before it.
        present: (B, T) whether the example has that word.

    Returns:
        (B, T, L).
    """
    pieces = logits.masked_fill(~present[:, :, None], 0.0).chunk(2 * neighbours + 1, dim=2)
    steps = logits.shape[1]
    # Piece k of word t is added at word t + n - k.
    wide = [
        F.pad(piece, (0, 0, 2 * neighbours - k, k))[:, neighbours : neighbours + steps]
        for k, piece in enumerate(pieces)
    ]
    return sum(wide[1:], wide[0])


def _at(layers: Sequence[Tensor], shares: Sequence[float]) -> list[Tensor]:
    return [layers[round(share * (len(layers) - 1))] for share in shares]
