"""When a batch is checked, and what earlier checks have shown.

A check costs a few backward passes, so that what was shown of one batch is believed of others of
the same signature, for a while: values can change what a forward pass means without changing what
it does. So batches are checked again: the fourth, sixteenth, sixty-fourth … of a signature, one in
five hundred by a coin, and the first after a parameter or a small buffer that was all zero no
longer is (a gate, an adapter, a weight of the loss: behind zeros nothing can be seen). When a batch
is checked depends on how many there were, on weights that were released, and on coins; never on
the examples.
"""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dpnlu.gradients.layout import Layout

# One batch in so many is checked again, whatever it looks like.
_RECHECKED = 500
# Buffers of up to so many entries are watched for becoming something else than zero.
_SMALL = 64


def own_generator() -> torch.Generator:
    """A generator for checks alone, so that nothing else draws other numbers because of them."""
    return torch.Generator().manual_seed(random.SystemRandom().getrandbits(63))


@dataclass
class _Known:
    """What is known of one signature.

    Attributes:
        layouts: where the examples lie at each place; None: it is not known, or depends on the
            batch.
        batches: how many batches of it there were.
        rows, parameters: whether what was asked of each was shown.
        is_doubtless: whether one of them was not doubtful.
    """

    layouts: list[Layout] | None = None
    batches: int = 0
    rows: bool = False
    parameters: bool = False
    is_doubtless: bool = False


@dataclass
class Checks:
    """Decides and remembers.

    Attributes:
        model: whose batches these are.
        zeros: what was all zero when it was last looked at.
    """

    model: nn.Module
    zeros: list[Tensor] = field(default_factory=list)
    _known: dict[Hashable, _Known] = field(default_factory=dict)
    _coins: random.Random = field(default_factory=random.SystemRandom)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        small = [buffer for buffer in self.model.buffers() if buffer.numel() <= _SMALL]
        self.zeros = _zeros_among([*trained, *small])

    def observe(
        self, signature: Hashable, *, chooses_rows: bool = False, is_doubtful: bool = False
    ) -> tuple[bool, bool]:
        """Count a batch; whether its rows and whether its parameters' gradients are to be
        checked."""
        known = self._known.setdefault(signature, _Known())
        known.batches += 1
        again = _is_power_of_four(known.batches) or self._coins.random() < 1 / _RECHECKED
        known.is_doubtless |= not is_doubtful
        chooses_rows |= is_doubtful and not known.is_doubtless
        rows = again or chooses_rows or not known.rows or known.layouts is None
        return rows, again or not known.parameters

    def layouts(self, signature: Hashable, batch: int) -> list[Layout] | None:
        """Where `batch` examples lie, as far as it is known; of rows that were chosen by their
        values it is not."""
        met = self._known.get(signature)
        known = None if met is None else met.layouts
        return known and [
            layout if layout.batch == batch else replace(layout, batch=batch) for layout in known
        ]

    def show_rows(self, signature: Hashable, layouts: list[Layout]) -> None:
        """A batch has shown where the examples lie."""
        known = self._known[signature]
        is_same = all(layout.owners is None for layout in layouts)
        known.layouts, known.rows = layouts if is_same else None, True

    def show_parameters(self, signature: Hashable) -> None:
        """A batch has shown that the parameters' gradients are right."""
        self._known[signature].parameters = True

    def is_shown(self, signature: Hashable) -> bool:
        """Whether a batch has shown that the parameters' gradients are right."""
        return self._known[signature].parameters

    def weights_changed(self) -> None:
        """Forget everything if something that was zero no longer is."""
        if not self.zeros:
            return
        still = _zeros_among(self.zeros)
        if len(still) < len(self.zeros):
            self._known.clear()
        self.zeros = still


def _zeros_among(tensors: list[Tensor]) -> list[Tensor]:
    """Those that are all zero; the CPU waits once for every device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    found = []
    for some in by_device.values():
        have_others = torch.stack([tensor.detach().any() for tensor in some]).cpu().tolist()
        found += [tensor for tensor, other in zip(some, have_others, strict=True) if not other]
    return found


def _is_power_of_four(number: int) -> bool:
    return number.bit_count() == 1 and number.bit_length() % 2 == 1
