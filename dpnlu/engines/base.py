"""What every engine does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from dpnlu.engines.clipped import Clipped


class Engine(Protocol):
    """Finds, clips and adds up gradients.

    Attributes:
        takes_whole_batches: the losses must be those of all examples that were computed.
        counts_forward_passes: of each that keeps a graph the losses must be stepped on.
    """

    takes_whole_batches: bool
    counts_forward_passes: bool

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        """Announce the coming physical batch: its size, None if it is not known beforehand, and
        its data."""

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None,
    ) -> Clipped | None:
        """Add scale * (sum of clipped gradients) to the buffers of `into`.

        Args:
            losses: (B,) losses, each depending on its own example only.
            closes_unit: whether the clipping unit is complete with these examples; None: they are
                a whole logical batch, and the engine forms the units.

        Returns:
            None while the unit is not complete.
        """

    def weights_changed(self) -> None:
        """The optimizer has stepped: what was derived from the weights is out of date."""

    def close(self) -> None:
        """Leave the model as it was."""
