"""What the zoo examines: a classifier, texts for it, and a loss for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Ids of the texts: what begins and ends them, and what pads them.
PAD, BEGIN, END, FIRST_WORD, VOCABULARY = 0, 1, 2, 5, 64
LABELS = 3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of the zoo.

    Attributes:
        row: its name in the table.
        column: where it stands there.
        task: "texts", of which the whole has a label, "tokens", each of which has one, or
            "language", where the next token is the label.
        build: a new model.
        more: token ids (B, T) -> what the model is to be given besides.
        dtype: of the parameters.
        tolerance: largest relative error that passes for rounding.
        trains_only: it has no gradients in evaluation mode.
    """

    row: str
    column: str
    task: str
    build: Callable[[], nn.Module]
    more: Callable[[Tensor], dict[str, Any]] = lambda ids: {}
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    trains_only: bool = False

    def __str__(self) -> str:
        return f"{self.row}, {self.column}"

    def model(self) -> nn.Module:
        """A new model as it comes, but for dropout; the same each time."""
        torch.manual_seed(0)
        model = self.build().to(self.dtype)
        for module in model.modules():
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def losses(self, model: nn.Module, texts: Texts) -> Tensor:
        """(B,) losses, of tokens the mean over those of the text."""
        torch.manual_seed(1)  # some models hash at random
        given = self.more(texts.ids)
        if texts.is_padded:
            given["attention_mask"] = texts.mask
        with _default(self.dtype):
            logits = model(input_ids=texts.ids, **given).logits
        if self.task == "texts":
            return F.cross_entropy(logits, texts.ids.sum(1) % LABELS, reduction="none")
        labels, mask = texts.ids % LABELS, texts.mask
        if self.task == "language":  # learned tokens may stand before the text
            length = texts.ids.shape[1]
            logits, labels, mask = logits[:, -length:-1], texts.ids[:, 1:], mask[:, 1:]
        each = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
        return (each * mask).sum(1) / mask.sum(1)


def move_parameters(model: nn.Module) -> None:
    """Add the same random numbers each time, so that nothing is zero any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this type: models make masks and positions in the default one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Texts:
    """A batch.

    Attributes:
        ids: (B, T).
        mask: (B, T), 1 for tokens and 0 for padding.
        is_padded: whether the model is told of the mask.
    """

    ids: Tensor
    mask: Tensor
    is_padded: bool

    @classmethod
    def random(cls, count: int, length: int, *, is_padded: bool) -> Texts:
        """Texts of random words; padded ones are shorter than `length`, but for one."""
        generator = torch.Generator().manual_seed(17 * count + length)
        ids = torch.randint(FIRST_WORD, VOCABULARY, (count, length), generator=generator)
        lengths = torch.full((count,), length)
        if is_padded:
            lengths = (length - torch.arange(count).flip(0)).clamp(min=3)
        position = torch.arange(length)
        ids[:, 0] = BEGIN
        ids[torch.arange(count), lengths - 1] = END
        mask = (position < lengths[:, None]).long()
        return cls(ids * mask + PAD * (1 - mask), mask, is_padded)

    def alone(self, example: int) -> Texts:
        """One of them, by itself."""
        rows = slice(example, example + 1)
        return Texts(self.ids[rows], self.mask[rows], self.is_padded)

    def among_others(self, example: int) -> Texts:
        """The same in its place, among other words and in padding of other lengths."""
        words = (self.ids - FIRST_WORD + 7) % (VOCABULARY - FIRST_WORD) + FIRST_WORD
        ids = torch.where(self.ids >= FIRST_WORD, words, self.ids).flip(0)
        mask = self.mask.flip(0)
        ids[example], mask[example] = self.ids[example], self.mask[example]
        return Texts(ids, mask, self.is_padded)

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        count, length = self.ids.shape
        return f"{count} texts of {length} tokens" + (", padded" if self.is_padded else "")
