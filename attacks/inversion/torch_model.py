"""Anybody's torch model as inversion wants it: from two functions and the label sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks._validate import shown
from attacks.inversion.protocol import Cloze, Inputs
from attacks.signals import Predictions

_NO_LABEL = -100


@dataclass(frozen=True)
class Layout:
    """The input vectors of a text.

    Attributes:
        vectors: (S, d).
        spans: for each token the first of its vectors and the one behind its last; vectors of no
            token, such as those of special pieces, lie between.
    """

    vectors: Tensor
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rows:
    """A batch for the model, all of whose texts are clozes that have been filled.

    Attributes:
        vectors: (B, S, d).
        sizes: (B,) how many of the S vectors belong to the text.
        first: (B, T) the first vector of each token; 0 past the last token.
        last: (B, T) its last vector; -1 past the last token, and of a token without any.
        lengths: (B,) tokens of each text.
        tags: (B, T) what is to be predicted of each token, negative past the last; for models whose
            probability of a tag depends on those before it. None: the clozes have no tags.
    """

    vectors: Tensor
    sizes: Tensor
    first: Tensor
    last: Tensor
    lengths: Tensor
    tags: Tensor | None = None


class TorchModel:
    """A model, read through `read` and run by `forward`; see `attacks.inversion.protocol`."""

    def __init__(
        self,
        network: nn.Module,
        clozes: Sequence[Cloze],
        *,
        read: Callable[[Sequence[str]], Layout],
        forward: Callable[[Rows], tuple[Tensor | None, Tensor | None]],
        intents: Sequence[str] = (),
        tags: Sequence[str] = (),
    ) -> None:
        """Read the clozes, and each candidate in its place.

        Args:
            read: the tokens of a text -> its input vectors, those of one token independent of the
                others: rows of an embedding table, with what is computed from the token alone.
            forward: filled clozes -> intent logits (B, K) and tag logits (B, T, L), each None
                where the model has none; differentiable in the vectors.
            intents, tags: the label sets in the order of the logits; empty: none.

        Raises:
            ValueError: no cloze, a label that the model does not know, candidates of one hole that
                take different numbers of vectors, or that have the same ones.
        """
        if not clozes:
            raise ValueError("Expected at least one cloze, got none: say what is to be extracted.")
        self.network = network
        self.clozes = tuple(clozes)
        self._forward = forward
        with torch.no_grad():
            layouts = [read([t or c[0] for t, c in _with_candidates(z)]) for z in self.clozes]
            tables = [_tables(cloze, read) for cloze in self.clozes]
        self.inputs = _inputs(self.clozes, layouts, tables)
        device = self.inputs.vectors.device
        self._sizes = torch.tensor([len(layout.vectors) for layout in layouts], device=device)
        self._lengths = torch.tensor([len(z.tokens) for z in self.clozes], device=device)
        first = [torch.tensor([start for start, _ in layout.spans]) for layout in layouts]
        self._first = _stacked(first, 0).to(device)
        last = [torch.tensor([stop - 1 for _, stop in layout.spans]) for layout in layouts]
        self._last = _stacked(last, -1).to(device)
        self._intents = _intent_labels(self.clozes, intents, device)
        self._tags = _tag_labels(self.clozes, tags, device)

    def predict(self, vectors: Tensor, cloze: Tensor) -> Predictions:
        """Logits and labels of rows `(B, S, d)` that fill the clozes `(B,)`."""
        tags = None if self._tags is None else self._tags[cloze]
        rows = Rows(
            vectors,
            self._sizes[cloze],
            self._first[cloze],
            self._last[cloze],
            self._lengths[cloze],
            tags,
        )
        intent_logits, tag_logits = self._forward(rows)
        return Predictions(
            intent_logits=None if self._intents is None else intent_logits,
            intents=None if self._intents is None else self._intents[cloze],
            tag_logits=None if self._tags is None else tag_logits,
            tags=tags,
        )


def _with_candidates(cloze: Cloze) -> list[tuple[str | None, tuple[str, ...]]]:
    """Each token with the candidates of its hole; none outside of holes."""
    lists = iter(cloze.candidates)
    return [(token, () if token is not None else next(lists)) for token in cloze.tokens]


def _tables(cloze: Cloze, read: Callable[[Sequence[str]], Layout]) -> list[Tensor]:
    """For each hole the vectors of its candidates (V, p, d)."""
    return [_table(tokens, read) for tokens in cloze.candidates]


def _table(tokens: Sequence[str], read: Callable[[Sequence[str]], Layout]) -> Tensor:
    found = []
    for token in tokens:
        layout = read([token])
        start, stop = layout.spans[0]
        found.append(layout.vectors[start:stop])
    pieces = [len(vectors) for vectors in found]
    if min(pieces) < 1 or len(set(pieces)) > 1:
        odd = next(i for i, size in enumerate(pieces) if size != pieces[0] or size < 1)
        raise ValueError(
            f"Expected every candidate of a hole as {max(1, pieces[0])} piece(s) of the model's "
            f"tokenizer, like {tokens[0]!r}, got {pieces[odd]} for {tokens[odd]!r}: leave it out, "
            "or search candidates of each number of pieces by themselves."
        )
    table = torch.stack(found)
    _, groups = torch.unique(table.flatten(1), dim=0, return_inverse=True)
    seen: dict[int, str] = {}
    for token, group in zip(tokens, groups.tolist(), strict=True):
        if group in seen:
            raise ValueError(
                f"Expected candidates that the model can tell apart, got {seen[group]!r} and "
                f"{token!r} with the same input vectors: they are unknown to its vocabulary, or "
                "share an entry of it; leave one out."
            )
        seen[group] = token
    return table


def _inputs(
    clozes: Sequence[Cloze], layouts: Sequence[Layout], tables: Sequence[Sequence[Tensor]]
) -> Inputs:
    vectors = _stacked([layout.vectors.detach() for layout in layouts], 0)
    holes = max(len(cloze.holes) for cloze in clozes)
    shapes = [table.shape for of_cloze in tables for table in of_cloze]
    most, pieces = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    length, width = vectors.shape[1:]
    places = torch.full((len(clozes), holes, pieces), length, device=vectors.device)
    candidates = vectors.new_zeros(len(clozes), holes, most, pieces, width)
    sizes = torch.ones(len(clozes), holes, dtype=torch.long, device=vectors.device)
    for k, (cloze, layout, of_cloze) in enumerate(zip(clozes, layouts, tables, strict=True)):
        for hole, (token, table) in enumerate(zip(cloze.holes, of_cloze, strict=True)):
            start, stop = layout.spans[token]
            places[k, hole, : stop - start] = torch.arange(start, stop)
            candidates[k, hole, : len(table), : table.shape[1]] = table.detach()
            sizes[k, hole] = len(table)
    return Inputs(vectors=vectors, places=places, candidates=candidates, sizes=sizes)


def _stacked(rows: Sequence[Tensor], padding: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)


def _intent_labels(
    clozes: Sequence[Cloze], intents: Sequence[str], device: torch.device
) -> Tensor | None:
    """(K,); None unless the model has intents and every cloze has one."""
    wanted = [cloze.intent for cloze in clozes if cloze.intent is not None]
    if not intents or len(wanted) < len(clozes):
        return None
    return torch.tensor([_number(intent, intents, "intent") for intent in wanted], device=device)


def _tag_labels(
    clozes: Sequence[Cloze], tags: Sequence[str], device: torch.device
) -> Tensor | None:
    """(K, T), likewise."""
    wanted = [cloze.tags for cloze in clozes if cloze.tags is not None]
    if not tags or len(wanted) < len(clozes):
        return None
    numbers = [torch.tensor([_number(tag, tags, "tag") for tag in row]) for row in wanted]
    return _stacked(numbers, _NO_LABEL).to(device)


def _number(label: str, known: Sequence[str], kind: str) -> int:
    if label not in known:
        raise ValueError(
            f"Expected the {kind} of a cloze among the {len(known)} of the model, got "
            f"{shown(label)}: name one that it was trained with."
        )
    return list(known).index(label)
