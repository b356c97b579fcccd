"""Sets of nodes of the autograd graph."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

from torch.autograd.graph import Node

# The name of the nodes at which gradients reach leaves: parameters.
OF_A_PARAMETER = "torch::autograd::AccumulateGrad"


@dataclass
class Nodes:
    """A set of nodes, kept as intervals of torch's sequence number, which rises as nodes are
    made."""

    _spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, start: int, end: int) -> None:
        """Add those numbered from `start` to before `end`."""
        if self._spans and self._spans[-1][1] == start:
            self._spans[-1] = (self._spans[-1][0], end)
        elif end > start:
            bisect.insort(self._spans, (start, end))

    def __contains__(self, node: Node | None) -> bool:
        if node is None:
            return False
        number = node._sequence_nr()
        place = bisect.bisect_right(self._spans, (number, math.inf)) - 1
        return place >= 0 and number < self._spans[place][1]
