"""Whether the gradients of the tape are those of plain automatic differentiation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpnlu.clipped import Parts, gradient_norms, weighted_sum
from dpnlu.tape import UnsupportedLayerError

# Largest error of a weighted sum of gradients that passes as rounding; models in float64 may take
# norms and softmaxes in float32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
_LOW_PRECISION_TOLERANCE = 0.2


@dataclass(frozen=True)
class Evidence:
    """What was compared on one batch; tensors without dimensions, but for `errors`.

    Attributes:
        is_finite: whether the losses, the norms and what they are compared with are. Infinities
            prove nothing: plain automatic differentiation spreads them over all examples.
        errors: (P,) of each parameter, the distance between the two gradients of a randomly
            weighted sum of the losses, which are equal only if all per-example gradients are.
        size: the norm of the random weights, which count gradients of norm 1.
        norm: of one example's gradient, as it is taken for clipping.
        written_out: the norm of that gradient written out.
    """

    is_finite: Tensor
    errors: Tensor
    size: Tensor
    norm: Tensor
    written_out: Tensor

    def proves(self, names: Sequence[str]) -> bool:
        """Whether the batch shows the gradients to be right.

        Args:
            names: of the parameters, in the order of `errors`.

        Returns:
            False where the batch shows neither that nor the opposite.

        Raises:
            UnsupportedLayerError: examples mix, or dimension 0 is not the batch.
        """
        if not bool(self.is_finite):
            return False
        if not float(self.errors.max()) <= _tolerance(self.size) * float(self.size):
            raise UnsupportedLayerError(
                "Expected the loss of one example to depend on that example alone, and dimension 0 "
                "of every activation to hold the examples; the gradient of "
                f"{names[int(self.errors.argmax())]} says otherwise. Remove what mixes examples "
                "(batch statistics, in-batch negatives, a mean over the batch inside the loss), "
                "put the batch first, or use engine='per_example'."
            )
        norm, written_out = float(self.norm), float(self.written_out)
        if not abs(norm - written_out) <= _tolerance(self.norm) * written_out:
            raise UnsupportedLayerError(
                f"Expected the norm {written_out:g} of an example's gradient, got {norm:g}: a "
                "defect of dpnlu. Use engine='per_example', and report the model's layers."
            )
        return True


def gather(parts: Parts, losses: Tensor, shares: Tensor, *, turn: int) -> Evidence:
    """Compare with plain automatic differentiation, which needs the graph of the losses once more.

    Nothing here looks at a value, so that it can be traced.

    Args:
        parts: the per-example gradients of all parameters.
        losses: (B,), B >= 1.
        shares: (B,) random weights, see `draw_shares`.
        turn: which of the examples with a gradient has its norm compared, modulo their number.
    """
    norms = gradient_norms(parts, losses)
    weights = shares / norms.clamp(min=torch.finfo(norms.dtype).tiny ** 0.5)
    errors, is_finite = _errors(parts, losses, weights.detach())
    has_gradient = norms > 0
    place = has_gradient.cumsum(0) - 1
    chosen = has_gradient & (place == turn % has_gradient.sum().clamp(min=1))
    one = chosen.to(norms.dtype)
    sizes = [weighted_sum(uses, one, parameter).norm() for parameter, uses in parts.items()]
    return Evidence(
        is_finite=torch.isfinite(norms).all() & torch.isfinite(losses).all() & is_finite,
        errors=errors,
        size=shares.norm(),
        norm=torch.where(chosen, norms, 0.0).sum(),
        written_out=torch.stack(sizes).norm(),
    )


def _errors(parts: Parts, losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) distances of the gradients of the weighted losses, and whether the right ones are
    finite."""
    expected = torch.autograd.grad(
        (losses * weights).sum(), list(parts), allow_unused=True, retain_graph=True
    )
    errors = [
        _distance(weighted_sum(uses, weights, parameter), right)
        for (parameter, uses), right in zip(parts.items(), expected, strict=True)
    ]
    sizes = [right.norm() for right in expected if right is not None]
    return torch.stack(errors), torch.isfinite(torch.stack(sizes)).all()


def draw_shares(like: Tensor) -> Tensor:
    """Random weights for losses (B,), the same for all batches of that size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(like), generator=generator).to(like)


def _distance(found: Tensor, expected: Tensor | None) -> Tensor:
    distance: Tensor = (found if expected is None else found.sub_(expected)).norm()
    return distance


def _tolerance(values: Tensor) -> float:
    if any(torch.is_autocast_enabled(device) for device in {"cpu", values.device.type}):
        return _LOW_PRECISION_TOLERANCE
    return _TOLERANCE.get(values.dtype, _LOW_PRECISION_TOLERANCE)
